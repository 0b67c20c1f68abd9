"""Every shipped method and backbone at its smallest, in any pair that the config allows."""

from typing import Any

from mim_scale.config import PretrainConfig
from mim_scale.config_file import check_config, config_values
from tests.training.standin import small_config

DECODER = {"width": 24, "depth": 1, "heads": 2, "mlp_ratio": 2}
METHODS: dict[str, dict[str, Any]] = {
    "mask_in_mask": {
        "decoder": DECODER,
        "normalise_targets": False,
        "level_weights": [1.0, 1.0, 1.0],
        "alignment": "infonce",
        "alignment_weights": [0.01, 0.01],
        "temperature": 0.2,
    },
    "mae": {"decoder": DECODER, "normalise_targets": False, "error": "l1"},
    "simmim": {"normalise_targets": False, "error": "l1"},
    "simclr": {"projection": 16, "temperature": 0.5, "group": 2},
}
BACKBONES: dict[str, dict[str, Any]] = {
    "hybrid": {"widths": [12, 24], "blocks": [1], "depth": 1, "heads": 2, "mlp_ratio": 2},
    "vit": {"width": 24, "depth": 2, "heads": 2, "mlp_ratio": 2},
    "primus": {"width": 48, "depth": 2, "heads": 2},
    "resenc": {"features": [8, 16, 24], "blocks": [1, 1, 1]},
    "swin": {"width": 12, "depths": [1, 1, 1, 1], "heads": [1, 2, 2, 4], "window": 2, "patch": 2},
}
LEVELS: dict[str, list[dict[str, Any]]] = {
    "mask_in_mask": [
        {"hidden_ratio": 0.5, "cells": 2},
        {"hidden_ratio": 0.6, "views": 2},
        {"hidden_ratio": 0.5, "views": 1},
    ],
    "mae": [{"hidden_ratio": 0.75, "views": 2}],
    "simmim": [{"hidden_ratio": 0.5, "views": 2}],
    "simclr": [{"hidden_ratio": 0.0, "views": 2}],
}


def plan_values(method: str, backbone: str) -> dict[str, Any]:
    """A plan that suits both."""
    about = {"levels": LEVELS[method], "augment": method == "simclr"}
    if backbone == "swin":
        # Two tokens: its stages halve a grid of patches four times.
        return {"box": [24, 24, 48], "crop": [16, 16, 32], "view": [32, 32, 64], "token": 32, **about}
    if method == "mask_in_mask":
        return {"box": 32, "view": 16, "token": 4, **about}
    return {"box": 24, "crop": 16, "view": 16, "token": 4, **about}


def method_config(method: str, backbone: str = "hybrid", /, **sections: dict[str, Any]) -> PretrainConfig:
    """A run of the pair that takes moments a step; `sections` replace keys."""
    values = config_values(small_config())
    values["method"] = {"name": method, **METHODS[method]}
    values["model"] = {"backbone": backbone, **BACKBONES[backbone]}
    values["plan"] = plan_values(method, backbone)
    values["train"] |= {"micro_batch": 2}
    values["held_out"] |= {"samples": 4}
    for section, keys in sections.items():
        values[section] |= keys
    return check_config(PretrainConfig, values, f"{method} on {backbone}")
