"""A micro-batch without a store: to measure, to trace, to compare two ways of computing."""

import numpy as np
import torch

from mim_scale.config import PretrainConfig
from mim_scale.sampling.plan import plan
from mim_scale.streaming.batch import Sample, collate
from mim_scale.streaming.device import TensorBatch, to_device


def noise_batch(config: PretrainConfig, device: torch.device) -> TensorBatch:
    """A micro-batch of the config, the same each time: noise, and true plans."""
    draw = np.random.default_rng(0)
    samples = []
    for position in range(config.train.micro_batch):
        block = draw.integers(-1024, 1000, config.plan.box, dtype=np.int16)
        samples.append(Sample(position, "noise", block, plan(config.seed, position, config.plan.box, config.plan)))
    return to_device(collate(samples), device)
