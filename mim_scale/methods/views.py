"""From one block of Hounsfield units to every level's views: window, cut, resize. No gradient flows here.

N samples, Z Y X voxels of the outer box, z y x of a view.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mim_scale.config import PlanConfig
from mim_scale.store.geometry import Size3
from mim_scale.streaming.device import TensorBatch


def window(blocks: Tensor, window_hu: tuple[float, float]) -> Tensor:
    """Int16 HU to float32 in [0, 1], clipped outside the window."""
    low, high = window_hu
    return ((blocks.float() - low) / (high - low)).clamp_(0.0, 1.0)


def cut_regions(blocks: Tensor, starts: Tensor, region: Size3) -> Tensor:
    """Regions [N * views, 1, *region] of blocks [N, Z, Y, X], at starts [N, views, 3] (z, y, x)."""
    samples, views, _ = starts.shape
    if views == 1 and blocks.shape[1:] == region:
        return blocks[:, None]
    index: list[Tensor] = [torch.arange(samples, device=blocks.device).view(-1, 1, 1, 1, 1)]
    for axis, size in enumerate(region):
        along = starts[:, :, axis, None] + torch.arange(size, device=blocks.device)
        shape = [samples, views, 1, 1, 1]
        shape[2 + axis] = size
        index.append(along.view(shape))
    return blocks[index[0], index[1], index[2], index[3]].view(samples * views, 1, *region)


def resize(regions: Tensor, view: Size3) -> Tensor:
    """Trilinear to the view's size (align_corners=False); halving is exactly the mean of 2x2x2 voxels."""
    if tuple(regions.shape[2:]) == view:
        return regions
    return F.interpolate(regions, size=view, mode="trilinear", align_corners=False)


@torch.no_grad()
def make_views(batch: TensorBatch, plan: PlanConfig, window_hu: tuple[float, float]) -> list[Tensor]:
    """Every level's views [N * views, 1, z, y, x], float32 in [0, 1], samples outermost."""
    # Cut in int16, then widen: most of the block is in no child view.
    return [
        resize(window(cut_regions(batch.blocks, level.starts, plan.region(number)), window_hu), plan.view)
        for number, level in enumerate(batch.levels)
    ]
