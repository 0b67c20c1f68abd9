"""A small module with the interface of a method, so that engines and loops are tested without a real network."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mim_scale.config import PretrainConfig
from mim_scale.config_file import check_config
from mim_scale.training.engine import Engine


@dataclass(frozen=True)
class Numbers:
    """A batch: inputs [N, 7] and targets [N, 3]."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class StandInLosses:
    """The same two fields that a method's losses have."""

    total: Tensor
    parts: dict[str, Tensor]


class Shift(nn.Module):
    """Adds a token that is no bias and a table that is never trained."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 257) * 0.02)
        self.register_buffer("table", torch.linspace(0, 1, 257))

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(hidden + self.token[0]) + self.table


class StandIn(nn.Module):
    """Two layers of odd width with a shift between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 257)
        self.shift = Shift()
        self.second = nn.Linear(257, 3)

    def forward(self, batch: Numbers) -> StandInLosses:
        error = (self.second(self.shift(self.first(batch.inputs))).float() - batch.targets) ** 2
        parts = {"level_1": error[:, 0].mean(), "level_2": error[:, 1:].mean()}
        return StandInLosses(parts["level_1"] + parts["level_2"], parts)


def whole_state(engine: Engine) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of an engine's weights and moments, on every rank."""
    found: dict[str, dict[str, Tensor]] = {"weights": {}, "moments": {}}
    for kind, name, tensor in engine.state():
        found[kind][name] = tensor.detach().to("cpu", torch.float32, copy=True)
    return found["weights"], found["moments"]


def standin_batch(positions: range) -> Numbers:
    """The batch of these positions; a position gives the same numbers on every rank."""
    rows = [torch.randn(10, generator=torch.Generator().manual_seed(1000 + position)) for position in positions]
    values = torch.stack(rows)
    return Numbers(values[:, :7], values[:, 7:])


def small_config(store: str = "store", output: str = "run", **train: object) -> PretrainConfig:
    """A run of the real method that takes a second a step on one thread; `train` overrides its section."""
    values = {
        "method": {
            "name": "mask_in_mask",
            "decoder": {"width": 24, "depth": 1, "heads": 2, "mlp_ratio": 2},
            "normalise_targets": True,
            "level_weights": [1.0, 1.0, 1.0],
            "alignment": "infonce",
            "alignment_weights": [0.1, 0.1],
            "temperature": 0.1,
        },
        "output": output,
        "seed": 3,
        "data": {"store": store, "window_hu": [-1000, 1000], "held_out_subjects": 1, "workers": 1},
        "plan": {
            "box": 32,
            "view": 16,
            "token": 4,
            "levels": [
                {"hidden_ratio": 0.5, "cells": 2, "views": 1},
                {"hidden_ratio": 0.6, "views": 2},
                {"hidden_ratio": 0.5, "views": 2},
            ],
        },
        "model": {
            "backbone": "hybrid",
            "widths": [12, 24],
            "blocks": [1],
            "depth": 1,
            "heads": 2,
            "mlp_ratio": 2,
        },
        "optimizer": {
            "learning_rate": 1e-3,
            "learning_rate_batch": 4,
            "warmup_steps": 2,
            "final_learning_rate": 0.0,
            "betas": [0.9, 0.95],
            "weight_decay": 0.05,
            "clip_norm": 1.0,
        },
        "train": {"steps": 6, "batch": 4, "micro_batch": 1, "precision": "fp32", **train},
        "checkpoint": {"every": 2, "keep": 2},
        "held_out": {"every": 3, "samples": 3},
        "tracking": {"mlflow": None},
    }
    return check_config(PretrainConfig, values, "standin")
