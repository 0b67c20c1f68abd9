"""What a step will cost, found without computing it: a trace with tensors that are shapes only.

So it holds for every method, backbone and checkpointing policy, and follows the code by itself.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from mim_scale.config import Checkpointing, PretrainConfig
from mim_scale.methods.build import build_method
from mim_scale.methods.noise import noise_batch
from mim_scale.streaming.device import TensorBatch

FEWEST_FIRST: tuple[Checkpointing, ...] = ("none", "second", "stem", "all")
"""Policies by how much they compute again, least first."""
_WORD = 4
"""Weights, gradients and both moments are float32."""


@dataclass(frozen=True)
class Cost:
    """Of one micro-batch on one rank that holds the whole model."""

    parameters: int
    flops_forward: int
    """A multiplication and an addition count as two."""
    flops: int
    """Forward and backward, recomputation included."""
    activation_bytes: int
    """Most that is held at once besides weights, moments and gradients: for the backward pass, and what is at work."""
    gradient_bytes: int
    """Of all parameters: held from a step's first micro-batch on."""
    state_bytes: int
    """Weights and moments."""
    batch_bytes: int
    """Blocks of voxels."""
    tensors: int
    """Trained tensors."""

    @property
    def bytes(self) -> int:
        """All that is held at once, without what a library keeps for itself."""
        return self.activation_bytes + self.gradient_bytes + self.state_bytes + self.batch_bytes


def cost_of(config: PretrainConfig, policy: Checkpointing, is_counted: bool = True) -> Cost:
    """The cost of a micro-batch of the run under a checkpointing policy; takes seconds, and no memory to speak of.

    Of a hidden_ratio that is drawn for each sample, the lowest counts: a micro-batch of such samples must fit as well.

    Args:
        is_counted: Whether arithmetic is wanted, which takes two thirds of the time; otherwise it is 0.

    Raises:
        ConfigError: the config's network cannot be built.
    """
    fake = FakeTensorMode()
    with fake:
        method = build_method(config, policy)
        trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
    batch = _batch(_most_visible(config), fake)
    bf16 = config.train.precision == "bf16"
    live = _Live()
    with fake, torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        forward, both = FlopCounterMode(display=False), FlopCounterMode(display=False)
        if is_counted:
            with torch.no_grad(), forward:
                method(batch)
            with both:
                method(batch).total.backward()
        # In a pass of its own: the counter keeps what it has seen from being freed. Gradients are there already.
        with live:
            method(batch).total.backward()
    parameters = sum(parameter.numel() for parameter in trained)
    return Cost(
        parameters=parameters,
        flops_forward=forward.get_total_flops() if is_counted else 0,
        flops=both.get_total_flops() if is_counted else 0,
        activation_bytes=live.most,
        gradient_bytes=parameters * _WORD,
        state_bytes=parameters * 3 * _WORD,
        batch_bytes=batch.blocks.numel() * 2,
        tensors=len(trained),
    )


def _most_visible(config: PretrainConfig) -> PretrainConfig:
    levels = tuple(level.model_copy(update={"hidden_ratio": level.ratios[0]}) for level in config.plan.levels)
    return config.model_copy(update={"plan": config.plan.model_copy(update={"levels": levels})})


def choose_policy(
    config: PretrainConfig, room_bytes: int, needed_bytes: Callable[[Cost], float] = lambda cost: cost.bytes
) -> tuple[Checkpointing, str]:
    """The policy that computes least again and fits the memory, and why: what `auto` means.

    Args:
        room_bytes: What the device has for this rank.
        needed_bytes: What a rank holds of it, given a micro-batch's cost; left out: a rank that holds the whole model.
    """
    told = []
    for policy in FEWEST_FIRST:
        needed = needed_bytes(cost_of(config, policy))
        told.append(f"{policy} {needed / 2**30:.1f}")
        if needed <= USABLE * room_bytes:
            break
    verdict = "fits" if needed <= USABLE * room_bytes else "is the least there is: lower train.views_at_once"
    return (
        policy,
        f"activation checkpointing auto: {policy} {verdict} (GiB: {', '.join(told)} of {room_bytes / 2**30:.1f})",
    )


USABLE = 0.8
"""Of the memory: libraries, fragments and the rest of the process take their part."""


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors that are alive, storages counted once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


def _batch(config: PretrainConfig, fake: FakeTensorMode) -> TensorBatch:
    batch = noise_batch(config, torch.device("cpu"))
    shapes = fake.from_tensor
    levels = tuple(
        replace(
            level,
            starts=shapes(level.starts),
            parent=shapes(level.parent),
            cell=shapes(level.cell),
            tokens=shapes(level.tokens),
            draws=shapes(level.draws),
        )
        for level in batch.levels
    )
    return TensorBatch(shapes(batch.positions), batch.keys, shapes(batch.blocks), levels)
