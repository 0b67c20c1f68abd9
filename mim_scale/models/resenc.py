"""The residual encoder of nnU-Net's U-Nets, built by dynamic-network-architectures, with exact masks.

Weights have the names of `ResidualEncoderUNet.encoder`: `stem.*` and `stages.*`, without their second names there
(`...all_modules.*`). Stock ResEnc-L is features 32, 64, 128, 256, 320, 320 and blocks 1, 3, 4, 6, 6, 6.
Hidden positions are zeroed after every layer, at every stage's resolution, and no statistics see them. A token is one
position of the last stage, so every pooling window lies inside a token.
B views, L tokens of a view, V visible ones, C channels of the last stage.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mim_scale.config import Checkpointing, ResEncConfig
from mim_scale.models.encoder import Encoder, is_recomputed
from mim_scale.models.patches import gather_tokens, visible_grid
from mim_scale.store.geometry import Size3

KERNEL = 3
NORM_EPS = 1e-5


class Shown:
    """Which tokens the layers may see while one of them runs: [B, 1, gz, gy, gx], 1 or 0; None for all."""

    grid: Tensor | None = None

    @contextmanager
    def set(self, grid: Tensor | None) -> Iterator[None]:
        """For the duration of a layer's call."""
        self.grid = grid
        try:
            yield
        finally:
            self.grid = None


class MaskedInstanceNorm(nn.InstanceNorm3d):
    """Instance norm over the visible positions of maps [B, C, z, y, x]; hidden ones become 0."""

    def __init__(self, channels: int, shown: Shown, **keywords: Any) -> None:
        super().__init__(channels, **keywords)
        self.shown = shown

    def forward(self, maps: Tensor) -> Tensor:
        """Maps in and out, of the same type; computed in at least float32."""
        shown = self.shown.grid
        if shown is None:
            return super().forward(maps)
        assert self.weight is not None
        assert self.bias is not None
        split, mask = _by_token(maps, shown.shape[2:]), shown[:, :, :, None, :, None, :, None]
        with torch.autocast(maps.device.type, enabled=False):
            split = split.to(torch.promote_types(split.dtype, torch.float32))
            mask = mask.to(split.dtype)
            axes = (2, 3, 4, 5, 6, 7)
            positions = split.shape[3] * split.shape[5] * split.shape[7]
            count = mask.sum(dim=axes, keepdim=True) * positions
            mean = (split * mask).sum(dim=axes, keepdim=True) / count
            centred = (split - mean) * mask
            variance = centred.square().sum(dim=axes, keepdim=True) / count
            scale = self.weight.view(1, -1, *[1] * 6) * torch.rsqrt(variance + self.eps)
            normed = (centred * scale + self.bias.view(1, -1, *[1] * 6)) * mask
        return normed.reshape(maps.shape).to(maps.dtype)


class ResEncEncoder(Encoder):
    """Views [B, 1, Z, Y, X] with values in [0, 1] -> token features [B, V, C]."""

    def __init__(self, config: ResEncConfig, view: Size3, token: Size3, checkpointing: Checkpointing = "none") -> None:
        """Build for views and tokens of so many voxels; `checkpointing` names the blocks that trade time for memory."""
        super().__init__(view, token)
        self.checkpointing = checkpointing
        self.width = config.features[-1]
        self.shown = Shown()
        network = ResidualEncoder(
            input_channels=1,
            n_stages=len(config.features),
            features_per_stage=config.features,
            conv_op=nn.Conv3d,
            kernel_sizes=KERNEL,
            strides=[1] + [2] * (len(config.features) - 1),
            n_blocks_per_stage=config.blocks,
            conv_bias=True,
            norm_op=MaskedInstanceNorm,
            norm_op_kwargs={"shown": self.shown, "eps": NORM_EPS, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
        )
        network.apply(ResidualEncoderUNet.initialize)
        self.stem, self.stages = network.stem, network.stages
        for layer in self.modules():
            if isinstance(layer, ConvDropoutNormReLU):
                _forget_second_names(layer)

    def forward(self, views: Tensor, visible: Tensor | None = None) -> Tensor:
        """As every encoder's."""
        if visible is not None:
            return self.encode_groups([views], [visible])[0]
        return self.features(views)[-1].flatten(2).transpose(1, 2)

    def encode_groups(self, views: Sequence[Tensor], visible: Sequence[Tensor]) -> list[Tensor]:
        """`forward` for groups of views that differ in V, all in one call."""
        for group in views:
            self.check(group)
        shown = torch.cat([visible_grid(group, self.grid, views[0].dtype) for group in visible])[:, None]
        tokens = self._maps(torch.cat(list(views)), shown)[-1].flatten(2).transpose(1, 2)
        parts = torch.split(tokens, [len(group) for group in views])
        return [gather_tokens(part, group) for part, group in zip(parts, visible, strict=True)]

    def features(self, views: Tensor) -> list[Tensor]:
        """The maps that nnU-Net's decoder reads, one a stage: [B, features[i], Z / 2^i, Y / 2^i, X / 2^i]."""
        self.check(views)
        return self._maps(views, None)

    def _maps(self, views: Tensor, shown: Tensor | None) -> list[Tensor]:
        """Every stage's map, zeros where hidden."""
        if shown is not None:
            inside = _by_token(views, shown.shape[2:])
            # Chosen, not multiplied: what is hidden may be anything.
            is_shown = shown[:, :, :, None, :, None, :, None].bool()
            views = torch.where(is_shown, inside, torch.zeros((), dtype=views.dtype, device=views.device)).reshape(
                views.shape
            )
        rows = self._run(self.stem, views, shown, number=0)
        maps, number = [], 1
        for stage in self.stages:
            for block in stage.blocks:
                rows = self._run(block, rows, shown, number)
                number += 1
            maps.append(rows)
        return maps

    def _run(self, layer: nn.Module, rows: Tensor, shown: Tensor | None, number: int) -> Tensor:
        def run(rows: Tensor, shown: Tensor | None) -> Tensor:
            with self.shown.set(shown):
                result: Tensor = layer(rows)
            return result

        if is_recomputed(self.checkpointing, number, in_stem=True) and torch.is_grad_enabled():
            again: Any = checkpoint(run, rows, shown, use_reentrant=False, preserve_rng_state=False)
            result: Tensor = again
            return result
        return run(rows, shown)


class _InTurn:
    """Layers one after another, which their owner has already registered."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = list(layers)

    def __call__(self, rows: Any) -> Any:
        for layer in self.layers:
            rows = layer(rows)
        return rows


def _forget_second_names(layer: nn.Module) -> None:
    """Keep the library's layer as it is, but for the list that names its parts a second time.

    Twice named, a weight would be twice in every checkpoint, and ZeRO-3 would gather it twice.
    """
    layers = _InTurn(list(layer.all_modules))  # type: ignore[arg-type]
    del layer.all_modules
    layer.all_modules = layers  # type: ignore[assignment]


def _by_token(maps: Tensor, grid: Sequence[int]) -> Tensor:
    """Maps [B, C, Z, Y, X] -> [B, C, gz, z, gy, y, gx, x]."""
    batch, channels, size_z, size_y, size_x = maps.shape
    grid_z, grid_y, grid_x = grid
    return maps.reshape(batch, channels, grid_z, size_z // grid_z, grid_y, size_y // grid_y, grid_x, size_x // grid_x)
