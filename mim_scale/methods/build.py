"""From a config to the method that it names."""

from torch import nn

from mim_scale.config import Checkpointing, MaeConfig, MaskInMaskConfig, PretrainConfig, SimClrConfig, SimMimConfig
from mim_scale.methods.mae import Mae
from mim_scale.methods.mask_in_mask import MaskInMask
from mim_scale.methods.simclr import SimClr
from mim_scale.methods.simmim import SimMim


def build_method(config: PretrainConfig, checkpointing: Checkpointing | None = None) -> nn.Module:
    """The method's module on the CPU, with weights that depend on the config alone; it offers what `Method` says.

    Args:
        checkpointing: Which blocks compute again in the backward pass; None for what the config says, `auto` being the
            thriftiest where nobody has chosen (`choose_policy`).
    """
    policy = checkpointing or config.train.activation_checkpointing
    policy = "all" if policy == "auto" else policy
    match config.method:
        case MaskInMaskConfig():
            return MaskInMask(config, config.method, policy)
        case MaeConfig():
            return Mae(config, config.method, policy)
        case SimMimConfig():
            return SimMim(config, config.method, policy)
        case SimClrConfig():
            return SimClr(config, config.method, policy)
