"""Where a volume is not air, one bit a block: so coarse that it stands in the manifest, and plans are made by it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mim_scale.errors import DamagedError
from mim_scale.store.array_format import NUM_LEVELS
from mim_scale.store.geometry import Size3, level_geometry, num_voxels, size3
from mim_scale.store.manifest import Row

AIR_BELOW_HU = -500
"""A block is foreground where a voxel of the coarsest level is above: half way between air and water. Much of a lung
is below, and taken in because it lies enclosed."""

_EDGE = 4
"""Voxels of the coarsest level along each edge of a block: that level's voxels are near cubes, whatever the spacing."""


def foreground_bits(coarsest: NDArray[np.int16]) -> bytes:
    """A manifest's map of a volume: blocks in the order (z, y, x), eight a byte, the first one highest.

    Args:
        coarsest: HU of the whole coarsest level; blocks at its far ends may be cut short.
    """
    found = coarsest > AIR_BELOW_HU
    for axis, size in enumerate(coarsest.shape):
        found = np.logical_or.reduceat(found, np.arange(0, size, _EDGE), axis=axis)
    return np.packbits(_filled(found)).tobytes()


def _filled(found: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """With the blocks that are enclosed in their layer: a third of a lung has no voxel above the limit."""
    may_be_outside = np.pad(~found, ((0, 0), (1, 1), (1, 1)), constant_values=True)
    outside = np.pad(np.zeros_like(found), ((0, 0), (1, 1), (1, 1)), constant_values=True)
    while True:
        grown = outside.copy()
        grown[:, 1:] |= outside[:, :-1]
        grown[:, :-1] |= outside[:, 1:]
        grown[:, :, 1:] |= outside[:, :, :-1]
        grown[:, :, :-1] |= outside[:, :, 1:]
        grown &= may_be_outside
        if np.array_equal(grown, outside):
            return np.asarray(~outside[:, 1:-1, 1:-1])
        outside = grown


@dataclass(frozen=True)
class Foreground:
    """Which blocks of a volume are not air. Outside the volume all is air."""

    blocks: NDArray[np.bool_]
    """[z, y, x]"""
    block: Size3
    """Voxels of level 0 that a block covers; the last ones along an axis may be cut short."""
    shape: Size3
    """Voxels of the volume at level 0."""

    @classmethod
    def of(cls, row: Row) -> "Foreground":
        """The map that a row of the manifest holds.

        Raises:
            DamagedError: it is not one of a volume of that shape.
        """
        coarsest, factor = level_geometry(row.shape, row.spacing_mm, NUM_LEVELS)[-1]
        counts = size3(-(-size // _EDGE) for size in coarsest)
        bits = np.frombuffer(row.foreground, np.uint8)
        if len(bits) != -(-num_voxels(counts) // 8):
            raise DamagedError(
                f"volume {row.key}: its foreground in the manifest has {len(bits)} bytes, expected "
                f"{-(-num_voxels(counts) // 8)}; build the store again"
            )
        blocks = np.unpackbits(bits, count=num_voxels(counts)).view(np.bool_).reshape(counts)
        return cls(blocks, size3(_EDGE * by for by in factor), row.shape)

    def amounts(self, starts: NDArray[Any], size: Size3, cells: Size3) -> NDArray[np.int64]:
        """[boxes, cells] foreground in each cell of boxes, row-major, exact: in voxels times the cells of a box.

        So a cell that is all foreground has num_voxels(size), also where cells are parts of a voxel.

        Args:
            starts: [boxes, 3] voxels; a box may reach beyond the volume.
            size: Voxels of every box.
            cells: Equal parts of a box along each axis.
        """
        (z, y, x), (by_z, by_y, by_x) = self._overlaps(starts, np.array(size), np.array(cells))
        found = self.blocks[z[:, :, None, None], y[:, None, :, None], x[:, None, None, :]].astype(np.int64)
        boxes, wide, high, long = found.shape
        found = (by_z[:, : cells[0]] @ found.reshape(boxes, wide, high * long)).reshape(boxes, cells[0], high, long)
        found = by_y[:, None, : cells[1]] @ found @ by_x[:, None, : cells[2]].swapaxes(2, 3)
        return np.asarray(found.reshape(boxes, num_voxels(cells)))

    def _overlaps(self, starts: NDArray[Any], size: NDArray[Any], cells: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """(blocks that boxes may touch [3, boxes, touched], their length in each cell [3, boxes, cells, touched]).

        Axes with fewer blocks or cells than others are filled up: such blocks add nothing, such cells are no part.
        """
        # In parts of a voxel, of which one has as many as there are cells: cells and blocks then begin at integers.
        block = np.array(self.block) * cells
        edges = (starts * cells).T[:, :, None] + np.arange(cells.max() + 1) * size[:, None, None]
        edges = np.minimum(np.maximum(edges, 0), (np.array(self.shape) * cells)[:, None, None])
        counts = np.array(self.blocks.shape)
        most = min((-(-(size - 1) // self.block)).max() + 1, counts.max())
        touched = np.maximum(starts // self.block, 0).T[:, :, None] + np.arange(most)
        reach = edges[:, :, :, None] - (touched * block[:, None, None])[:, :, None]
        reach = np.minimum(np.maximum(reach, 0), block[:, None, None, None])
        return np.minimum(touched, counts[:, None, None] - 1), reach[:, :, 1:] - reach[:, :, :-1]
