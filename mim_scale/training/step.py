"""One update from one global batch, alike on every rank whatever happens on one of them."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch

from mim_scale.errors import DivergedError, MimScaleError
from mim_scale.streaming.batch import Batch
from mim_scale.streaming.device import to_device
from mim_scale.training.engine import Engine
from mim_scale.training.ranks import Ranks
from mim_scale.training.stop import StopRequest


@dataclass(frozen=True)
class StepMetrics:
    """What one update was made of; the same on every rank."""

    losses: dict[str, float]
    """Means over the global batch: "loss" and the loss's parts."""
    grad_norm: float
    """Before clipping."""
    wait_s: float
    """The longest time that a rank waited for data."""
    is_stop_asked: bool
    """Whether a rank was asked to stop."""


def train_step(
    engine: Engine,
    batches: Iterator[Batch],
    count: int,
    step: int,
    learning_rate: float,
    ranks: Ranks,
    stop: StopRequest,
) -> StepMetrics:
    """Make one optimizer update from the next `count` micro-batches of every rank.

    Losses are exchanged before the update, so that no rank updates when one of them has diverged; they are summed in
    rank order.

    Raises:
        MimScaleError: what the stream met, on this or another rank.
        DivergedError: a loss or the gradient is not finite; names the step and the volumes.
    """
    engine.set_rates(learning_rate)
    wait_s, sums = 0.0, torch.zeros(0)
    keys: list[str] = []
    names: list[str] = []
    for index in range(count):
        start = time.perf_counter()
        batch = _next_on_all(batches, ranks)
        wait_s += time.perf_counter() - start
        losses = engine.forward_backward(to_device(batch, ranks.device), last=index == count - 1)
        names = list(losses)
        values = torch.stack([value.double() for value in losses.values()])
        sums = values if index == 0 else sums + values
        keys += batch.keys
    table = ranks.gather([*(sums.cpu() / count).tolist(), wait_s, float(stop.is_set)])
    means = [math.fsum(column) / ranks.world for column in table.T]
    if not all(map(math.isfinite, means)):
        _refuse(step, "the loss is not finite", keys, [bool(math.isfinite(sum(row))) for row in table], ranks)
    grad_norm = engine.update()
    if not math.isfinite(grad_norm):
        _refuse(step, "the gradient is not finite", keys, [False] * ranks.world, ranks)
    return StepMetrics(
        losses=dict(zip(names, means, strict=False)),
        grad_norm=grad_norm,
        wait_s=float(table[:, -2].max()),
        is_stop_asked=bool(table[:, -1].any()),
    )


def _next_on_all(batches: Iterator[Batch], ranks: Ranks) -> Batch:
    """The next batch; if a rank's stream failed, all ranks end before one of them waits in a reduction."""
    try:
        batch = next(batches)
    except MimScaleError as error:
        ranks.agree(error)
        raise
    ranks.agree(None)
    return batch


def _refuse(step: int, what: str, keys: list[str], is_finite: Sequence[bool], ranks: Ranks) -> NoReturn:
    """End all ranks with one message that names the volumes of the ranks that diverged."""
    held = ranks.gather_objects(keys)
    suspects = sorted({key for rank_keys, fine in zip(held, is_finite, strict=True) if not fine for key in rank_keys})
    ranks.fail(
        DivergedError(
            f"step {step + 1}: {what} on volumes {', '.join(suspects)}; the last checkpoint is from before it: "
            "lower optimizer.learning_rate, or set optimizer.clip_norm, in a new output folder"
        )
    )
