"""From a config to the backbone that it names."""

from mim_scale.config import (
    Checkpointing,
    HybridConfig,
    ModelConfig,
    PrimusConfig,
    ResEncConfig,
    SwinConfig,
    ViTConfig,
)
from mim_scale.models.encoder import Encoder
from mim_scale.store.geometry import Size3


def build_encoder(config: ModelConfig, view: Size3, token: Size3, checkpointing: Checkpointing = "none") -> Encoder:
    """The backbone for views and tokens of so many voxels; `checkpointing` says which blocks trade time for memory."""
    match config:
        case HybridConfig():
            from mim_scale.models.hybrid import HybridEncoder

            return HybridEncoder(config, view, token, checkpointing)
        case ViTConfig():
            from mim_scale.models.vit import ViTEncoder

            return ViTEncoder(config, view, token, checkpointing)
        case PrimusConfig():
            from mim_scale.models.primus import PrimusEncoder

            return PrimusEncoder(config, view, token, checkpointing)
        case ResEncConfig():
            from mim_scale.models.resenc import ResEncEncoder

            return ResEncEncoder(config, view, token, checkpointing)
        case SwinConfig():
            from mim_scale.models.swin import SwinEncoder

            return SwinEncoder(config, view, token, checkpointing)
