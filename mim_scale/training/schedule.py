"""Rates as pure functions of the step: nothing to save, nothing to restore."""

import math

from mim_scale.config import OptimizerConfig, TrainConfig


def learning_rate(step: int, optimizer: OptimizerConfig, train: TrainConfig) -> float:
    """The learning rate of the update that step `step` makes, counted from 0.

    Linear warm-up over `warmup_steps`, then half a cosine from the peak down to `final_learning_rate`, which it would
    reach at step `steps`, just after the last one: with a final rate of 0 no update is wasted. Both rates are scaled by
    `train.batch / learning_rate_batch`: they are stated for a batch in samples and never depend on the number of ranks
    (method: section 1.6).
    """
    scale = train.batch / optimizer.learning_rate_batch
    peak, final = optimizer.learning_rate * scale, optimizer.final_learning_rate * scale
    if step < optimizer.warmup_steps:
        return peak * (step + 1) / optimizer.warmup_steps
    progress = min(1.0, (step - optimizer.warmup_steps) / (train.steps - optimizer.warmup_steps))
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
