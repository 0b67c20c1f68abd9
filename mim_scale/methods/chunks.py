"""A loss over more views than fit the memory at once: each chunk's activations are gone before the next one runs.

The loss is a sum over views and plans do not depend on features, so cutting it changes no number beyond rounding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mim_scale.config import TrainConfig
from mim_scale.methods.method import Losses

Run = Callable[[], dict[str, Tensor]]
"""Gives what one chunk adds to each part of the loss."""


def losses_by_chunk(
    runs: Sequence[Run], total: Callable[[dict[str, Tensor]], Tensor], module: nn.Module, train: TrainConfig
) -> Losses:
    """The losses of all chunks together, their activations not held together where gradients are wanted.

    Args:
        total: From parts to the loss; linear in them.
        module: Holds all parameters that the loss depends on.
    """
    if len(runs) == 1 or not torch.is_grad_enabled():
        parts = summed([run() for run in runs])
        return Losses(total(parts), parts)
    if train.stage == 3:
        # Weights exist only while a module is called there, so gradients cannot be taken before the backward pass.
        parts = summed(recomputed_by_chunk(runs))
        return Losses(total(parts), parts)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return Losses(*backward_by_chunk(runs, total, trained))


def summed(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Name by name."""
    total: dict[str, Tensor] = {}
    for shares in parts:
        for name, value in shares.items():
            total[name] = total[name] + value if name in total else value
    return total


def backward_by_chunk(
    runs: Sequence[Run], total: Callable[[dict[str, Tensor]], Tensor], parameters: Sequence[nn.Parameter]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its parts; the gradient is taken chunk by chunk now, and handed out in the backward pass.

    Nothing is computed twice; it takes the room of two gradients. The parts have no gradient of their own.

    Args:
        total: From parts to the loss; linear in them.
        parameters: All that the loss depends on.
    """
    names: list[str] = []
    loss, *values = _ByChunk.apply(runs, total, names, *parameters)  # type: ignore[no-untyped-call]
    return loss, dict(zip(names, values, strict=True))


def recomputed_by_chunk(runs: Sequence[Run]) -> list[dict[str, Tensor]]:
    """Every chunk's parts; each one runs again in the backward pass."""
    return [checkpoint(run, use_reentrant=False, preserve_rng_state=False) for run in runs]


class _ByChunk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, runs: Sequence[Run], total: Callable[[dict[str, Tensor]], Tensor], names: list[str], *held: Tensor
    ) -> tuple[Tensor, ...]:
        sums: dict[str, Tensor] = {}
        gradients: list[Tensor | None] = [None] * len(held)
        loss: Tensor | None = None
        for run in runs:
            # Casts that autocast keeps belong to the graph of the chunk that made them.
            torch.clear_autocast_cache()
            with torch.enable_grad():
                parts = run()
                share = total(parts)
            for index, gradient in enumerate(torch.autograd.grad(share, held, allow_unused=True)):
                if gradient is None:
                    continue
                have = gradients[index]
                gradients[index] = gradient if have is None else have.add_(gradient)
            loss = share.detach() if loss is None else loss + share.detach()
            for name, part in parts.items():
                sums[name] = sums[name] + part.detach() if name in sums else part.detach()
            del parts, share
        assert loss is not None
        ctx.gradients = gradients
        names.extend(sums)
        ctx.mark_non_differentiable(*sums.values())
        return loss, *sums.values()

    @staticmethod
    def backward(ctx: Any, *of_outputs: Tensor) -> tuple[Any, ...]:
        scale, gradients = of_outputs[0], ctx.gradients
        ctx.gradients = None
        return None, None, None, *(None if g is None else g.mul_(scale.to(g.dtype)) for g in gradients)
