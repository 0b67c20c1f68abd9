"""What moves weights: forward, backward, reduction over ranks, update; plain torch or DeepSpeed behind one protocol.

State leaves an engine as full fp32 tensors by parameter name, so it fits any number of ranks and any engine.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from mim_scale.config import PretrainConfig
from mim_scale.streaming.device import TensorBatch
from mim_scale.training.ranks import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's running averages of the gradient and of its square."""

State = Iterator[tuple[Literal["weights", "moments"], str, Tensor]]
"""Tensors with their names and what they are."""


class Engine(Protocol):
    """One model, one optimizer, all ranks."""

    @property
    def module(self) -> nn.Module:
        """The module itself, with live weights, to evaluate with."""

    def set_rates(self, learning_rate: float) -> None:
        """Set the learning rate of the next update."""

    def forward_backward(self, batch: TensorBatch, last: bool) -> dict[str, Tensor]:
        """Add one micro-batch's gradient; with `last`, reduce the sum over ranks, once a step.

        Returns:
            Detached scalars of this micro-batch on this rank: "loss" and the loss's parts.
        """

    def update(self, leave_out: bool = False) -> float:
        """Clip, make the update, forget the gradient; returns the gradient's global norm before clipping.

        Where that norm is not finite, and with `leave_out`, the gradient is forgotten and nothing else happens, on all
        ranks alike; with `leave_out` the number says nothing.
        """

    def state(self, keepers: Sequence[int] | None = None) -> State:
        """Every weight, and every moment as `name/exp_avg` and `name/exp_avg_sq`, whole, one after another.

        The next update changes them: copy what is to be kept.

        Args:
            keepers: Ranks to share them out to: each tensor goes to one of them, one that holds it whole where there is
                such a rank, so that nothing is sent. None for all of them to every rank. All ranks make the same call,
                and go through to its end: what no rank holds whole is put together by all.
        """

    def load_state(self, weights: dict[str, Tensor], moments: dict[str, Tensor], updates: int) -> None:
        """Take what `state` gives, and the number of updates made so far; all ranks pass the whole."""

    def close(self) -> None:
        """Release what the engine holds."""


def build_engine(module: nn.Module, config: PretrainConfig, ranks: Ranks) -> Engine:
    """The engine that the config names, around a module that is the same on every rank."""
    if config.train.stage < 3:
        module.to(ranks.device)
    match config.train.engine:
        case "plain":
            from mim_scale.training.engine_plain import PlainEngine

            return PlainEngine(module, config, ranks)
        case "deepspeed":
            from mim_scale.training.engine_deepspeed import DeepSpeedEngine

            return DeepSpeedEngine(module, config, ranks)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: no decay for one-dimensional parameters and biases, decay for the rest (method: section 1.6)."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in trained_parameters(module).items():
        (free if parameter.ndim <= 1 or name.endswith(".bias") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class SharingOut:
    """Which tensors this rank is to keep. Every rank asks for the same tensors in the same order.

    Args:
        rank: This one.
        keepers: As for `Engine.state`.
    """

    def __init__(self, rank: int, keepers: Sequence[int] | None) -> None:
        self._rank, self._loads = rank, None if keepers is None else dict.fromkeys(keepers, 0)

    def may_stay_with(self, holder: int | None) -> bool:
        """Whether a tensor that is whole on that rank alone need not be sent."""
        return self._loads is not None and holder in self._loads

    def is_mine(self, size: int, holder: int | None = None) -> bool:
        """Whether this rank keeps a tensor of so many numbers, which its holder, or else whoever has least, does."""
        if self._loads is None:
            return True
        keeper = min(self._loads, key=self._loads.__getitem__) if holder is None else holder
        self._loads[keeper] += size
        return keeper == self._rank


def accumulation(config: PretrainConfig, ranks: Ranks) -> int:
    """Micro-batches that each rank adds up for one update."""
    return config.train.batch // (config.train.micro_batch * ranks.world)


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer moves, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def frozen_state(module: nn.Module) -> dict[str, Tensor]:
    """What a module keeps besides trained parameters: position tables, say."""
    trained = trained_parameters(module)
    return {name: value for name, value in module.state_dict().items() if name not in trained}
