"""Every setting, as frozen, typed trees."""

from mim_scale.config.methods import (
    DecoderConfig,
    MaeConfig,
    MaskInMaskConfig,
    MethodConfig,
    SimClrConfig,
    SimMimConfig,
)
from mim_scale.config.models import (
    HybridConfig,
    ModelConfig,
    PrimusConfig,
    ResEncConfig,
    SwinConfig,
    ViTConfig,
)
from mim_scale.config.parts import Checkpointing, Section, Size3
from mim_scale.config.plan import ForegroundConfig, LevelConfig, PlanConfig
from mim_scale.config.run import (
    BuildConfig,
    CheckpointConfig,
    DataConfig,
    GuardsConfig,
    HeldOutConfig,
    OptimizerConfig,
    PretrainConfig,
    TrackingConfig,
    TrainConfig,
)

__all__ = [
    "BuildConfig",
    "CheckpointConfig",
    "Checkpointing",
    "DataConfig",
    "DecoderConfig",
    "ForegroundConfig",
    "GuardsConfig",
    "HeldOutConfig",
    "HybridConfig",
    "LevelConfig",
    "MaeConfig",
    "MaskInMaskConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PlanConfig",
    "PretrainConfig",
    "PrimusConfig",
    "ResEncConfig",
    "Section",
    "SimClrConfig",
    "SimMimConfig",
    "Size3",
    "SwinConfig",
    "TrackingConfig",
    "TrainConfig",
    "ViTConfig",
]
