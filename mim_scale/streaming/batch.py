"""Samples, and batches of them: numpy arrays that travel between threads, processes and machines.

N samples of a batch, Z Y X voxels of the outer box, V visible and H hidden tokens of a view; V + H is the same for all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mim_scale.sampling.plan import Plan


@dataclass(frozen=True)
class Sample:
    """One sample: the outer box's voxels and everything decided about them."""

    position: int
    key: str
    """The volume's key, for messages."""
    block: NDArray[np.int16]
    """[Z, Y, X] HU."""
    plan: Plan


@dataclass(frozen=True)
class LevelBatch:
    """One level's views for every sample of a batch; fields as in LevelPlan. `parent` is the same for all samples."""

    starts: NDArray[np.int32]
    """[N, views, 3]"""
    parent: NDArray[np.int32]
    """[views]"""
    cell: NDArray[np.int32]
    """[N, views]"""
    tokens: NDArray[np.int32]
    """[N, views, V + H]: the visible tokens of each view, then the hidden ones."""
    num_visible: tuple[int, ...]
    """V of each sample, which may differ."""
    draws: NDArray[np.int32]
    """[N, views, AUGMENT_DRAWS or 0]"""


@dataclass(frozen=True)
class Batch:
    """Samples at neighbouring or any positions, stacked."""

    positions: NDArray[np.int64]
    """[N]"""
    keys: tuple[str, ...]
    blocks: NDArray[np.int16]
    """[N, Z, Y, X] HU."""
    levels: tuple[LevelBatch, ...]


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one plan config into a batch."""
    return Batch(
        positions=np.array([sample.position for sample in samples], np.int64),
        keys=tuple(sample.key for sample in samples),
        blocks=np.stack([sample.block for sample in samples]),
        levels=tuple(_collate_level(samples, level) for level in range(len(samples[0].plan.levels))),
    )


def _collate_level(samples: Sequence[Sample], level: int) -> LevelBatch:
    plans = [sample.plan.levels[level] for sample in samples]
    return LevelBatch(
        starts=np.stack([plan.starts for plan in plans]),
        parent=plans[0].parent,
        cell=np.stack([plan.cell for plan in plans]),
        tokens=np.stack([np.concatenate([plan.visible, plan.hidden], axis=1) for plan in plans]),
        num_visible=tuple(plan.visible.shape[1] for plan in plans),
        draws=np.stack([plan.draws for plan in plans]),
    )
