"""The engine without DeepSpeed: torch AdamW and one all-reduce of the flat gradient. The oracle of the other one."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mim_scale.config import PretrainConfig
from mim_scale.streaming.device import TensorBatch
from mim_scale.training.checkpoint import Piece
from mim_scale.training.engine import (
    MOMENTS,
    State,
    accumulation,
    frozen_state,
    parameter_groups,
    shared_out,
    trained_parameters,
)
from mim_scale.training.ranks import Ranks


class PlainEngine:
    """Every rank holds all weights and all moments."""

    def __init__(self, module: nn.Module, config: PretrainConfig, ranks: Ranks) -> None:
        self._module = module.train()
        self._ranks = ranks
        self._accumulation = accumulation(config, ranks)
        self._clip_norm = config.optimizer.clip_norm
        self._bf16 = config.train.precision == "bf16"
        self._trained = trained_parameters(module)
        self._optimizer = torch.optim.AdamW(
            parameter_groups(module, config.optimizer.weight_decay),
            lr=0.0,
            betas=config.optimizer.betas,
            fused=ranks.device.type == "cuda",
        )

    @property
    def module(self) -> nn.Module:
        """The module itself, with live weights."""
        return self._module

    def set_rates(self, learning_rate: float) -> None:
        """Set the learning rate of the next update."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate

    def forward_backward(self, batch: TensorBatch, last: bool) -> dict[str, Tensor]:
        """Add one micro-batch's gradient; with `last`, average the sum over ranks."""
        with torch.autocast(self._ranks.device.type, dtype=torch.bfloat16, enabled=self._bf16):
            losses = self._module(batch)
        (losses.total / self._accumulation).backward()
        if last:
            self._reduce()
        return {"loss": losses.total.detach(), **{name: part.detach() for name, part in losses.parts.items()}}

    def update(self, leave_out: bool = False) -> float:
        """Clip, make the update, forget the gradient; the last alone where the norm is not finite."""
        limit = float("inf") if self._clip_norm is None else self._clip_norm
        norm = torch.nn.utils.clip_grad_norm_(self._trained.values(), limit)
        if not leave_out and bool(norm.isfinite()):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def state(self) -> State:
        """Weights and moments."""
        return plain_state(self._module, self._optimizer)

    def pieces(self) -> Iterator[Piece]:
        """Whole tensors, shared out."""
        return shared_out(self.state(), self._ranks.rank, range(self._ranks.world))

    def load_state(self, weights: dict[str, Tensor], moments: dict[str, Tensor], updates: int) -> None:
        """Take weights, moments and the number of updates made so far."""
        load_plain_state(self._module, self._optimizer, weights, moments, updates)

    def close(self) -> None:
        """Nothing to release."""

    def _reduce(self) -> None:
        for parameter in self._trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self._ranks.world == 1:
            return
        gradients = [parameter.grad for parameter in self._trained.values() if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self._ranks.world
        for gradient, reduced in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(reduced.view_as(gradient))


def plain_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Weights and moments of a module and an optimizer that both hold them whole."""
    for name, value in frozen_state(module).items():
        yield "weights", name, value
    for name, parameter in trained_parameters(module).items():
        yield "weights", name, parameter
        held = optimizer.state.get(parameter, {})
        for moment in MOMENTS:
            yield "moments", f"{name}/{moment}", held[moment] if moment in held else torch.zeros_like(parameter)


def load_plain_state(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    updates: int,
) -> None:
    """The way back of `plain_state`."""
    module.load_state_dict(weights)
    for name, parameter in trained_parameters(module).items():
        state: dict[str, Tensor] = {m: moments[f"{name}/{m}"].to(parameter).clone() for m in MOMENTS}
        # fused AdamW keeps its count on the device, the others on the CPU
        state["step"] = torch.tensor(float(updates), device=parameter.device)
        optimizer.state[parameter] = state
