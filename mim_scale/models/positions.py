"""The fixed position table: where a token stands, as sines and cosines of its place along each axis."""

import torch
from torch import Tensor

from mim_scale.store.geometry import Size3


def position_table(grid: Size3, width: int) -> Tensor:
    """The table [tokens, width], float32, tokens row-major (z, y, x).

    The width is three equal parts, one an axis; a part is all sines, then all cosines, of p * 10000^(-i / (width / 6))
    with p the place along that axis (method: section 2.1). `width` is a multiple of 6.
    """
    frequencies = 10000.0 ** (-torch.arange(width // 6, dtype=torch.float64) / (width // 6))
    parts = []
    for axis, size in enumerate(grid):
        angles = torch.arange(size, dtype=torch.float64)[:, None] * frequencies
        along = torch.cat([angles.sin(), angles.cos()], dim=1)
        shape = [1, 1, 1, width // 3]
        shape[axis] = size
        parts.append(along.view(shape).expand(*grid, width // 3))
    return torch.cat(parts, dim=-1).flatten(0, 2).float()
