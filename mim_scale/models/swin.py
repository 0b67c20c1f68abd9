"""MONAI's Swin transformer: windows of attention on patches, in four stages, each of which halves the grid.

Weights have the names that they have in MONAI's SwinUNETR: `swinViT.*`. A token is one position of the last stage, so
it is many patches; what is hidden is hidden patch by patch, at the embedding.
B views, L tokens of a view, H hidden ones, E channels of the embedding, C = 16 E features.
"""

from typing import Any

import numpy as np
import torch
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mim_scale.config import Checkpointing, SwinConfig
from mim_scale.errors import ConfigError
from mim_scale.models.encoder import Encoder, is_recomputed
from mim_scale.models.patches import visible_grid
from mim_scale.store.geometry import Size3


class SwinEncoder(Encoder):
    """Views [B, 1, Z, Y, X] with values in [0, 1] -> features of all tokens [B, L, C]."""

    def __init__(self, config: SwinConfig, view: Size3, token: Size3, checkpointing: Checkpointing = "none") -> None:
        """Build for views and tokens of so many voxels; `checkpointing` names the blocks that trade time for memory."""
        super().__init__(view, token)
        self.patch = config.patch
        self.mask_width = config.width
        with _PlainRates():
            self.swinViT = SwinTransformer(
                in_chans=1,
                embed_dim=config.width,
                window_size=(config.window,) * 3,
                patch_size=(config.patch,) * 3,
                depths=config.depths,
                num_heads=config.heads,
            )
        self.width = 2 * self.swinViT.num_features
        stages = self.swinViT.layers1, self.swinViT.layers2, self.swinViT.layers3, self.swinViT.layers4
        self._stages = [stage[0] for stage in stages]
        for number, block in enumerate(block for stage in self._stages for block in stage.blocks):
            # The library's own, which is the non-reentrant kind.
            block.use_checkpoint = is_recomputed(checkpointing, number, in_stem=False)
            # A fixed table, which follows from the window and belongs in no checkpoint.
            table = block.attn.relative_position_index
            del block.attn.relative_position_index
            block.attn.register_buffer("relative_position_index", table, persistent=False)

    def forward(self, views: Tensor, visible: Tensor | None = None) -> Tensor:
        """As every encoder's, with nothing hidden."""
        if visible is not None:
            raise ConfigError("backbone swin cannot drop hidden tokens: its windows need every patch; fill them")
        return self._tokens(self._embedded(views))

    def encode_filled(self, views: Tensor, hidden: Tensor, mask_token: Tensor) -> Tensor:
        """As every encoder's; the mask token stands in place of each patch of a hidden token."""
        embedded = self._embedded(views)
        is_hidden = visible_grid(hidden, self.grid, embedded.dtype).bool()[:, None]
        for axis, size in enumerate(self.token, start=2):
            is_hidden = is_hidden.repeat_interleave(size // self.patch, dim=axis)
        filled = mask_token.to(embedded.dtype).view(1, -1, 1, 1, 1)
        return self._tokens(torch.where(is_hidden, filled, embedded))

    def features(self, views: Tensor) -> list[Tensor]:
        """The five maps that SwinUNETR reads: of the embedding [B, E, ...], then of each stage, normalised."""
        return self._maps(self._embedded(views))

    def _embedded(self, views: Tensor) -> Tensor:
        """The patches [B, E, z, y, x]."""
        self.check(views)
        result: Tensor = self.swinViT.patch_embed(views)
        return result

    def _maps(self, embedded: Tensor) -> list[Tensor]:
        maps = [embedded]
        for stage in self._stages:
            maps.append(stage(maps[-1].contiguous()))
        return [self.swinViT.proj_out(rows, normalize=True) for rows in maps]

    def _tokens(self, embedded: Tensor) -> Tensor:
        return self._maps(embedded)[-1].flatten(2).transpose(1, 2)


class _PlainRates(TorchFunctionMode):
    """The library reads its drop-path rates back from a tensor, which one that is a shape only does not have."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Numbers of numpy in place of torch's."""
        return np.linspace(*args) if func is torch.linspace else func(*args, **(kwargs or {}))
