"""Groups of views that differ in their number of visible tokens, through a network that takes one number at a time."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def run_alike(run: Callable[..., Tensor], *groups: Sequence[Tensor]) -> list[Tensor]:
    """`run` on each group, those of equal V side by side in one call.

    Args:
        run: Takes as many tensors as there are lists of groups; gives [B, V, C].
        groups: Lists of equal length, of tensors [B, V, ...].

    Returns:
        For each group [B, V, C].
    """
    result = list(groups[0])
    for count in sorted({part.shape[1] for part in groups[0]}):
        alike = [index for index, part in enumerate(groups[0]) if part.shape[1] == count]
        found = run(*(torch.cat([of[index] for index in alike]) for of in groups))
        parts = torch.split(found, [len(groups[0][index]) for index in alike])
        for index, part in zip(alike, parts, strict=True):
            result[index] = part
    return result
