"""A position in, a sample out: order, then plan, then one read of the finest level, then air around small volumes."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mim_scale.config import PlanConfig
from mim_scale.errors import ConfigError
from mim_scale.sampling.order import volume_at
from mim_scale.sampling.plan import Plan, plan
from mim_scale.store.array_store import VolumeReader
from mim_scale.store.dataset import Dataset
from mim_scale.store.foreground import Foreground
from mim_scale.store.geometry import Box, Size3, size3
from mim_scale.store.manifest import Row
from mim_scale.store.volume import AIR_HU
from mim_scale.streaming.batch import Batch, Sample, collate


class Reader(Protocol):
    """Batches by position: what a stream hands out in order. Pickles; any copy gives the same bits."""

    def batch(self, positions: Sequence[int]) -> Batch:
        """The samples at these positions, stacked in their order.

        Raises:
            DamagedError: bytes under a sample are missing or fail their checksum.
        """
        ...


class SampleReader:
    """Samples of a dataset by position. Holds no state but open files, so any copy of it gives the same bits.

    Args:
        dataset: Where voxels come from.
        rows: The volumes to sample from, on one side of the split; their order does not matter.
        plan_config: Boxes and masks.
        seed: Of the order and the plans.
        held_out: Whether the rows are the held-out side, which draws from streams of its own.

    Raises:
        ConfigError: rows is empty.
    """

    def __init__(
        self, dataset: Dataset, rows: Sequence[Row], plan_config: PlanConfig, seed: int, held_out: bool = False
    ) -> None:
        if not rows:
            side = "held-out" if held_out else "training"
            raise ConfigError(f"{dataset.path}: there are no {side} volumes to read; change data.held_out_subjects")
        self._dataset = dataset
        self._rows = sorted(rows, key=lambda row: row.key)
        self._plan_config = plan_config
        self._seed = seed
        self._held_out = held_out

    def sample(self, position: int) -> Sample:
        """The sample at a position.

        Raises:
            DamagedError: a chunk under its box is missing or fails its checksum.
        """
        row, planned = self.planned(position)
        return Sample(position, row.key, read_padded(self._dataset.reader(row), row.shape, planned.box), planned)

    def planned(self, position: int) -> tuple[Row, Plan]:
        """The volume at a position and what is cut from it; no voxel is read."""
        row = self._rows[volume_at(position, len(self._rows), self._seed, self._held_out)]
        # Made anew each time: that takes less than planning does.
        foreground = Foreground.of(row) if self._plan_config.foreground is not None else None
        return row, plan(self._seed, position, row.shape, self._plan_config, self._held_out, foreground)

    def batch(self, positions: Sequence[int]) -> Batch:
        """The samples at these positions, stacked in their order."""
        return collate([self.sample(position) for position in positions])


def read_padded(reader: VolumeReader, shape: Size3, box: Box) -> NDArray[np.int16]:
    """The voxels of a box at the finest level, int16 HU; air where the box reaches beyond the volume."""
    inside = box.clipped(shape)
    voxels = reader.read_box(0, inside)
    if inside == box:
        return voxels
    padded = np.full(box.size, AIR_HU, np.int16)
    padded[inside.moved(size3(-start for start in box.start)).slices] = voxels
    return padded
