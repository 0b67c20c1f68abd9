"""Grids of rows into blocks of neighbours and back; tokens picked out and put back in order.

B views, Z Y X positions of a grid, C channels (always the last, contiguous axis), L tokens of a view, V some of them.
"""

import torch
from torch import Tensor

from mim_scale.store.geometry import Size3


def split_blocks(rows: Tensor, block: Size3) -> Tensor:
    """[B, Z, Y, X, C] -> [B, Z/z, Y/y, X/x, z*y*x*C]: each block of neighbours as one row, in (z, y, x, C) order."""
    batch, size_z, size_y, size_x, channels = rows.shape
    z, y, x = block
    split = rows.reshape(batch, size_z // z, z, size_y // y, y, size_x // x, x, channels)
    return split.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)


def join_blocks(blocks: Tensor, block: Size3) -> Tensor:
    """[B, gz, gy, gx, z*y*x*C] -> [B, gz*z, gy*y, gx*x, C]: the way back of `split_blocks`."""
    z, y, x = block
    batch, grid_z, grid_y, grid_x, _ = blocks.shape
    split = blocks.reshape(batch, grid_z, grid_y, grid_x, z, y, x, -1)
    return split.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, grid_z * z, grid_y * y, grid_x * x, -1)


def patchify(views: Tensor, token: Size3) -> Tensor:
    """Views [B, 1, Z, Y, X] -> each token's voxels [B, L, z*y*x], both row-major."""
    return split_blocks(views.movedim(1, -1), token).flatten(1, 3)


def unpatchify(voxels: Tensor, grid: Size3, token: Size3) -> Tensor:
    """Each token's voxels [B, L, z*y*x] -> views [B, 1, Z, Y, X]."""
    return join_blocks(voxels.view(len(voxels), *grid, -1), token).movedim(-1, 1)


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens [B, L, C] at index [B, V] -> [B, V, C]."""
    batch, length, channels = tokens.shape
    # Rows of one flat table: its gradient is a row-wise add, several times faster than that of a gather.
    offsets = torch.arange(batch, device=index.device)[:, None] * length
    return (
        tokens.reshape(batch * length, channels).index_select(0, (index + offsets).flatten()).view(batch, -1, channels)
    )


def in_grid_order(tokens: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
    """Tokens [B, V + H, C], visible then hidden, -> row-major [B, L, C]."""
    return gather_tokens(tokens, torch.cat([visible, hidden], dim=1).argsort(dim=1))


def visible_grid(visible: Tensor, grid: Size3, dtype: torch.dtype) -> Tensor:
    """Visible tokens [B, V] -> [B, gz, gy, gx], 1 where visible and 0 where hidden."""
    flat = torch.zeros(len(visible), grid[0] * grid[1] * grid[2], dtype=dtype, device=visible.device)
    return flat.scatter_(1, visible, 1.0).view(-1, *grid)


def mask_rows(rows: Tensor, visible: Tensor) -> Tensor:
    """Zero the rows [B, Z, Y, X, C] of hidden tokens; visible is `visible_grid`'s [B, gz, gy, gx]."""
    batch, size_z, size_y, size_x, channels = rows.shape
    _, grid_z, grid_y, grid_x = visible.shape
    split = rows.reshape(batch, grid_z, size_z // grid_z, grid_y, size_y // grid_y, grid_x, size_x // grid_x, channels)
    return (split * visible[:, :, None, :, None, :, None, None]).view(rows.shape)


def pool_cells(tokens: Tensor, grid: Size3, cells: Size3) -> Tensor:
    """Tokens [B, L, C] in row-major order -> the mean over each cell's tokens [B, cells, C], row-major."""
    (grid_z, grid_y, grid_x), (z, y, x) = grid, cells
    split = tokens.reshape(len(tokens), z, grid_z // z, y, grid_y // y, x, grid_x // x, -1)
    return split.mean(dim=(2, 4, 6)).flatten(1, 3)
