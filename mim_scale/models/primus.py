"""Primus of dynamic-network-architectures: Eva blocks with rotary positions on small tokens (2503.01835).

Weights have the names of the library's `Primus` and no prefix: `down_projection.*` and `eva.*`; its decoder
(`up_projection.*`) is not part of an encoder. Settings are those of nnU-Net's trainers: an inner norm in attention,
layer scale 0.1; but no drop-path, which would make a step depend on more than weights and sample.
Stock Primus-M is width 864, depth 16, heads 12 at token 8.
B views, L tokens of a view, V visible ones, C the width.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mim_scale.config import Checkpointing, PrimusConfig
from mim_scale.models.alike import run_alike
from mim_scale.models.blocks import BlockConv, run_block
from mim_scale.models.encoder import Encoder, is_recomputed
from mim_scale.models.patches import gather_tokens, patchify
from mim_scale.models.torchvision_stand_in import timm_importable
from mim_scale.store.geometry import Size3

with timm_importable():
    from dynamic_network_architectures.building_blocks.eva import Eva
    from dynamic_network_architectures.building_blocks.patch_encode_decode import PatchEmbed
    from dynamic_network_architectures.initialization.weight_init import InitWeights_He

LAYER_SCALE = 0.1
NEGATIVE_SLOPE = 1e-2


class VisibleEva(Eva):  # type: ignore[misc]
    """The library's transformer on some of a view's tokens, each with its own place."""

    def __init__(self, checkpointing: Checkpointing, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.checkpointing = checkpointing

    def forward(self, tokens: Tensor, visible: Tensor | None = None) -> Tensor:
        """Embedded tokens [B, V, C] standing at [B, V] -> features [B, V, C]; None for all L in row-major order."""
        places, rotation = self.pos_embed, self.rope.get_embed()
        if visible is not None:
            # One axis for the heads: the library's own dropping of tokens leaves it out and cannot broadcast.
            places, rotation = places[0][visible], rotation[visible][:, None]
        tokens = tokens + places
        for number, block in enumerate(self.blocks):
            recompute = is_recomputed(self.checkpointing, number, in_stem=False)
            tokens = run_block(block, tokens, rotation, recompute=recompute)
        result: Tensor = self.norm(tokens)
        return result


class PrimusEncoder(Encoder):
    """Views [B, 1, Z, Y, X] with values in [0, 1] -> token features [B, V, C]; hidden tokens are not computed."""

    def __init__(self, config: PrimusConfig, view: Size3, token: Size3, checkpointing: Checkpointing = "none") -> None:
        """Build for views and tokens of so many voxels; `checkpointing` names the blocks that trade time for memory."""
        super().__init__(view, token)
        self.width = config.width
        self.down_projection = PatchEmbed(token, 1, config.width)
        # The same weights under the same name, as a matrix product over any tokens.
        self.down_projection.proj = BlockConv(1, config.width, token)
        self.down_projection.apply(InitWeights_He(NEGATIVE_SLOPE))
        self.eva = VisibleEva(
            checkpointing,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.heads,
            ref_feat_shape=self.grid,
            init_values=LAYER_SCALE,
            scale_attn_inner=True,
        )

    def forward(self, views: Tensor, visible: Tensor | None = None) -> Tensor:
        """As every encoder's."""
        if visible is not None:
            return self.encode_groups([views], [visible])[0]
        self.check(views)
        result: Tensor = self.eva(self.down_projection(patchify(views, self.token)))
        return result

    def encode_groups(self, views: Sequence[Tensor], visible: Sequence[Tensor]) -> list[Tensor]:
        """`forward` for groups of views that differ in V; those of equal V run side by side."""
        tokens = []
        for group, shown in zip(views, visible, strict=True):
            self.check(group)
            tokens.append(self.down_projection(gather_tokens(patchify(group, self.token), shown)))
        return run_alike(self.eva, tokens, visible)

    def features(self, views: Tensor) -> list[Tensor]:
        """The one map [B, C, gz, gy, gx] that Primus's own decoder reads."""
        return [self(views).transpose(1, 2).reshape(len(views), self.width, *self.grid)]
