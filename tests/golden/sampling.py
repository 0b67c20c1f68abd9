"""The sampling contract in numbers: an order of 64 positions, and boxes and digests of plans."""

import hashlib

import numpy as np

from mim_scale.config import ForegroundConfig, PlanConfig
from mim_scale.sampling.order import volume_at
from mim_scale.sampling.plan import Plan, plan
from mim_scale.store.foreground import Foreground
from tests.synthetic import make_plan_config

CASES = {
    "octants_48": ((70, 50, 66), make_plan_config()),
    "octants_192": ((300, 512, 512), make_plan_config(box=192, view=96, token=16, views=(4, 4))),
    "flat_box": ((30, 200, 200), make_plan_config(box=(24, 48, 96), view=(12, 24, 48), token=(2, 4, 8))),
}

_SOUGHT = ForegroundConfig(box_share=0.5, tries=4, hidden_share=0.9)
FOREGROUND = {
    "octants_48": Foreground(np.arange(5 * 4 * 5).reshape(5, 4, 5) % 3 == 0, (16, 16, 16), (70, 50, 66)),
    "flat_box": Foreground(np.arange(8 * 7 * 13).reshape(8, 7, 13) % 400 < 150, (4, 32, 16), (30, 200, 200)),
}


def numbers() -> dict[str, object]:
    """Everything that must never change for one sampler version."""
    return {
        "order_7": [volume_at(position, 10, seed=7) for position in range(64)],
        "order_8": [volume_at(position, 10, seed=8) for position in range(64)],
        "order_7_held_out": [volume_at(position, 10, seed=7, held_out=True) for position in range(64)],
        "plans": {
            name: [
                _summary(plan(7, position, shape, config, held_out))
                for position in (0, 1, 10**12)
                for held_out in (False, True)
            ]
            for name, (shape, config) in CASES.items()
        },
        "plans_with_foreground": {
            name: [
                _summary(plan(7, position, found.shape, _sought(CASES[name][1]), held_out, found))
                for position in (0, 1, 10**12)
                for held_out in (False, True)
            ]
            for name, found in FOREGROUND.items()
        },
    }


def _sought(config: PlanConfig) -> PlanConfig:
    return config.model_copy(update={"foreground": _SOUGHT})


def _summary(planned: Plan) -> dict[str, object]:
    digest = hashlib.sha256()
    for level in planned.levels:
        for array in (level.starts, level.parent, level.cell, level.visible, level.hidden):
            digest.update(array.astype("<i4").tobytes())
    return {
        "start": list(planned.box.start),
        "cells": [level.cell.tolist() for level in planned.levels[1:]],
        "digest": digest.hexdigest()[:16],
    }
