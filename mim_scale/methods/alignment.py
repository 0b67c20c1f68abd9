"""Cross-level alignment: a child view's features agree with those of the parent's cell that it was cut from.

The contrast group of a child is the cells of its own parent view, never what else is in the micro-batch, so the loss
of a sample does not depend on its neighbours (method: section 1.4, and "Right" in 3.5).
B child views, A parent views, M cells of a parent view, D features.
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

    def forward(self, children: Tensor, cells: Tensor, parent: Tensor, cell: Tensor, find: bool = False) -> Tensor:
        """The loss of each child [B]; with `find`, the cell of its parent that is most alike [B].

        Args:
            children: Mean token features of the child views [B, D].
            cells: Mean token features of the parents' cells [A, M, D]; no gradient goes back into them.
            parent: Whose child each one is [B], 0 to A - 1.
            cell: The cell of its parent that each child shows [B].
        """
        predicted, targets = self.child(children), cells.detach()
        if self.parent is not None:
            targets = self.parent(targets)
        if find:
            return _similarity(predicted, targets, parent).argmax(dim=-1)
        if self.parent is not None:
            return infonce(predicted, targets, parent, cell, self.temperature)
        return cosine(predicted, targets, parent, cell)


def infonce(children: Tensor, cells: Tensor, parent: Tensor, cell: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding the right cell by cosine over temperature; shapes as in `Alignment.forward`."""
    return F.cross_entropy(_similarity(children, cells, parent) / temperature, cell, reduction="none")


def cosine(children: Tensor, cells: Tensor, parent: Tensor, cell: Tensor) -> Tensor:
    """2 - 2 cos between each child and its own cell."""
    return 2 - 2 * (_unit(children) * _unit(cells[parent, cell])).sum(dim=-1)


def _similarity(children: Tensor, cells: Tensor, parent: Tensor) -> Tensor:
    """Cosine of each child with each cell of its parent [B, M]."""
    return (_unit(children)[:, None] @ _unit(cells)[parent].transpose(1, 2)).squeeze(1)


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features, dim=-1)
