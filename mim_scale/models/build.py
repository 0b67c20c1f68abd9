"""From a config to the backbone that it names."""

from mim_scale.config import Checkpointing, HybridConfig, ModelConfig
from mim_scale.models.encoder import Encoder
from mim_scale.store.geometry import Size3


def build_encoder(config: ModelConfig, view: Size3, token: Size3, checkpointing: Checkpointing = "none") -> Encoder:
    """The backbone for views and tokens of so many voxels; `checkpointing` names the blocks that trade time for memory."""
    match config:
        case HybridConfig():
            from mim_scale.models.hybrid import HybridEncoder

            return HybridEncoder(config, view, token, checkpointing)
        case _:
            raise NotImplementedError(config.backbone)
