"""The last hop: a numpy batch becomes tensors on a device. The only torch in streaming."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mim_scale.streaming.batch import Batch


@dataclass(frozen=True)
class Group:
    """Neighbouring views of a level that hide equally many tokens."""

    views: slice
    """Places among the level's views of all samples, samples outermost."""
    visible: Tensor
    """[B, V]"""
    hidden: Tensor
    """[B, H]"""


@dataclass(frozen=True)
class TensorLevel:
    """LevelBatch with int64 tensors."""

    starts: Tensor
    """[N, views, 3]"""
    parent: Tensor
    """[views]"""
    cell: Tensor
    """[N, views]"""
    tokens: Tensor
    """[N, views, V + H]"""
    num_visible: tuple[int, ...]
    """[N] on the host: how many tokens are visible decides shapes, and nothing waits for the device to say it."""
    draws: Tensor
    """[N, views, AUGMENT_DRAWS or 0]"""

    def groups(self) -> list[Group]:
        """All views in order, neighbours that hide equally many together."""
        found: list[Group] = []
        samples, views, _ = self.tokens.shape
        start = 0
        while start < samples:
            count = self.num_visible[start]
            stop = start + 1
            while stop < samples and self.num_visible[stop] == count:
                stop += 1
            tokens = self.tokens[start:stop].flatten(0, 1)
            found.append(Group(slice(start * views, stop * views), tokens[:, :count], tokens[:, count:]))
            start = stop
        return found


@dataclass(frozen=True)
class TensorBatch:
    """Batch as tensors; keys stay text."""

    positions: Tensor
    """[N] int64"""
    keys: tuple[str, ...]
    blocks: Tensor
    """[N, Z, Y, X] int16 HU."""
    levels: tuple[TensorLevel, ...]


def to_device(batch: Batch, device: torch.device | str) -> TensorBatch:
    """Copy a batch to a device; to a GPU from pinned memory, without waiting for it."""
    device = torch.device(device)
    return TensorBatch(
        positions=_index(batch.positions, device),
        keys=batch.keys,
        blocks=_move(batch.blocks, device),
        levels=tuple(
            TensorLevel(
                starts=_index(level.starts, device),
                parent=_index(level.parent, device),
                cell=_index(level.cell, device),
                tokens=_index(level.tokens, device),
                num_visible=level.num_visible,
                draws=_index(level.draws, device),
            )
            for level in batch.levels
        ),
    )


def _index(array: NDArray[Any], device: torch.device) -> Tensor:
    return _move(array.astype(np.int64), device)


def _move(array: NDArray[Any], device: torch.device) -> Tensor:
    # Arrays that come through Ray's shared memory are read-only, which torch cannot express: copy those.
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
