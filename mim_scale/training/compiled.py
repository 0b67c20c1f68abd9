"""Transformer blocks through torch.compile, where that is asked for and changes nothing but time."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mim_scale.config import PretrainConfig
from mim_scale.errors import ConfigError
from mim_scale.methods.noise import noise_batch
from mim_scale.streaming.device import TensorBatch

TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}
"""How far apart, relatively, the loss may be; its gradient by GRADIENT_TOLERANCE."""
GRADIENT_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
MOST_SHAPES = 64
"""Programs that are made before torch gives up; its own 8 are fewer than three levels in chunks have."""
_GIVE_UP = "set train.compile to false"


def compile_blocks(method: nn.Module, config: PretrainConfig) -> str:
    """Compile the method's blocks in place, and see by a micro-batch of noise that loss and gradient stay.

    Args:
        method: On the device that it will train on; its gradients are cleared.

    Returns:
        A line that says what was done.

    Raises:
        ConfigError: no blocks, no compiler, or another loss or gradient: the config asks for what cannot be had.
    """
    blocks = list(blocks_of(method))
    if not blocks:
        raise ConfigError(
            f"train.compile: {config.method.name} on {config.model.backbone} has no blocks to compile; {_GIVE_UP}"
        )
    batch = noise_batch(config, next(method.parameters()).device)
    loss, gradient = _pass(method, batch, config)
    # Takes seconds to import.
    from torch._dynamo import config as of_compiler

    begin = time.perf_counter()
    # Of all blocks together, as they share their code: both widths, all levels, all sizes of chunks.
    of_compiler.recompile_limit = MOST_SHAPES
    for block in blocks:
        # One graph for each shape: were shapes made free on the way, a resumed run would meet other graphs.
        block.compile(dynamic=False, fullgraph=True)
    try:
        compiled_loss, compiled_gradient = _pass(method, batch, config)
    except Exception as error:  # whatever a compiler and its code generator may raise
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"train.compile: torch.compile failed here ({reason[:200]}); {_GIVE_UP}") from None
    seconds = time.perf_counter() - begin
    apart = float((compiled_loss - loss).abs() / loss.abs())
    gradient_apart = float((compiled_gradient - gradient).norm() / gradient.norm())
    precision = config.train.precision
    # Not `>`: a difference that is not a number must be refused too.
    if not (apart <= TOLERANCE[precision] and gradient_apart <= GRADIENT_TOLERANCE[precision]):
        raise ConfigError(
            f"train.compile: compiled blocks change the loss by {apart:.1e} and its gradient by {gradient_apart:.1e} "
            f"(at most {TOLERANCE[precision]:.0e} and {GRADIENT_TOLERANCE[precision]:.0e} in {precision}); {_GIVE_UP}"
        )
    return f"{len(blocks)} blocks compiled in {seconds:.0f} s; loss apart by {apart:.1e}, gradient {gradient_apart:.1e}"


def uncompiled(config: PretrainConfig) -> AbstractContextManager[Any]:
    """Inside, blocks run as if never compiled: held-out samples and pictures have shapes that no step has."""
    return torch.compiler.set_stance("force_eager") if config.train.compile else nullcontext()


def blocks_of(method: nn.Module) -> Iterator[nn.Module]:
    """The transformer blocks of encoder and decoder: alike, many, and of the same shapes in each step."""
    for module in method.modules():
        blocks = getattr(module, "blocks", None)
        # Convolution blocks of residual encoders have the same name, but stand in another kind of list.
        if isinstance(blocks, nn.ModuleList):
            yield from blocks


def _pass(method: nn.Module, batch: TensorBatch, config: PretrainConfig) -> tuple[Tensor, Tensor]:
    """(loss, gradient as one vector) of a pass."""
    bf16 = config.train.precision == "bf16"
    method.zero_grad()
    with torch.autocast(batch.blocks.device.type, dtype=torch.bfloat16, enabled=bf16):
        loss: Tensor = method(batch).total
    loss.backward()  # type: ignore[no-untyped-call]
    found = [p.grad.flatten() for p in method.parameters() if p.grad is not None]
    method.zero_grad()
    return loss.detach(), torch.cat(found)
