"""How much arithmetic a step needs at least, and what it does and moves: for FLOP/s, MFU and GB/s.

A multiplication and an addition count as two. V visible and H hidden tokens, L all of a view.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mim_scale.config import DecoderConfig, HybridConfig, MaeConfig, MaskInMaskConfig, PretrainConfig
from mim_scale.models.blocks import MaskedConvBlock


@dataclass(frozen=True)
class Work:
    """Of one forward and backward pass."""

    flops: int
    """As torch counts what is computed, recomputation included."""
    moved_bytes: int
    """Read and written by all operations, as if nothing stayed in a cache."""


def measure_work(run: Any) -> Work:
    """Count what a pass computes and moves; it runs twice."""
    with FlopCounterMode(display=False) as counted:
        run()
    with _Moved() as moved:
        run()
    return Work(counted.get_total_flops(), moved.bytes)


def visible_flops(config: PretrainConfig) -> int | None:
    """Forward and backward FLOPs of one sample where hidden positions cost nothing but in the decoder; None where no
    formula is known. The backward pass is twice the forward; of a drawn ratio the middle is taken."""
    method = config.method
    if not isinstance(config.model, HybridConfig) or not isinstance(method, MaskInMaskConfig | MaeConfig):
        return None
    total, plan = 0, config.plan
    for level in range(len(plan.levels)):
        hidden = sum(plan.num_hidden(level)) // 2
        of_view = _encoder_products(config.model, plan.token, plan.num_tokens - hidden)
        of_view += _decoder_products(
            method.decoder, config.model.widths[-1], plan.num_tokens, hidden, math.prod(plan.token)
        )
        total += plan.num_views(level) * of_view
    return 3 * 2 * total


def _encoder_products(model: HybridConfig, token: tuple[int, int, int], visible: int) -> int:
    *stages, width = model.widths
    products, before = 0, 1
    for number, channels in enumerate(model.widths):
        positions = visible * math.prod(token) // 8 ** (number + 1)
        products += positions * 8 * before * channels
        before = channels
        if number < len(stages):
            of_block = 2 * channels**2 + MaskedConvBlock.KERNEL**3 * channels + 2 * model.mlp_ratio * channels**2
            products += positions * model.blocks[number] * of_block
            products += positions * channels * width
    products += visible * width**2
    return products + model.depth * _transformer_products(visible, width, model.mlp_ratio)


def _decoder_products(decoder: DecoderConfig, width: int, tokens: int, hidden: int, voxels: int) -> int:
    blocks = decoder.depth * _transformer_products(tokens, decoder.width, decoder.mlp_ratio)
    return (tokens - hidden) * width * decoder.width + blocks + hidden * decoder.width * voxels


def _transformer_products(tokens: int, width: int, mlp_ratio: int) -> int:
    return tokens * (4 + 2 * mlp_ratio) * width**2 + 2 * tokens**2 * width


class _Moved(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of every operation's tensors, those that only look at others left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view and function is not torch.ops.aten.empty.memory_format:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result
