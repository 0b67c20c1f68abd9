"""Is the network collapsing: how many directions its features use, and whether alignment finds anything.

All are numbers to look at beside the loss; none is minimised. N rows of features, D of each.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mim_scale.methods.targets import at_least_float32

MOST_ROWS = 1024
"""Features that a rank is taken of: enough to tell collapse, and quick."""
AIR_VARIANCE = 1e-6
"""Of intensities in [0, 1]: a token below it holds one value, which in CT is air."""


def effective_rank(features: Tensor) -> Tensor:
    """How many directions features [N, D] use: exp of the entropy of their singular values' shares, 1 to min(N, D).

    Of centred features (Roy and Vetterli 2007); 1 where all are equal.
    """
    rows = _some(features)
    values = torch.linalg.svdvals(rows - rows.mean(dim=0))
    share = values / values.sum().clamp_min(1e-12)
    return torch.where(values.sum() < 1e-12, torch.ones_like(values[0]), torch.special.entr(share).sum().exp())


def deviation(features: Tensor) -> Tensor:
    """Mean deviation of unit features [N, D] along each axis, times sqrt(D): 1 spread evenly, 0 all alike."""
    rows = F.normalize(_some(features), dim=-1)
    found: Tensor = rows.std(dim=0, correction=0).mean() * rows.shape[1] ** 0.5
    return found


def constant_share(voxels: Tensor) -> Tensor:
    """Share of tokens [..., P] that hold one value."""
    return (at_least_float32(voxels).var(dim=-1) < AIR_VARIANCE).float().mean()


def _some(features: Tensor) -> Tensor:
    rows = at_least_float32(features.detach()).flatten(0, -2)
    return rows[:: max(1, -(-len(rows) // MOST_ROWS))]
