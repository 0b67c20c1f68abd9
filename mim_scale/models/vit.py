"""A plain vision transformer: tokens of voxels by a linear map, learnt positions, a final norm (method: section 6).

The norm is applied in pre-training too: left out, it would reach fine-tuning as it was drawn.
B views, L tokens of a view, V visible ones, C the width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mim_scale.config import Checkpointing, ViTConfig
from mim_scale.models.alike import run_alike
from mim_scale.models.blocks import TOKEN_EPS, BlockConv, TransformerBlock, initialise, run_block
from mim_scale.models.encoder import Encoder, is_recomputed
from mim_scale.models.patches import gather_tokens, patchify, visible_grid
from mim_scale.store.geometry import Size3

MAPS = 4
"""Depths, evenly apart, at which a segmentation head reads; UNETR's four."""


class Positions(nn.Module):
    """A learnt vector for each place of a view."""

    def __init__(self, places: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(1, places, width))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, tokens: Tensor, index: Tensor | None = None) -> Tensor:
        """Tokens [B, V, C] with their places [B, V] added; None for all L in row-major order."""
        return tokens + (self.table if index is None else self.table[0][index])


class ViTEncoder(Encoder):
    """Views [B, 1, Z, Y, X] with values in [0, 1] -> token features [B, V, C]; hidden tokens are not computed."""

    def __init__(self, config: ViTConfig, view: Size3, token: Size3, checkpointing: Checkpointing = "none") -> None:
        """Build for views and tokens of so many voxels; `checkpointing` names the blocks that trade time for memory."""
        super().__init__(view, token)
        self.checkpointing = checkpointing
        self.width = self.mask_width = config.width
        self.embed = BlockConv(1, config.width, token)
        self.positions = Positions(self.grid[0] * self.grid[1] * self.grid[2], config.width)
        self.blocks = nn.ModuleList(
            TransformerBlock(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=TOKEN_EPS)
        initialise(self)
        # The embedding is a linear map too, kept in the layout of a convolution.
        nn.init.xavier_uniform_(self.embed.weight.detach().flatten(1))
        assert self.embed.bias is not None
        nn.init.zeros_(self.embed.bias)

    def forward(self, views: Tensor, visible: Tensor | None = None) -> Tensor:
        """As every encoder's."""
        if visible is not None:
            return self.encode_groups([views], [visible])[0]
        return self._transform(self.positions(self._embedded(views)))

    def encode_groups(self, views: Sequence[Tensor], visible: Sequence[Tensor]) -> list[Tensor]:
        """`forward` for groups of views that differ in V; those of equal V run side by side."""
        tokens = []
        for group, shown in zip(views, visible, strict=True):
            self.check(group)
            embedded = self.embed(gather_tokens(patchify(group, self.token), shown))
            tokens.append(self.positions(embedded, shown))
        return run_alike(self._transform, tokens)

    def encode_filled(self, views: Tensor, hidden: Tensor, mask_token: Tensor) -> Tensor:
        """As every encoder's; the mask token stands in place of the embedding; places are added to all alike."""
        embedded = self._embedded(views)
        is_hidden = visible_grid(hidden, self.grid, embedded.dtype).flatten(1).bool()[:, :, None]
        filled = torch.where(is_hidden, mask_token.to(embedded.dtype), embedded)
        return self._transform(self.positions(filled))

    def features(self, views: Tensor) -> list[Tensor]:
        """Maps [B, C, gz, gy, gx] at evenly spaced depths, shallowest first; the last one is normalised.

        A network of fewer blocks than MAPS gives one map a block.
        """
        tokens, depth = self.positions(self._embedded(views)), len(self.blocks)
        read = {-(-depth * (number + 1) // MAPS) for number in range(MAPS)}
        maps = []
        for number, block in enumerate(self.blocks):
            tokens = run_block(block, tokens, recompute=is_recomputed(self.checkpointing, number, in_stem=False))
            if number + 1 in read:
                maps.append(self.norm(tokens) if number + 1 == depth else tokens)
        return [rows.transpose(1, 2).reshape(len(views), self.width, *self.grid) for rows in maps]

    def _embedded(self, views: Tensor) -> Tensor:
        """All tokens [B, L, C], before their places are added."""
        self.check(views)
        result: Tensor = self.embed(patchify(views, self.token))
        return result

    def _transform(self, tokens: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            tokens = run_block(block, tokens, recompute=is_recomputed(self.checkpointing, number, in_stem=False))
        result: Tensor = self.norm(tokens)
        return result
