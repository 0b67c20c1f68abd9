"""Small networks, masks and batches for the model tests."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mim_scale.config import HybridConfig, PretrainConfig, Size3
from mim_scale.config_file import check_config, config_values
from mim_scale.sampling.plan import plan
from mim_scale.streaming.batch import Sample, collate
from mim_scale.streaming.device import TensorBatch, TensorLevel, to_device
from tests.training.standin import small_config


def model_config(*widths: int) -> HybridConfig:
    return HybridConfig(
        backbone="hybrid",
        widths=widths,
        blocks=(1,) * (len(widths) - 1),
        depth=1,
        heads=2,
        mlp_ratio=2,
    )


def changed(config: PretrainConfig, **sections: dict[str, Any]) -> PretrainConfig:
    """The config with some keys of some sections replaced."""
    values = config_values(config)
    for section, keys in sections.items():
        values[section] |= keys
    return check_config(PretrainConfig, values, "test")


def small_batch(config: PretrainConfig, samples: int, seed: int = 0) -> TensorBatch:
    """Smooth random blocks with true plans."""
    rng = np.random.default_rng(seed)
    drawn: list[Sample] = []
    for position in range(samples):
        block = rng.normal(0, 400, config.plan.box).cumsum(axis=0).clip(-1024, 3000).astype(np.int16)
        shape: Size3 = (64, 64, 64)
        drawn.append(Sample(position, f"volume{position}", block, plan(config.seed, position, shape, config.plan)))
    return to_device(collate(drawn), "cpu")


def one_sample(batch: TensorBatch, sample: int) -> TensorBatch:
    """The batch of one of its samples alone."""
    at = slice(sample, sample + 1)
    levels = tuple(
        TensorLevel(
            level.starts[at], level.parent, level.cell[at], level.tokens[at], level.num_visible[at], level.draws[at]
        )
        for level in batch.levels
    )
    return TensorBatch(batch.positions[at], batch.keys[at], batch.blocks[at], levels)


def random_masks(views: int, tokens: int, visible: int, seed: int) -> tuple[Tensor, Tensor]:
    """(visible, hidden) token indices, ascending."""
    order = torch.rand(views, tokens, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return order[:, :visible].sort(dim=1).values, order[:, visible:].sort(dim=1).values


__all__ = ["changed", "model_config", "one_sample", "random_masks", "small_batch", "small_config"]
