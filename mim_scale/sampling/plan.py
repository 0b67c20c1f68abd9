"""What is cut and what is hidden for one sample, decided before a voxel is read.

A plan is a chain of levels. The first level's one view shows the whole outer box, or its views show crops of it. A
child view shows exactly one hidden cell of its parent, so what it shows is hidden from the parent in full. Views stand
in the order (parent, cell).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mim_scale.config import PlanConfig
from mim_scale.sampling.foreground import Preference, foreground_first
from mim_scale.sampling.rng import Purpose, below, permutation, words
from mim_scale.store.foreground import Foreground
from mim_scale.store.geometry import Box, Size3, size3

Indices = NDArray[np.int32]
AUGMENT_DRAWS = 12
DRAW_LIMIT = 2**24
"""As fine as a float32 between 0 and 1."""


@dataclass(frozen=True)
class LevelPlan:
    """One level's views. V visible and H hidden tokens are the same numbers for every view of the sample's level."""

    starts: Indices
    """[views, 3] voxels (z, y, x) from the outer box's corner to the view's; its size is PlanConfig.region(level)."""
    parent: Indices
    """[views] place of the parent view in the level before; -1 at the first level."""
    cell: Indices
    """[views] cell of the parent that the view shows, row-major; -1 at the first level."""
    visible: Indices
    """[views, V] visible tokens, row-major, ascending."""
    hidden: Indices
    """[views, H] hidden tokens, row-major, ascending."""
    draws: Indices
    """[views, AUGMENT_DRAWS] numbers below DRAW_LIMIT that say how a view is changed; [views, 0] where it is not."""


@dataclass(frozen=True)
class Plan:
    """One sample's boxes and masks."""

    position: int
    box: Box
    """Outer box in the volume's voxels; centred where the volume is smaller: start is negative and air pads it."""
    levels: tuple[LevelPlan, ...]


def plan(
    seed: int,
    position: int,
    volume_shape: Size3,
    config: PlanConfig,
    held_out: bool = False,
    foreground: Foreground | None = None,
) -> Plan:
    """The plan of the sample at a position: a pure function of its arguments.

    Args:
        volume_shape: Voxels (z, y, x) of the volume that stands there.
        held_out: Whether the sample is a held-out one; those draw from streams that training never uses.
        foreground: Where the volume is not air, for configs that ask for it; by default nowhere is air.
    """
    prefer = Preference(foreground, config.foreground) if foreground and config.foreground else None
    outer, views = (purpose.held_out(held_out) for purpose in (Purpose.CROP, Purpose.VIEWS))
    start = size3(_corners(seed, position, outer, 1, (0, 0, 0), volume_shape, config.box, prefer)[0].tolist())
    starts = np.zeros((1, 3), np.int32)
    if config.crop is not None:
        starts = _corners(seed, position, views, config.levels[0].views, start, config.box, config.crop, prefer)
    levels: list[LevelPlan] = []
    parent = cell = np.full(len(starts), -1, np.int32)
    for level in range(len(config.levels)):
        is_foreground = None
        if prefer is not None:
            is_foreground = prefer.cells(starts + np.array(start), config.region(level), config.cells(level))
        hidden_cells = _hidden_cells(seed, position, level, config, held_out, prefer, is_foreground)
        tokens = _tokens(hidden_cells, config.grid, config.cells(level))
        draws = _draws(seed, position, len(starts), config.augment, held_out)
        levels.append(LevelPlan(starts, parent, cell, *tokens, draws))
        if level + 1 < len(config.levels):
            parent, cell = _children(seed, position, level, hidden_cells, config, held_out, is_foreground)
            corners = _cell_corners(config.cells(level), config.region(level + 1))
            starts = starts[parent] + corners[cell]
    return Plan(position, Box(start, config.box), tuple(levels))


def _corners(
    seed: int,
    position: int,
    purpose: Purpose,
    views: int,
    origin: Size3,
    shape: Size3,
    size: Size3,
    prefer: Preference | None,
) -> Indices:
    """[views, 3] where boxes of a size begin, from the corner of what holds them; centred where that is smaller.

    Args:
        origin: In the volume, of what holds them.
        shape: Of what holds them.
    """

    def draw(retry: int, tries: int) -> Indices:
        drawn = words(seed, purpose, position, tries * views * 3, sub=retry)
        found = [_place(word, shape[i % 3], size[i % 3]) for i, word in enumerate(drawn.tolist())]
        return np.array(found, np.int32).reshape(tries, views, 3)

    return draw(0, 1)[0] if prefer is None else prefer.corners(draw, origin, size)


def _place(word: int, size: int, length: int) -> int:
    return below(word, size - length + 1) if size >= length else -((length - size) // 2)


def _draws(seed: int, position: int, views: int, augment: bool, held_out: bool) -> Indices:
    if not augment:
        return np.zeros((views, 0), np.int32)
    drawn = words(seed, Purpose.AUGMENT.held_out(held_out), position, views * AUGMENT_DRAWS)
    return (drawn >> np.uint64(40)).astype(np.int32).reshape(views, AUGMENT_DRAWS)


def _num_hidden_cells(seed: int, position: int, level: int, config: PlanConfig, held_out: bool) -> int:
    fewest, most = config.num_hidden_cells(level)
    if fewest == most:
        return fewest
    drawn = words(seed, Purpose.RATIO.held_out(held_out), position, 1, sub=level)
    return fewest + below(int(drawn[0]), most - fewest + 1)


def _hidden_cells(
    seed: int,
    position: int,
    level: int,
    config: PlanConfig,
    held_out: bool,
    prefer: Preference | None,
    is_foreground: NDArray[np.bool_] | None,
) -> NDArray[np.bool_]:
    """[views, cells], True where hidden: every view hides the same number of cells."""
    views, cells = config.num_views(level), math.prod(config.cells(level))
    count = _num_hidden_cells(seed, position, level, config, held_out)
    drawn = words(seed, Purpose.MASK.held_out(held_out), position, views * cells, sub=level)
    drawn = drawn.reshape(views, cells)
    if prefer is not None and is_foreground is not None:
        return prefer.hidden(drawn, is_foreground, count)
    order = permutation(drawn)
    hidden = np.zeros((views, cells), np.bool_)
    np.put_along_axis(hidden, order[:, cells - count :], True, axis=1)
    return hidden


def _children(
    seed: int,
    position: int,
    level: int,
    hidden_cells: NDArray[np.bool_],
    config: PlanConfig,
    held_out: bool,
    is_foreground: NDArray[np.bool_] | None,
) -> tuple[Indices, Indices]:
    """(parent, cell), [views of the next level] each: distinct hidden cells of every view, in (parent, cell) order."""
    views, hidden = len(hidden_cells), int(hidden_cells[0].sum())
    children = config.levels[level + 1].views
    drawn = words(seed, Purpose.CHILDREN.held_out(held_out), position, views * hidden, sub=level)
    drawn = drawn.reshape(views, hidden)
    candidates = np.nonzero(hidden_cells)[1].reshape(views, hidden)
    if is_foreground is None:
        order = permutation(drawn)
    else:
        order = foreground_first(drawn, is_foreground[hidden_cells].reshape(views, hidden))
    chosen = np.sort(order[:, :children], axis=1)
    cell = np.take_along_axis(candidates, chosen, axis=1)
    parent = np.repeat(np.arange(views, dtype=np.int32), children)
    return parent, cell.ravel().astype(np.int32)


def _tokens(hidden_cells: NDArray[np.bool_], grid: Size3, cells: Size3) -> tuple[Indices, Indices]:
    """(visible, hidden) tokens of every view, [views, V] and [views, H]."""
    is_hidden = hidden_cells[:, cell_of_token(grid, cells)]
    views = len(is_hidden)
    visible, hidden = (np.nonzero(mask)[1].astype(np.int32).reshape(views, -1) for mask in (~is_hidden, is_hidden))
    return visible, hidden


@lru_cache(maxsize=64)
def cell_of_token(grid: Size3, cells: Size3) -> NDArray[np.int64]:
    """The cell that holds each token, [tokens], both row-major: cells are true cuboids of neighbouring tokens."""
    along = [np.arange(size) // (size // count) for size, count in zip(grid, cells, strict=True)]
    z, y, x = np.meshgrid(*along, indexing="ij")
    return np.asarray(((z * cells[1] + y) * cells[2] + x).ravel(), dtype=np.int64)


@lru_cache(maxsize=64)
def _cell_corners(cells: Size3, cell_size: Size3) -> Indices:
    """[cells, 3] voxels from a region's corner to each of its cells'."""
    corners = np.stack(np.unravel_index(np.arange(math.prod(cells)), cells), axis=1)
    return np.asarray(corners * np.array(cell_size), dtype=np.int32)
