"""How a view is changed before it is compared: a pure function of the integers that the plan drew for it.

Everything runs on the views' device, without its random generator and without waiting for it: each view's change is
chosen by arithmetic on its draws. B views [B, 1, Z, Y, X] with values in [0, 1].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mim_scale.sampling.plan import DRAW_LIMIT

CONTRAST = (0.75, 1.25)
"""Factor on the distance from the view's mean."""
BRIGHTNESS = (-0.1, 0.1)
"""Added, as a share of the window."""
GAMMA = (0.7, 1.5)
BLUR_VOXELS = (0.3, 1.5)
"""Deviation of a Gaussian."""
BLUR_REACH = 4
NOISE = (0.0, 0.05)
"""Deviation, as a share of the window."""
SHARE_CHANGED = 0.5
"""Of the views, for each of gamma, blur and noise; contrast and brightness change in all of them."""


@torch.no_grad()
def augment(views: Tensor, draws: Tensor) -> Tensor:
    """Flip, change contrast and brightness, gamma, blur and noise.

    Args:
        views: [B, 1, Z, Y, X], values in [0, 1].
        draws: [B, AUGMENT_DRAWS] numbers below DRAW_LIMIT: three flips (z, y, x), contrast, brightness, then whether
            and how much of gamma, of blur and of noise, and which noise.

    Returns:
        As many views of the same size, values in [0, 1].
    """
    chance = draws.to(torch.float32) / DRAW_LIMIT
    flip_z, flip_y, flip_x, contrast, brightness, has_gamma, gamma, has_blur, blur, has_noise, noise, which = (
        column.view(-1, 1, 1, 1, 1) for column in chance.unbind(dim=1)
    )
    for axis, flip in zip((2, 3, 4), (flip_z, flip_y, flip_x), strict=True):
        views = torch.where(flip < 0.5, views.flip(axis), views)
    mean = views.mean(dim=(2, 3, 4), keepdim=True)
    views = (views - mean) * _between(CONTRAST, contrast) + mean + _between(BRIGHTNESS, brightness)
    views = views.clamp(0.0, 1.0).pow(_chosen(has_gamma, _between(GAMMA, gamma), 1.0))
    views = _blurred(views, has_blur, _between(BLUR_VOXELS, blur))
    deviation = _chosen(has_noise, _between(NOISE, noise), 0.0)
    return (views + deviation * _noise(views, which)).clamp(0.0, 1.0)


def _between(limits: tuple[float, float], chance: Tensor) -> Tensor:
    return limits[0] + (limits[1] - limits[0]) * chance


def _chosen(chance: Tensor, value: Tensor, otherwise: float) -> Tensor:
    return torch.where(chance < SHARE_CHANGED, value, otherwise)


def _blurred(views: Tensor, chance: Tensor, deviation: Tensor) -> Tensor:
    """A Gaussian along each axis where chosen; beyond its edge a view goes on as it ends."""
    weights = [torch.exp(-0.5 * (step / deviation).square()) for step in range(BLUR_REACH + 1)]
    whole = weights[0] + 2 * torch.stack(weights[1:]).sum(dim=0)
    taps = [_chosen(chance, weight / whole, float(step == 0)) for step, weight in enumerate(weights)]
    for axis in (2, 3, 4):
        size = views.shape[axis]
        sides = [0, 0, 0, 0, 0, 0]
        sides[2 * (4 - axis)] = sides[2 * (4 - axis) + 1] = BLUR_REACH
        padded = F.pad(views, sides, mode="replicate")
        views = taps[0] * views
        for step in range(1, BLUR_REACH + 1):
            before, after = (padded.narrow(axis, BLUR_REACH + by, size) for by in (-step, step))
            views = views + taps[step] * (before + after)
    return views


def _noise(views: Tensor, which: Tensor) -> Tensor:
    """About normal, mean 0 and deviation 1: the sum of four bytes of a hash of a voxel's place and the view's draw."""
    place = torch.arange(views[0].numel(), device=views.device).view(1, *views.shape[1:])
    mixed = (place + (which * DRAW_LIMIT).to(torch.int64) * _GOLDEN) & _WORD
    for by in (_FIRST, _SECOND):
        mixed = ((mixed ^ (mixed >> 16)) * by) & _WORD
    mixed = mixed ^ (mixed >> 16)
    total = sum(((mixed >> shift) & 0xFF for shift in (8, 16, 24)), start=mixed & 0xFF)
    return (total.to(views.dtype) - 4 * 127.5) / _FOUR_BYTES


_WORD = 0xFFFFFFFF
_GOLDEN, _FIRST, _SECOND = 0x9E3779B1, 0x7FEB352D, 0x31848BAB
"""Odd; products of the last two with a word fit 63 bits."""
_FOUR_BYTES = (4 * (256**2 - 1) / 12) ** 0.5
"""Deviation of the sum of four bytes."""
