"""Names of the public MiM release's parameters, and ours: one to one, so that weights can go either way.

Shapes are equal under both names. The release also stores its two fixed position tables; ours are computed, so they
have no partner.
"""

from collections.abc import Iterator

from mim_scale.config import HybridConfig, MaskInMaskConfig, PretrainConfig

CHILD_SIDE = {"1_2": "aggregate_mid", "2_3": "aggregate_down"}
PARENT_SIDE = {"1_2": "aggregate_pred_up_feature", "2_3": "aggregate_pred_mid_feature"}
RELEASED_TABLES = ("pos_embed", "decoder_pos_embed")
"""In the release's checkpoints, computed here."""


def released_names(config: PretrainConfig) -> dict[str, str]:
    """Our parameter name -> the release's, for every parameter of the method that the config describes.

    Alignment beyond three levels has no name in the release and is left out.
    """
    names = dict(_layers(config))
    leaves = {f"{ours}.{leaf}": f"{released}.{leaf}" for ours, released in names.items() for leaf in ("weight", "bias")}
    return leaves | {"decoder.mask_token": "mask_token"}


def _layers(config: PretrainConfig) -> Iterator[tuple[str, str]]:
    model, method = config.model, config.method
    assert isinstance(model, HybridConfig)
    assert isinstance(method, MaskInMaskConfig)
    for number in range(len(model.widths)):
        yield f"encoder.embeds.{number}.conv", f"patch_embed{number + 1}.proj"
        yield f"encoder.embeds.{number}.norm", f"patch_embed{number + 1}.norm"
    yield "encoder.token_embed", f"patch_embed{len(model.widths) + 1}"
    for number, count in enumerate(model.blocks):
        yield f"encoder.fusions.{number}", f"stage{number + 1}_output_decode"
        for block in range(count):
            ours, released = f"encoder.stages.{number}.{block}", f"blocks{number + 1}.{block}"
            for layer in ("norm1", "conv1", "conv2", "norm2"):
                yield f"{ours}.{layer}", f"{released}.{layer}"
            yield f"{ours}.depthwise", f"{released}.attn"
            yield f"{ours}.fc1", f"{released}.mlp.fc1"
            yield f"{ours}.fc2", f"{released}.mlp.fc2"
    for block in range(model.depth):
        yield from _transformer_block(f"encoder.blocks.{block}", f"blocks{len(model.widths)}.{block}")
    yield "encoder.norm", "norm"
    yield "decoder.embed", "decoder_embed"
    for block in range(method.decoder.depth):
        yield from _transformer_block(f"decoder.blocks.{block}", f"decoder_blocks.{block}")
    yield "decoder.norm", "decoder_norm"
    yield "decoder.to_voxels", "decoder_pred"
    if method.alignment == "none":
        return
    for pair, weight in zip(CHILD_SIDE, method.alignment_weights, strict=False):
        sides = [("child", CHILD_SIDE)] + ([("parent", PARENT_SIDE)] if method.alignment == "infonce" else [])
        for side, names in sides if weight else []:
            yield f"alignment.{pair}.{side}.fc1", f"{names[pair]}.fc1"
            yield f"alignment.{pair}.{side}.fc2", f"{names[pair]}.fc2"


def _transformer_block(ours: str, released: str) -> Iterator[tuple[str, str]]:
    for layer in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
        yield f"{ours}.{layer}", f"{released}.{layer}"
    yield f"{ours}.attention.qkv", f"{released}.attn.qkv"
    yield f"{ours}.attention.proj", f"{released}.attn.proj"
