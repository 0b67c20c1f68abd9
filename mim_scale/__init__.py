"""mim-scale: your own archive of CT in, pre-trained 3D network weights out."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing mim_scale alone must not load torch.
    if name == "load_encoder":
        from mim_scale.transfer.export import load_encoder

        return load_encoder
    raise AttributeError(f"module 'mim_scale' has no attribute {name!r}")
