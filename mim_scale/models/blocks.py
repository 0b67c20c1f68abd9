"""The layers that the networks are made of, on rows whose last axis is the channels.

A 1x1x1 convolution on rows is a linear map, and one whose kernel is its stride is a reshape and a linear map. Their
weights are kept in the usual convolution layout, so weights from elsewhere map one to one. B views, N tokens, C
channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mim_scale.models.depthwise import DepthwiseConv
from mim_scale.models.packed import Standing
from mim_scale.models.patches import mask_rows, split_blocks
from mim_scale.store.geometry import Size3

CONV_EPS = 1e-5
TOKEN_EPS = 1e-6


def run_block(block: nn.Module, *inputs: Tensor | Standing | None, recompute: bool) -> Tensor:
    """Run a block; with `recompute`, keep only its inputs and run it again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        # No block draws random numbers, so there is no generator state to carry.
        result: Any = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    else:
        result = block(*inputs)
    output: Tensor = result
    return output


class PointwiseConv(nn.Conv3d):
    """A 1x1x1 convolution on rows [..., C] -> [..., C']. Weight [C', C, 1, 1, 1]."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 1)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows in, rows out."""
        return F.linear(rows, self.weight.flatten(1), self.bias)


class BlockConv(nn.Conv3d):
    """A convolution whose kernel is its stride: blocks [..., z*y*x*C] -> [..., C']. Weight [C', C, z, y, x]."""

    def __init__(self, channels_in: int, channels_out: int, block: Size3) -> None:
        super().__init__(channels_in, channels_out, block, stride=block)

    def forward(self, blocks: Tensor) -> Tensor:
        """Blocks as `split_blocks` gives them, any of them, in any order."""
        return F.linear(blocks, self.weight.permute(0, 2, 3, 4, 1).flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Halve the grid: convolution with stride 2, LayerNorm, GELU. [B, Z, Y, X, C] -> [B, Z/2, Y/2, X/2, C']."""

    BLOCK: Size3 = (2, 2, 2)

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = BlockConv(channels_in, channels_out, self.BLOCK)
        self.norm = nn.LayerNorm(channels_out, eps=CONV_EPS)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows in, rows of the halved grid out."""
        return F.gelu(self.norm(self.conv(split_blocks(rows, self.BLOCK))))


class MaskedConvBlock(nn.Module):
    """Depthwise 5x5x5 mixing and an MLP, each added to its input; a hidden position never reaches a visible one.

    Only the depthwise convolution looks at neighbours, and its input is zeroed where hidden (method: section 2.1).
    """

    KERNEL = 5

    def __init__(self, channels: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=CONV_EPS)
        self.conv1 = PointwiseConv(channels, channels)
        self.depthwise = DepthwiseConv(channels, self.KERNEL)
        self.conv2 = PointwiseConv(channels, channels)
        self.norm2 = nn.LayerNorm(channels, eps=CONV_EPS)
        self.fc1 = PointwiseConv(channels, mlp_ratio * channels)
        self.fc2 = PointwiseConv(mlp_ratio * channels, channels)

    def forward(self, rows: Tensor, visible: Tensor | None = None, standing: Standing | None = None) -> Tensor:
        """Rows in and out: of whole grids [B, Z, Y, X, C], or of packed tokens [T, f, f, f, C].

        Args:
            rows: What the stage holds.
            visible: [B, gz, gy, gx], 1 or 0 for each token of whole grids; None where nothing is hidden.
            standing: Where packed tokens stand; None for whole grids.
        """
        mixed = self.conv1(self.norm1(rows))
        if visible is not None:
            mixed = mask_rows(mixed, visible)
        rows = rows + self.conv2(self.depthwise(mixed, standing))
        result: Tensor = rows + self.fc2(F.gelu(self.fc1(self.norm2(rows))))
        return result


class Mlp(nn.Module):
    """Linear, GELU, Linear on the last axis."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows [..., C] in and out."""
        result: Tensor = self.fc2(F.gelu(self.fc1(rows)))
        return result


class Attention(nn.Module):
    """Softmax attention of every token to every token, heads side by side."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, C] in and out."""
        query, key, value = self.qkv(tokens).view(*tokens.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        result: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return result


class TransformerBlock(nn.Module):
    """Attention and an MLP, each on normalised tokens and added to its input."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=TOKEN_EPS)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=TOKEN_EPS)
        self.mlp = Mlp(width, mlp_ratio * width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, C] in and out."""
        tokens = tokens + self.attention(self.norm1(tokens))
        result: Tensor = tokens + self.mlp(self.norm2(tokens))
        return result


def initialise(module: nn.Module) -> None:
    """Xavier-uniform weights, zero biases for every Linear; the rest keeps the framework's (method: section 1.6)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
