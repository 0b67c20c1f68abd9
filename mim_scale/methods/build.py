"""From a config to the method that it names."""

from mim_scale.config import PretrainConfig
from mim_scale.methods.mask_in_mask import MaskInMask


def build_method(config: PretrainConfig) -> MaskInMask:
    """The method's module on the CPU, with weights that depend on the config alone.

    Every method offers forward(batch) -> Losses, trivial(batch) and preview(batch).
    """
    match config.method:
        case "mask_in_mask":
            return MaskInMask(config)
