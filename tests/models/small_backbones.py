"""Tiny encoders of every library backbone, and plain ways of computing what they should give."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor, nn

from mim_scale.config import Checkpointing, ModelConfig, Size3
from mim_scale.models.build import build_encoder
from mim_scale.models.encoder import Encoder
from mim_scale.models.torchvision_stand_in import timm_importable
from tests.models.small import random_masks

SIZES: dict[str, tuple[dict[str, Any], Size3, Size3]] = {
    "vit": ({"width": 24, "depth": 3, "heads": 2, "mlp_ratio": 2}, (16, 8, 12), (4, 4, 4)),
    "primus": ({"width": 24, "depth": 3, "heads": 2}, (16, 8, 12), (4, 4, 4)),
    # Two stages of equal width: the skip of one of them is a pool alone.
    "resenc": ({"features": [8, 12, 12], "blocks": [1, 2, 1]}, (16, 8, 12), (4, 4, 4)),
    # A window that does not divide the grid: shifted, padded and masked.
    "swin": (
        {"width": 12, "depths": [2, 1, 1, 1], "heads": [1, 2, 2, 4], "window": 3, "patch": 1},
        (32, 32, 16),
        (16, 16, 16),
    ),
}
"""Sections, views and tokens; axes differ in length."""


def model_section(backbone: str, **keys: Any) -> ModelConfig:
    return TypeAdapter[ModelConfig](ModelConfig).validate_python({"backbone": backbone, **SIZES[backbone][0], **keys})


def small_encoder(backbone: str, checkpointing: Checkpointing = "none", seed: int = 0) -> Encoder:
    """In float64, no weight at a special value: some are initialised to what hides other parts."""
    torch.manual_seed(seed)
    encoder = build_encoder(model_section(backbone), *SIZES[backbone][1:], checkpointing)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return encoder.double()


def views_of(backbone: str, count: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, *SIZES[backbone][1], generator=generator, dtype=torch.float64)


def masks_of(encoder: Encoder, views: int, visible: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """(visible, hidden), each in no particular order."""
    shown, hidden = random_masks(views, encoder.grid[0] * encoder.grid[1] * encoder.grid[2], visible, seed)
    return shown.flip(1), hidden


def voxels_of(encoder: Encoder, tokens: Tensor) -> Tensor:
    """[B, 1, Z, Y, X], True in the voxels of tokens [B, any]; one token after the other."""
    inside = torch.zeros(len(tokens), 1, *encoder.view, dtype=torch.bool)
    for view, row in enumerate(tokens.tolist()):
        for number in row:
            z, rest = divmod(number, encoder.grid[1] * encoder.grid[2])
            y, x = divmod(rest, encoder.grid[2])
            corner = [place * size for place, size in zip((z, y, x), encoder.token, strict=True)]
            index = tuple(slice(start, start + size) for start, size in zip(corner, encoder.token, strict=True))
            inside[(view, 0, *index)] = True
    return inside


def vit_by_torch(encoder: Any, views: Tensor, visible: Tensor, hidden: Tensor | None, mask_token: Tensor) -> Tensor:
    """A ViT's features of `visible` by torch's own transformer, mask tokens at `hidden`."""
    embedded = F.conv3d(views, encoder.embed.weight, encoder.embed.bias, stride=encoder.token).flatten(2).mT
    if hidden is not None:
        for view, row in enumerate(hidden):
            embedded[view, row] = mask_token
    tokens = embedded + encoder.positions.table
    tokens = torch.stack([tokens[view, row] for view, row in enumerate(visible)])
    for block in encoder.blocks:
        width, heads = encoder.width, block.attention.heads
        hidden_width = block.mlp.fc1.out_features
        layer = nn.TransformerEncoderLayer(
            width, heads, hidden_width, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True, dtype=torch.float64
        )
        ours, theirs = block.state_dict(), {}
        for name in layer.state_dict():
            path = name.replace("self_attn.in_proj_", "attention.qkv.").replace("self_attn.out_proj", "attention.proj")
            theirs[name] = ours[path.replace("linear", "mlp.fc")]
        layer.load_state_dict(theirs)
        tokens = layer.train()(tokens)
    return F.layer_norm(tokens, (encoder.width,), encoder.norm.weight, encoder.norm.bias, 1e-6)


def resenc_by_hand(encoder: Any, view: Tensor, shown: Tensor) -> list[Tensor]:
    """Every stage's map [C, z, y, x] of one view [1, Z, Y, X], its visible voxels [Z, Y, X], position by position."""

    def at(size: torch.Size) -> Tensor:
        step = [a // b for a, b in zip(shown.shape, size, strict=True)]
        return shown[:: step[0], :: step[1], :: step[2]]

    def layer(part: Any, maps: Tensor, activate: bool) -> Tensor:
        conv, norm = part.conv, part.norm
        out = F.conv3d(maps[None], conv.weight, conv.bias, stride=conv.stride, padding=conv.padding)[0]
        mask, result = at(out.shape[1:]), torch.zeros_like(out)
        for channel in range(len(out)):
            seen = out[channel][mask]
            normed = (seen - seen.mean()) / (seen.var(correction=0) + 1e-5).sqrt()
            result[channel][mask] = normed * norm.weight[channel] + norm.bias[channel]
        return F.leaky_relu(result, 0.01) if activate else result

    rows, maps = layer(encoder.stem.convs[0], torch.where(shown, view, 0.0), True), []
    for stage in encoder.stages:
        for block in stage.blocks:
            skip: Any = block.skip if isinstance(block.skip, nn.Sequential) else []
            residual = rows
            for part in skip:
                residual = F.avg_pool3d(residual, 2) if isinstance(part, nn.AvgPool3d) else layer(part, residual, False)
            out = layer(block.conv2, layer(block.conv1, rows, True), False)
            rows = F.leaky_relu(out + residual, 0.01)
        maps.append(rows)
    return maps


def called_modules(encoder: Encoder, run: Callable[[], object]) -> set[str]:
    """Names of the modules that `run` calls."""
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name, module in encoder.named_modules()
    ]
    run()
    for handle in handles:
        handle.remove()
    return called


def stock_primus(width: int, depth: int, heads: int, view: Any, token: Any) -> nn.Module:
    """As nnU-Net's trainers build it, but for drop-path."""
    with timm_importable():
        from dynamic_network_architectures.architectures.primus import Primus
    primus: nn.Module = Primus(1, width, token, 2, depth, heads, view, scale_attn_inner=True, init_values=0.1)
    return primus


def stock_resenc(features: list[int], blocks: list[int]) -> nn.Module:
    """As nnU-Net's plans have it."""
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    stages = len(features)
    network: nn.Module = ResidualEncoderUNet(
        input_channels=1,
        n_stages=stages,
        features_per_stage=features,
        conv_op=nn.Conv3d,
        kernel_sizes=[[3, 3, 3]] * stages,
        strides=[[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
        n_blocks_per_stage=blocks,
        num_classes=2,
        n_conv_per_stage_decoder=[1] * (stages - 1),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )
    return network


def stock_swin() -> nn.Module:
    from monai.networks.nets import SwinUNETR

    section = SIZES["swin"][0]
    network: nn.Module = SwinUNETR(
        in_channels=1,
        out_channels=2,
        patch_size=section["patch"],
        depths=section["depths"],
        num_heads=section["heads"],
        window_size=section["window"],
        feature_size=section["width"],
    )
    return network
