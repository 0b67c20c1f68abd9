"""The hybrid encoder: convolution stages that halve the grid, then a transformer on visible tokens (method: 2.1).

With a mask, the stages run on visible tokens only, packed side by side; hidden positions are not computed. Without one
they run on the whole grid.
B views, Z Y X voxels of a view, L tokens of it, V visible ones, T those of all views, C the transformer's width.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from mim_scale.config import Checkpointing, HybridConfig
from mim_scale.models.alike import run_alike
from mim_scale.models.blocks import (
    TOKEN_EPS,
    BlockConv,
    MaskedConvBlock,
    PatchEmbed,
    TransformerBlock,
    initialise,
    run_block,
)
from mim_scale.models.encoder import Encoder, is_recomputed
from mim_scale.models.packed import standing
from mim_scale.models.patches import gather_tokens, patchify, split_blocks, visible_grid
from mim_scale.models.positions import position_table
from mim_scale.store.geometry import Size3


class HybridEncoder(Encoder):
    """Views [B, 1, Z, Y, X] with values in [0, 1] -> token features [B, V, C].

    Features of visible tokens depend on voxels of visible tokens only. `position_table` is fixed and in no checkpoint.
    """

    position_table: Tensor

    def __init__(self, config: HybridConfig, view: Size3, token: Size3, checkpointing: Checkpointing = "none") -> None:
        """Build for views and tokens of so many voxels; `checkpointing` names the blocks that trade time for memory."""
        super().__init__(view, token)
        self.checkpointing = checkpointing
        *stage_widths, width = config.widths
        self.width = width
        self.embeds = nn.ModuleList(
            PatchEmbed(before, after) for before, after in zip((1, *stage_widths), config.widths, strict=True)
        )
        self.stages = nn.ModuleList(
            nn.ModuleList(MaskedConvBlock(channels, config.mlp_ratio) for _ in range(count))
            for channels, count in zip(stage_widths, config.blocks, strict=True)
        )
        self.footprints = [_footprint(token, 2 ** (stage + 1)) for stage in range(len(stage_widths))]
        self.token_embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, config.heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.fusions = nn.ModuleList(
            BlockConv(channels, width, block) for channels, block in zip(stage_widths, self.footprints, strict=True)
        )
        self.norm = nn.LayerNorm(width, eps=TOKEN_EPS)
        self.register_buffer("position_table", position_table(self.grid, width), persistent=False)
        initialise(self)

    def forward(self, views: Tensor, visible: Tensor | None = None) -> Tensor:
        """As every encoder's."""
        if visible is not None:
            return self.encode_groups([views], [visible])[0]
        return self.on_whole_grids(views)

    def on_whole_grids(self, views: Tensor, visible: Tensor | None = None) -> Tensor:
        """`forward` with every position computed; with a mask, the reference that packed tokens must equal."""
        *stages, embedded = self.stage_rows(views, visible)
        return self._tokens(stages, embedded, visible)

    def encode_groups(self, views: Sequence[Tensor], visible: Sequence[Tensor]) -> list[Tensor]:
        """`forward` for groups of views that differ in V, in as few and large calls as that allows.

        Not a call of the module, so the encoder must own no parameter itself: ZeRO-3 gathers those at a call.
        """
        shapes = [group.shape for group in visible]
        rows = torch.cat([self._packed(*group) for group in zip(views, visible, strict=True)])
        tokens, num_views = self._packed_tokens(visible)
        fused = rows.new_zeros(len(rows), self.token_embed.out_features)
        for number, embed in enumerate(self.embeds):
            rows = embed(rows)
            if number < len(self.stages):
                where = standing(tokens, num_views, self.grid, rows.shape[1], MaskedConvBlock.KERNEL // 2)
                for count, block in enumerate(self._stage_blocks(number)):
                    rows = run_block(block, rows, None, where, recompute=self._recomputed(count, in_stem=True))
                fused = fused + self.fusions[number](rows.flatten(1))
        embedded = self.token_embed(rows.flatten(1))
        groups = zip(_split(embedded, shapes), _split(fused, shapes), visible, strict=True)
        placed = [(part + self.position_table[shown], added) for part, added, shown in groups]
        transformed = run_alike(self._transformed, [part for part, _ in placed])
        return [self.norm(part + added) for part, (_, added) in zip(transformed, placed, strict=True)]

    def features(self, views: Tensor) -> list[Tensor]:
        """What a segmentation head reads, nothing hidden: each convolution stage's map, then the token features.

        Returns:
            Channels-first maps, finest first: [B, widths[i], Z / 2^(i+1), Y / 2^(i+1), X / 2^(i+1)].
        """
        *stages, embedded = self.stage_rows(views, None)
        tokens = self._tokens(stages, embedded, None).view(len(views), *self.grid, -1)
        return [rows.movedim(-1, 1) for rows in (*stages, tokens)]

    def stage_rows(self, views: Tensor, visible: Tensor | None) -> list[Tensor]:
        """Rows [B, z, y, x, widths[i]] after each convolution stage, then of the last embedding, on the token grid."""
        self.check(views)
        shown = None if visible is None else visible_grid(visible, self.grid, views.dtype)
        rows = views.movedim(1, -1)
        result = []
        for number, embed in enumerate(self.embeds):
            rows = embed(rows)
            for count, block in enumerate(self._stage_blocks(number)):
                rows = run_block(block, rows, shown, recompute=self._recomputed(count, in_stem=True))
            result.append(rows)
        return result

    def transform(self, embedded: Tensor, visible: Tensor | None) -> Tensor:
        """The last embedding's rows [B, gz, gy, gx, C] -> transformer output [B, V, C], before fusion and norm."""
        tokens: Tensor = self.token_embed(embedded.flatten(1, 3)) + self.position_table
        if visible is not None:
            tokens = gather_tokens(tokens, visible)
        return self._transformed(tokens)

    def fuse(self, stage: int, rows: Tensor, visible: Tensor | None) -> Tensor:
        """What a stage's rows [B, z, y, x, C'] add to visible tokens [B, V, C]: a linear map of a token's footprint."""
        blocks = split_blocks(rows, self.footprints[stage]).flatten(1, 3)
        if visible is not None:
            blocks = gather_tokens(blocks, visible)
        result: Tensor = self.fusions[stage](blocks)
        return result

    def _tokens(self, stages: list[Tensor], embedded: Tensor, visible: Tensor | None) -> Tensor:
        tokens = self.transform(embedded, visible)
        for stage, rows in enumerate(stages):
            tokens = tokens + self.fuse(stage, rows, visible)
        result: Tensor = self.norm(tokens)
        return result

    def _packed(self, views: Tensor, visible: Tensor) -> Tensor:
        """The voxels of visible tokens [B * V, z, y, x, 1]."""
        self.check(views)
        return gather_tokens(patchify(views, self.token), visible).view(-1, *self.token, 1)

    def _packed_tokens(self, visible: Sequence[Tensor]) -> tuple[Tensor, int]:
        """(token numbers counted through all views [T], views)."""
        num_tokens, views, numbers = math.prod(self.grid), 0, []
        for group in visible:
            of_view = torch.arange(views, views + len(group), device=group.device) * num_tokens
            numbers.append((group + of_view[:, None]).flatten())
            views += len(group)
        return torch.cat(numbers), views

    def _transformed(self, tokens: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            tokens = run_block(block, tokens, recompute=self._recomputed(number))
        return tokens

    def _recomputed(self, number: int, in_stem: bool = False) -> bool:
        return is_recomputed(self.checkpointing, number, in_stem)

    def _stage_blocks(self, number: int) -> Iterable[nn.Module]:
        if number == len(self.stages):
            return ()
        stage = self.stages[number]
        assert isinstance(stage, nn.ModuleList)
        return stage


def _footprint(token: Size3, stride: int) -> Size3:
    return (token[0] // stride, token[1] // stride, token[2] // stride)


def _split(rows: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Rows [T, C] of groups packed one after another -> [B, V, C] each."""
    parts = torch.split(rows, [math.prod(shape) for shape in shapes])
    return [part.view(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]
