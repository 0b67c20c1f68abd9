"""The learning rate is a function of the step and of the batch in samples, and of nothing else."""

import math
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from mim_scale.config import OptimizerConfig, TrainConfig
from mim_scale.training.schedule import learning_rate


def make(steps: int, warmup: int, batch: int, final: float = 0.0) -> tuple[OptimizerConfig, TrainConfig]:
    optimizer = OptimizerConfig(
        learning_rate=1e-3,
        learning_rate_batch=8,
        warmup_steps=warmup,
        final_learning_rate=final,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        clip_norm=None,
    )
    return optimizer, TrainConfig(steps=steps, batch=batch, micro_batch=1, precision="fp32")


@given(st.integers(2, 500), st.data())
def test_rises_to_the_peak_then_falls_towards_the_final_rate(steps: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, steps - 1))
    batch = data.draw(st.integers(1, 64))
    final = data.draw(st.sampled_from([0.0, 1e-5, 1e-3]))
    optimizer, train = make(steps, warmup, batch, final)
    rates = [learning_rate(step, optimizer, train) for step in range(steps)]
    peak = 1e-3 * batch / 8
    assert all(rate > 0 for rate in rates)
    assert all(later >= rate * (1 - 1e-12) for rate, later in pairwise(rates[: warmup + 1]))
    assert all(later <= rate * (1 + 1e-12) for rate, later in pairwise(rates[warmup:]))
    assert math.isclose(max(rates), peak)
    assert min(rates[warmup:]) >= final * batch / 8 * (1 - 1e-12)
    assert math.isclose(learning_rate(steps, optimizer, train), final * batch / 8, abs_tol=1e-18)


def test_golden_values() -> None:
    optimizer, train = make(steps=100, warmup=10, batch=16)
    assert learning_rate(0, optimizer, train) == 2e-4
    assert learning_rate(9, optimizer, train) == 2e-3
    assert math.isclose(learning_rate(55, optimizer, train), 1e-3)


@given(st.integers(0, 99), st.integers(1, 8))
def test_scales_with_the_batch(step: int, factor: int) -> None:
    one, many = make(100, 10, 8), make(100, 10, 8 * factor)
    assert math.isclose(learning_rate(step, *many), factor * learning_rate(step, *one))
