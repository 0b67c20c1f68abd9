"""Visible tokens side by side, so that hidden ones cost nothing in whatever looks at one position at a time.

A token is a cube, and its positions at a stage are a small cube of rows. Only the depthwise convolution looks beyond
it: for that alone the rows are spread over the views' whole grids, zeros where hidden, and taken back (method: section
4.2).
B views, V visible tokens of each, T visible tokens of all views, f positions of a token along an axis.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mim_scale.store.geometry import Size3, size3


@dataclass(frozen=True)
class Places:
    """Where packed rows [T, f, f, f, C] stand in whole grids [B, Z, Y, X, C]."""

    index: Tensor
    """[T * f^3] into the flattened grids' rows."""
    views: int
    grid: Size3
    """Positions of a view (z, y, x) at the stage."""

    def spread(self, rows: Tensor) -> Tensor:
        """Packed rows to whole grids, zeros where hidden."""
        channels = rows.shape[-1]
        grids = rows.new_zeros(self.views * self.grid[0] * self.grid[1] * self.grid[2], channels)
        return grids.index_copy_(0, self.index, rows.reshape(-1, channels)).view(self.views, *self.grid, channels)

    def take(self, grids: Tensor, like: Tensor) -> Tensor:
        """The way back: rows in the shape of `like`."""
        return grids.reshape(-1, grids.shape[-1]).index_select(0, self.index).view(like.shape)


def places(tokens: Tensor, views: int, grid: Size3, positions: int) -> Places:
    """Where packed tokens stand at a stage.

    Args:
        tokens: [T] of each packed token, its view's number * tokens of a view + its own, row-major (z, y, x).
        views: B.
        grid: Tokens of a view per axis.
        positions: f.
    """
    size = size3(count * positions for count in grid)
    x = tokens % grid[2]
    y = tokens // grid[2] % grid[1]
    # Views are as good as stacked along z.
    z = tokens // (grid[2] * grid[1])
    along = torch.arange(positions, device=tokens.device)
    z, y, x = (axis[:, None] * positions + along for axis in (z, y, x))
    index = (z[:, :, None, None] * size[1] + y[:, None, :, None]) * size[2] + x[:, None, None, :]
    return Places(index.flatten(), views, size)
