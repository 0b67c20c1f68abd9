"""Visible tokens side by side, so that hidden ones cost nothing in whatever looks at one position at a time.

A token is a cube, and its positions at a stage are a small cube of rows. Only the depthwise convolution looks beyond
it. For that alone each token either gets a rim of its neighbours' rows, zeros where those are hidden (`Windows`), or
all rows are spread over the views' whole grids and taken back (`Places`; method: section 4.2).
B views, V visible tokens of each, T visible tokens of all views, f positions of a token along an axis, h of a rim.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mim_scale.store.geometry import Size3, size3

WINDOWS_BELOW = ((8, 0.85), (4, 0.6), (2, 0.25))
"""(f, share of visible tokens below which windows are quicker than whole grids) on a CPU; for smaller f, never.

Measured (docs/benchmarks): a rim makes 3.4, 8 and 27 positions of one."""


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


@dataclass(frozen=True)
class Windows:
    """Which packed rows [T, f, f, f, C] stand in and around each token."""

    index: Tensor
    """[T, (f + 2 h)^3] into the flattened packed rows; one past the last for a hidden position."""
    side: int
    """f + 2 h"""

    def padded(self, rows: Tensor) -> Tensor:
        """Packed rows as the table [T * f^3 + 1, C] that `cut` reads: zeros stand last."""
        flat = rows.reshape(-1, rows.shape[-1])
        return torch.cat([flat, flat.new_zeros(1, flat.shape[1])])

    def cut(self, padded: Tensor, start: int, stop: int) -> Tensor:
        """Windows [stop - start, f + 2 h, f + 2 h, f + 2 h, C] of some tokens."""
        rows = padded.index_select(0, self.index[start:stop].reshape(-1))
        return rows.view(-1, self.side, self.side, self.side, padded.shape[-1])


Standing = Places | Windows


def standing(tokens: Tensor, views: int, grid: Size3, positions: int, rim: int) -> Standing:
    """Where packed tokens stand at a stage, in the form that is quicker there; arguments as `windows` takes them."""
    shown = len(tokens) / (views * math.prod(grid))
    if tokens.device.type == "cpu" and rim <= positions:
        for least, share in WINDOWS_BELOW:
            if positions >= least:
                return (
                    windows(tokens, views, grid, positions, rim)
                    if shown < share
                    else places(tokens, views, grid, positions)
                )
    return places(tokens, views, grid, positions)


def places(tokens: Tensor, views: int, grid: Size3, positions: int) -> Places:
    """Where packed tokens stand in whole grids at a stage; arguments as `windows` takes them."""
    size = size3(count * positions for count in grid)
    x = tokens % grid[2]
    y = tokens // grid[2] % grid[1]
    # Views are as good as stacked along z.
    z = tokens // (grid[2] * grid[1])
    along = torch.arange(positions, device=tokens.device)
    z, y, x = (axis[:, None] * positions + along for axis in (z, y, x))
    index = (z[:, :, None, None] * size[1] + y[:, None, :, None]) * size[2] + x[:, None, None, :]
    return Places(index.flatten(), views, size)


def windows(tokens: Tensor, views: int, grid: Size3, positions: int, rim: int) -> Windows:
    """Each packed token with a rim of its neighbours' positions.

    Args:
        tokens: [T] of each packed token, its view's number * tokens of a view + its own, row-major (z, y, x).
        views: B.
        grid: Tokens of a view per axis.
        positions: f.
        rim: h, at most f: further than its neighbours no token sees.
    """
    device, count, side = tokens.device, len(tokens), positions + 2 * rim
    # Where each token's rows begin, on grids that have a border of hidden tokens.
    wide = size3(size + 2 for size in grid)
    x = tokens % grid[2] + 1
    y = tokens // grid[2] % grid[1] + 1
    z = tokens // (grid[2] * grid[1]) % grid[0] + 1
    own = ((tokens // math.prod(grid) * wide[0] + z) * wide[1] + y) * wide[2] + x
    nothing = count * positions**3
    begin = torch.full((views * math.prod(wide),), nothing, device=device)
    begin.index_copy_(0, own, torch.arange(count, device=device) * positions**3)
    # Along an axis: which neighbour a position of the window is in, and which of its positions it is.
    along = torch.arange(-rim, positions + rim, device=device)
    step, inside = along.div(positions, rounding_mode="floor"), along % positions
    steps = ((step[:, None, None] * wide[1] + step[:, None]) * wide[2] + step).flatten()
    offset = ((inside[:, None, None] * positions + inside[:, None]) * positions + inside).flatten()
    index = begin.index_select(0, (own[:, None] + steps).flatten()).view(count, -1)
    return Windows((index + offset).clamp_(max=nothing), side)
