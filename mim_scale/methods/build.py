"""From a config to the method that it names."""

from torch import nn

from mim_scale.config import MaeConfig, MaskInMaskConfig, PretrainConfig
from mim_scale.methods.mae import Mae
from mim_scale.methods.mask_in_mask import MaskInMask


def build_method(config: PretrainConfig) -> nn.Module:
    """The method's module on the CPU, with weights that depend on the config alone; it offers what `Method` says."""
    policy = config.train.activation_checkpointing
    match config.method:
        case MaskInMaskConfig():
            return MaskInMask(config, config.method, policy)
        case MaeConfig():
            return Mae(config, config.method, policy)
        case _:
            raise NotImplementedError(config.method.name)
