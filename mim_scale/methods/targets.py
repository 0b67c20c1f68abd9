"""What is reconstructed, how far off a prediction is, and how far off one that has learnt nothing would be.

B views, L tokens of a view, V visible and H hidden ones, P voxels of a token.
"""

from typing import Literal

import torch
from torch import Tensor

from mim_scale.models.patches import gather_tokens, patchify
from mim_scale.store.geometry import Size3

Error = Literal["l1", "l2"]
"""Absolute or squared difference."""
VARIANCE_EPS = 1e-6
NEIGHBOURS = 6
"""Visible tokens that the trivial predictor interpolates between."""


def at_least_float32(values: Tensor) -> Tensor:
    """The values, widened where they are narrower than float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def token_statistics(voxels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each token [B, any, P] -> [B, any, 1] each; unbiased, with the method's epsilon."""
    variance, mean = torch.var_mean(voxels, dim=-1, keepdim=True)
    return mean, (variance + VARIANCE_EPS).sqrt()


def hidden_targets(views: Tensor, hidden: Tensor, token: Size3, normalise: bool) -> Tensor:
    """Hidden tokens' voxels [B, H, P] of views [B, 1, Z, Y, X]; `normalise`: by their own mean and deviation."""
    voxels = gather_tokens(patchify(views, token), hidden)
    if not normalise:
        return voxels
    mean, deviation = token_statistics(voxels)
    return (voxels - mean) / deviation


def errors_of(difference: Tensor, error: Error) -> Tensor:
    """What a loss takes the mean of, voxel by voxel."""
    difference = at_least_float32(difference)
    return difference.square() if error == "l2" else difference.abs()


def trivial_loss(views: Tensor, visible: Tensor, hidden: Tensor, token: Size3, normalise: bool, error: Error) -> Tensor:
    """The loss of the stronger of two predictors that see the visible voxels and have learnt nothing.

    Raw targets: (a) one constant a view, the mean of its visible voxels; (b) one constant a hidden token, the mean of
    the voxels of its nearest 6 visible tokens, weighted by the inverse squared distance; the lower loss of the two is
    returned.
    Normalised targets: no constant beats 0, whose loss is mean((P - 1) / P * var / (var + eps)).
    """
    targets = hidden_targets(views, hidden, token, normalise)
    if normalise:
        return errors_of(targets, error).mean()
    means = patchify(views, token).mean(dim=-1, keepdim=True)
    shown = gather_tokens(means, visible)
    constant = errors_of(targets - shown.mean(dim=1, keepdim=True), error).mean()
    near = errors_of(targets - _from_neighbours(shown, visible, hidden, views, token), error).mean()
    return torch.minimum(constant, near)


def _from_neighbours(shown: Tensor, visible: Tensor, hidden: Tensor, views: Tensor, token: Size3) -> Tensor:
    """[B, H, 1] from visible means [B, V, 1]."""
    grid = [size // length for size, length in zip(views.shape[2:], token, strict=True)]
    axes = [torch.arange(count, device=views.device) * length for count, length in zip(grid, token, strict=True)]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(-1, 3).to(views.dtype)
    squared = (places[hidden][:, :, None] - places[visible][:, None]).square().sum(dim=-1)
    nearest, index = squared.topk(min(NEIGHBOURS, visible.shape[1]), dim=-1, largest=False)
    weights = 1.0 / nearest
    values = shown[:, :, 0][torch.arange(len(views), device=views.device).view(-1, 1, 1), index]
    return ((weights * values).sum(dim=-1) / weights.sum(dim=-1)).unsqueeze(-1)
