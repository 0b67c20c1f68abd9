"""The last hop: a numpy batch becomes tensors on a device. The only torch in streaming."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mim_scale.streaming.batch import Batch


@dataclass(frozen=True)
class TensorLevel:
    """LevelBatch as int64 tensors."""

    starts: Tensor
    """[N, views, 3]"""
    parent: Tensor
    """[views]"""
    cell: Tensor
    """[N, views]"""
    visible: Tensor
    """[N, views, V]"""
    hidden: Tensor
    """[N, views, H]"""


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
                visible=_index(level.visible, device),
                hidden=_index(level.hidden, device),
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
