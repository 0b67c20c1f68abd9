"""The decoder: a plain transformer over all tokens of a view, says what the hidden ones show (method: section 2.2).

B views, V visible and H hidden tokens, C the encoder's width, D the decoder's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mim_scale.config import Checkpointing, DecoderConfig
from mim_scale.models.blocks import TOKEN_EPS, TransformerBlock, initialise, run_block
from mim_scale.models.encoder import is_recomputed
from mim_scale.models.positions import position_table
from mim_scale.store.geometry import Size3


class Decoder(nn.Module):
    """Features of visible tokens -> features of all tokens -> voxels of any of them."""

    position_table: Tensor

    def __init__(
        self,
        config: DecoderConfig,
        encoder_width: int,
        grid: Size3,
        token: Size3,
        checkpointing: Checkpointing = "none",
    ) -> None:
        """Build for `grid` tokens a view, `token` voxels a token."""
        super().__init__()
        width = config.width
        self.checkpointing = checkpointing
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(
            TransformerBlock(width, config.heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, eps=TOKEN_EPS)
        self.to_voxels = nn.Linear(width, token[0] * token[1] * token[2])
        self.register_buffer("position_table", position_table(grid, width), persistent=False)
        initialise(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latents: Sequence[Tensor], visible: Sequence[Tensor], hidden: Sequence[Tensor]) -> list[Tensor]:
        """Features of all tokens of groups of views that differ in V and H, in one call; V + H is the same for all.

        Args:
            latents: For each group, the encoder's features of the visible tokens [B, V, C].
            visible, hidden: For each group, token indices [B, V] and [B, H], row-major (z, y, x).

        Returns:
            For each group [B, V + H, D], visible tokens first, in the orders given: so the hidden ones are one slice.
        """
        groups = zip(latents, visible, hidden, strict=True)
        tokens = torch.cat([self._fill(*group) for group in groups])
        for number, block in enumerate(self.blocks):
            tokens = run_block(block, tokens, recompute=is_recomputed(self.checkpointing, number, in_stem=False))
        return list(torch.split(self.norm(tokens), [len(latent) for latent in latents]))

    def _fill(self, latent: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Mask tokens at hidden places, and every token's place added."""
        shown = self.embed(latent)
        tokens = torch.cat([shown, self.mask_token.to(shown.dtype).expand(*hidden.shape, -1)], dim=1)
        return tokens + self.position_table[torch.cat([visible, hidden], dim=1)]

    def predict(self, features: Tensor) -> Tensor:
        """Features [..., D] -> each token's voxels [..., z*y*x], row-major."""
        result: Tensor = self.to_voxels(features)
        return result
