"""Cross-level alignment: a child view's features agree with those of the parent's cell that it was cut from.

The contrast group of a child is the cells of its own parent view, never what else is in the micro-batch, so the loss
of a sample does not depend on its neighbours (method: section 1.4, and "Right" in 3.5).
B parent views, K children of each, M cells of a parent view, D features.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from mim_scale.models.blocks import Mlp


class Alignment(nn.Module):
    """One pair of neighbouring levels: `infonce` has an MLP on each side, `cosine` a predictor on the child's."""

    def __init__(self, kind: Literal["infonce", "cosine"], width: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.child = Mlp(width, width)
        self.parent = Mlp(width, width) if kind == "infonce" else None

    def forward(self, children: Tensor, cells: Tensor, cell: Tensor) -> Tensor:
        """The loss, a scalar: mean over all children.

        Args:
            children: Mean token features of the child views [B, K, D].
            cells: Mean token features of the parents' cells [B, M, D]; no gradient goes back into them.
            cell: The cell that each child shows [B, K].
        """
        predicted, targets = self.child(children), cells.detach()
        if self.parent is not None:
            return infonce(predicted, self.parent(targets), cell, self.temperature)
        return cosine(predicted, targets, cell)


def infonce(children: Tensor, cells: Tensor, cell: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding the right cell by cosine over temperature; shapes as in `Alignment.forward`."""
    similarity = _unit(children) @ _unit(cells).transpose(1, 2)
    return F.cross_entropy((similarity / temperature).flatten(0, 1), cell.flatten())


def cosine(children: Tensor, cells: Tensor, cell: Tensor) -> Tensor:
    """2 - 2 cos between each child and its own cell."""
    own = cells.gather(1, cell[:, :, None].expand(-1, -1, cells.shape[-1]))
    return (2 - 2 * (_unit(children) * _unit(own)).sum(dim=-1)).mean()


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features, dim=-1)
