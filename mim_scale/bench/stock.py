"""The hybrid network from stock layers, as its description reads: what a step costs without packing and own gradients.

Maps stay channels-first, hidden positions are computed and dropped, LayerNorm is wrapped in permutes, attention is
written out, every token is predicted, and autograd makes all gradients (method: sections 2.1 and 2.2). Names of
parameters are those of our modules, so weights go over by `load_state_dict`. Only benchmarks and their tests run it.
B views, V visible tokens, L tokens of a view, C channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim_scale.config import DecoderConfig, HybridConfig
from mim_scale.models.blocks import CONV_EPS, TOKEN_EPS
from mim_scale.models.positions import position_table
from mim_scale.store.geometry import Size3, size3


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, Z, Y, X]."""

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class _Embed(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels_in, channels_out, 2, stride=2)
        self.norm = _ChannelNorm(channels_out, eps=CONV_EPS)

    def forward(self, maps: Tensor) -> Tensor:
        return F.gelu(self.norm(self.conv(maps)))


class _ConvBlock(nn.Module):
    def __init__(self, channels: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = _ChannelNorm(channels, eps=CONV_EPS)
        self.conv1 = nn.Conv3d(channels, channels, 1)
        self.depthwise = nn.Conv3d(channels, channels, 5, padding=2, groups=channels)
        self.conv2 = nn.Conv3d(channels, channels, 1)
        self.norm2 = _ChannelNorm(channels, eps=CONV_EPS)
        self.fc1 = nn.Conv3d(channels, mlp_ratio * channels, 1)
        self.fc2 = nn.Conv3d(mlp_ratio * channels, channels, 1)

    def forward(self, maps: Tensor, shown: Tensor) -> Tensor:
        maps = maps + self.conv2(self.depthwise(shown * self.conv1(self.norm1(maps))))
        result: Tensor = maps + self.fc2(F.gelu(self.fc1(self.norm2(maps))))
        return result


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        query, key, value = self.qkv(tokens).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) / math.sqrt(width // self.heads)).softmax(dim=-1)
        result: Tensor = self.proj((weights @ value).transpose(1, 2).reshape(batch, length, width))
        return result


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return result


class _TokenBlock(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=TOKEN_EPS)
        self.attention = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=TOKEN_EPS)
        self.mlp = _Mlp(width, mlp_ratio * width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm1(tokens))
        result: Tensor = tokens + self.mlp(self.norm2(tokens))
        return result


class StockEncoder(nn.Module):
    """Views [B, 1, Z, Y, X] and visible tokens [B, V] -> [B, V, C], as `HybridEncoder` gives them."""

    position_table: Tensor

    def __init__(self, config: HybridConfig, view: Size3, token: Size3) -> None:
        super().__init__()
        *stage_widths, width = config.widths
        self.grid = size3(length // size for length, size in zip(view, token, strict=True))
        self.embeds = nn.ModuleList(
            _Embed(before, after) for before, after in zip((1, *stage_widths), config.widths, strict=True)
        )
        self.stages = nn.ModuleList(
            nn.ModuleList(_ConvBlock(channels, config.mlp_ratio) for _ in range(count))
            for channels, count in zip(stage_widths, config.blocks, strict=True)
        )
        self.token_embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList(_TokenBlock(width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.fusions = nn.ModuleList()
        for number, channels in enumerate(stage_widths, start=1):
            block = size3(size // 2**number for size in token)
            self.fusions.append(nn.Conv3d(channels, width, block, stride=block))
        self.norm = nn.LayerNorm(width, eps=TOKEN_EPS)
        self.register_buffer("position_table", position_table(self.grid, width), persistent=False)

    def forward(self, views: Tensor, visible: Tensor) -> Tensor:
        """Every position is computed; the mask keeps hidden ones from reaching visible ones."""
        shown = torch.zeros(len(views), math.prod(self.grid)).scatter_(1, visible, 1.0).view(-1, 1, *self.grid)
        maps, fused = views, []
        for number, embed in enumerate(self.embeds):
            maps = embed(maps)
            if number == len(self.stages):
                break
            at_stage = F.interpolate(shown, size=maps.shape[2:])
            stage = self.stages[number]
            assert isinstance(stage, nn.ModuleList)
            for block in stage:
                maps = block(maps, at_stage)
            fused.append(_gathered(self.fusions[number](maps).flatten(2).transpose(1, 2), visible))
        tokens = self.token_embed(maps.flatten(2).transpose(1, 2)) + self.position_table
        tokens = _gathered(tokens, visible)
        for block in self.blocks:
            tokens = block(tokens)
        for part in fused:
            tokens = tokens + part
        result: Tensor = self.norm(tokens)
        return result


class StockDecoder(nn.Module):
    """Latents [B, V, C] -> voxels of every token [B, L, P], row-major."""

    position_table: Tensor

    def __init__(self, config: DecoderConfig, encoder_width: int, grid: Size3, token: Size3) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_width, config.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.blocks = nn.ModuleList(
            _TokenBlock(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=TOKEN_EPS)
        self.to_voxels = nn.Linear(config.width, math.prod(token))
        self.register_buffer("position_table", position_table(grid, config.width), persistent=False)

    def forward(self, latents: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Mask tokens fill in what is hidden, and all tokens return to their places."""
        shown = self.embed(latents)
        tokens = torch.cat([shown, self.mask_token.expand(*hidden.shape, -1)], dim=1)
        tokens = _gathered(tokens, torch.cat([visible, hidden], dim=1).argsort(dim=1)) + self.position_table
        for block in self.blocks:
            tokens = block(tokens)
        result: Tensor = self.to_voxels(self.norm(tokens))
        return result


def _gathered(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[-1]))
