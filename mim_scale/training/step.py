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
from mim_scale.training.guards import NOT_FINITE, NOT_FINITE_GRADIENT, Guards
from mim_scale.training.ranks import Ranks
from mim_scale.training.stop import StopRequest
from mim_scale.training.stragglers import ForwardClock
from mim_scale.training.watchdog import EXCHANGE, Watchdog


@dataclass(frozen=True)
class StepMetrics:
    """What one update was made of; the same on every rank."""

    losses: dict[str, float]
    """Means over the global batch: "loss" and the loss's parts."""
    grad_norm: float
    """Before clipping."""
    wait_s: float
    """The longest time that a rank waited for data."""
    own_s: tuple[float, ...]
    """Each rank's own work: data and forward passes."""
    noteworthy: str
    """Why the step was left out or is a spike; empty for most."""
    is_left_out: bool
    """Whether no update was made."""
    volumes: tuple[str, ...]
    """Keys of a noteworthy step's volumes, where it can be told of those that made it so."""
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
    guards: Guards,
    watchdog: Watchdog,
    clock: ForwardClock,
) -> StepMetrics:
    """Make one optimizer update from the next `count` micro-batches of every rank, or leave it out on all of them.

    Losses are exchanged before the update, so that no rank updates when one of them has diverged; they are summed in
    rank order.

    Raises:
        MimScaleError: what the stream met, on this or another rank.
        DivergedError: more steps in a row than `guards` allows had a loss or gradient that is not finite.
    """
    engine.set_rates(learning_rate)
    clock.take()  # what was measured on held-out samples
    names, sums, keys, wait_s = _add_up(engine, batches, count, ranks, watchdog)
    watchdog.beat(EXCHANGE)
    own = (sums.cpu() / count).tolist()
    table = ranks.gather([*own, wait_s + clock.take(), wait_s, float(stop.is_set)])
    means = [math.fsum(column) / ranks.world for column in table.T]
    told = dict(zip(names, means, strict=False))
    # Parts too: one that is not finite is a weight away from the loss.
    reason = guards.judge(told["loss"] if all(map(math.isfinite, means)) else math.nan)
    is_suspect = [not math.isfinite(sum(row)) for row in table] if reason == NOT_FINITE else [True] * ranks.world
    is_left_out = guards.leaves_out(reason)
    watchdog.beat("the update")
    grad_norm = engine.update(leave_out=is_left_out)
    if not is_left_out and not math.isfinite(grad_norm):
        reason, is_left_out = NOT_FINITE_GRADIENT, True
    volumes = _volumes(keys, is_suspect, ranks) if reason else ()
    guards.note(told["loss"], reason if is_left_out else "")
    if guards.has_enough:
        _refuse(step, reason, volumes, guards.in_a_row, ranks)
    return StepMetrics(
        losses=told,
        grad_norm=grad_norm,
        wait_s=float(table[:, -2].max()),
        own_s=tuple(table[:, -3].tolist()),
        noteworthy=reason,
        is_left_out=is_left_out,
        volumes=volumes,
        is_stop_asked=bool(table[:, -1].any()),
    )


def _add_up(
    engine: Engine, batches: Iterator[Batch], count: int, ranks: Ranks, watchdog: Watchdog
) -> tuple[list[str], torch.Tensor, list[str], float]:
    """The gradient of `count` micro-batches; (names of losses, their sums here, keys of volumes, seconds waited)."""
    wait_s, sums = 0.0, torch.zeros(0)
    keys: list[str] = []
    names: list[str] = []
    for index in range(count):
        batch, seconds = _next_on_all(batches, ranks, watchdog)
        wait_s += seconds
        watchdog.beat("computing")
        losses = engine.forward_backward(to_device(batch, ranks.device), last=index == count - 1)
        names = list(losses)
        values = torch.stack([value.double() for value in losses.values()])
        sums = values if index == 0 else sums + values
        keys += batch.keys
    return names, sums, keys, wait_s


def _next_on_all(batches: Iterator[Batch], ranks: Ranks, watchdog: Watchdog) -> tuple[Batch, float]:
    """The next batch, and how long this rank waited for it; if a rank's stream failed, all ranks end before one of
    them waits in a reduction."""
    watchdog.beat("reading data")
    start = time.perf_counter()
    try:
        batch = next(batches)
    except MimScaleError as error:
        ranks.agree(error)
        raise
    # Without the exchange: whoever is early there waits for the others, not for its data.
    seconds = time.perf_counter() - start
    watchdog.beat(EXCHANGE)
    ranks.agree(None)
    return batch, seconds


def _volumes(keys: list[str], is_suspect: Sequence[bool], ranks: Ranks) -> tuple[str, ...]:
    """What the suspect ranks computed on, of all micro-batches of the step."""
    held = ranks.gather_objects(keys)
    return tuple(
        sorted({key for rank_keys, suspect in zip(held, is_suspect, strict=True) if suspect for key in rank_keys})
    )


def _refuse(step: int, what: str, volumes: Sequence[str], in_a_row: int, ranks: Ranks) -> NoReturn:
    """End all ranks with one message."""
    before = f", as {in_a_row - 1} steps before it" if in_a_row > 1 else ""
    ranks.fail(
        DivergedError(
            f"step {step + 1}: {what} on volumes {', '.join(volumes)}{before}; weights and checkpoints are from before "
            "it: lower optimizer.learning_rate, or set optimizer.clip_norm, in a new output folder"
        )
    )
