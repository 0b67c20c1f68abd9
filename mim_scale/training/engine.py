"""What moves weights: forward, backward, reduction over ranks, update; plain torch or DeepSpeed behind one protocol.

State leaves an engine as full fp32 tensors by parameter name, so it fits any number of ranks and any engine.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from mim_scale.config import PretrainConfig
from mim_scale.streaming.device import TensorBatch
from mim_scale.training.checkpoint import Piece
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

    def state(self) -> State:
        """Every weight, and every moment as `name/exp_avg` and `name/exp_avg_sq`, whole, one after another.

        All ranks go through all of them in the same order. The next update changes them: copy what is to be kept.
        """

    def pieces(self) -> Iterator[Piece]:
        """This rank's part of the same, to be saved: all ranks' pieces are each number once. Nothing is sent.

        The next update changes them: copy what is to be kept.
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


def shared_out(state: State, rank: int, keepers: Sequence[int]) -> Iterator[Piece]:
    """What a rank keeps of tensors that all ranks go through: each goes to the keeper that has least so far."""
    loads = dict.fromkeys(keepers, 0)
    for kind, name, tensor in state:
        keeper = min(loads, key=loads.__getitem__)
        loads[keeper] += tensor.numel()
        if keeper == rank:
            yield Piece(kind, name, tuple(tensor.shape), 0, tensor)


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
