"""A pre-training run from its config: taken up where its run folder says, saved as it goes, ended with a code.

Everything but weights, moments and the step is a function of (config, step); so taking a run up is loading one
checkpoint, on any number of ranks, and asking the stream for the next positions.
"""

import math
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mim_scale.config import PretrainConfig
from mim_scale.errors import EXIT_REQUEUE, DivergedError, StoreError
from mim_scale.methods.build import build_method
from mim_scale.sampling.order import micro_batches
from mim_scale.store.dataset import Dataset
from mim_scale.store.geometry import Size3, Spacing3
from mim_scale.store.manifest import Row, split_subjects
from mim_scale.streaming.stream import open_dataset, open_stream, refuse_short_pack
from mim_scale.training.checkpoint import check_fits
from mim_scale.training.compiled import compile_blocks
from mim_scale.training.deepspeed_settings import deepspeed_config
from mim_scale.training.engine import Engine, accumulation, build_engine, trained_parameters
from mim_scale.training.guards import Guards
from mim_scale.training.held_out import HeldOut, trivial_name
from mim_scale.training.memory import resolve_checkpointing, resolve_stage
from mim_scale.training.placement import read_placement
from mim_scale.training.progress import Progress
from mim_scale.training.ranks import Ranks, joined
from mim_scale.training.ray_node import ray_for_ranks
from mim_scale.training.records import Records, StartingPoint
from mim_scale.training.saving import Saver, State, find_writers, send_state
from mim_scale.training.schedule import learning_rate
from mim_scale.training.step import StepMetrics, train_step
from mim_scale.training.stop import StopRequest
from mim_scale.training.stragglers import ForwardClock, Stragglers, slowest
from mim_scale.training.tracking_system import system_rows
from mim_scale.training.watchdog import Watchdog, watched


@dataclass(frozen=True)
class _Run:
    """What the loop works with; only `records` and `progress` are busier on rank 0 than elsewhere."""

    config: PretrainConfig
    ranks: Ranks
    dataset: Dataset
    rows: tuple[Row, ...]
    engine: Engine
    held_out: HeldOut
    records: Records
    progress: Progress
    stop: StopRequest
    guards: Guards
    watchdog: Watchdog
    saver: Saver
    clock: ForwardClock
    stragglers: Stragglers


def pretrain(config: PretrainConfig, stop: StopRequest | None = None) -> int:
    """Train to `train.steps`, on the ranks that the environment describes.

    Args:
        config: The run's settings.
        stop: Asked after every step; the caller installs it where signals are to be heard.

    Returns:
        0 when the last step is made (also when it was made before), 75 when asked to stop: saved, start again to go on.

    Raises:
        MimScaleError: bad settings, store, checkpoint or cluster; damaged bytes; a loss that is not finite. With
            several ranks, a SystemExit with the same code, after one of them has printed the line.
    """
    stop = stop or StopRequest()
    if stop.signal is not None:
        return EXIT_REQUEUE
    placement = read_placement(os.environ)
    with (
        joined(placement) as ranks,
        watched(ranks, placement.address, Path(config.output), config.guards.hang_s) as watchdog,
    ):
        code = _pretrain(config, ranks, stop, watchdog)
        # Leave together: a launcher ends the others as soon as one is gone, and rank 0 may have rows to send yet.
        ranks.gather([0.0])
        return code


def _pretrain(config: PretrainConfig, ranks: Ranks, stop: StopRequest, watchdog: Watchdog) -> int:
    # 1. The batch fits the ranks, the store is whole and the same everywhere, the split leaves something to train on.
    train = config.train
    ranks.together(lambda: micro_batches(0, train.batch, train.micro_batch, ranks.rank, ranks.world))
    if train.engine == "deepspeed":
        ranks.together(lambda: deepspeed_config(config, ranks))
    dataset = ranks.together(lambda: open_dataset(config.data))
    ranks.together(lambda: _refuse_other_copy(dataset, ranks.broadcast(dataset.fingerprint)))
    rows, held_rows = ranks.together(lambda: split_subjects(dataset.rows, config.seed, config.data.held_out_subjects))
    # 2. The run folder is ours, and what lies in it is this run.
    spacing_mm = [_extreme(rows, min), _extreme(rows, max)]
    with Records(config, dataset.fingerprint, spacing_mm, ranks.world, is_kept_here=ranks.rank == 0) as records:
        start = ranks.on_first(records.take_up)
        # 3. Nothing left to do, but perhaps something left to send.
        if start.step >= train.steps:
            records.follow()
            records.status = "FINISHED"
            if ranks.rank == 0:
                print(f"already done: {start.step} steps, in {config.output}", flush=True)
            return 0
        needed = range(start.step * train.batch, train.steps * train.batch)
        num_held = config.held_out.samples if held_rows else 0
        ranks.together(lambda: refuse_short_pack(config, dataset, needed, num_held))
        # 4. Train.
        with ExitStack() as resources:
            run = _prepare(resources, config, ranks, stop, watchdog, dataset, (rows, held_rows), records, start)
            return _train(run, start)


def _prepare(
    resources: ExitStack,
    config: PretrainConfig,
    ranks: Ranks,
    stop: StopRequest,
    watchdog: Watchdog,
    dataset: Dataset,
    split: tuple[tuple[Row, ...], tuple[Row, ...]],
    records: Records,
    start: StartingPoint,
) -> _Run:
    """Model and engine, the state of the newest checkpoint, and what goes on beside; `resources` ends it."""
    rows, held_rows = split
    writers = find_writers(ranks, records.checkpoints.path)
    config, why_stage = resolve_stage(config, ranks, len(writers))
    policy, why = resolve_checkpointing(config, ranks, len(writers))
    module = build_method(config, policy)
    progress = Progress(start.step, config.train.steps, config.train.batch, is_shown=ranks.rank == 0)
    resources.callback(progress.close)
    progress.say(_opening(config, ranks, start.step, module, len(rows), len(held_rows)))
    progress.say(told_share_inside(rows, config.plan.box))
    for line in filter(None, (why_stage, why)):
        progress.say(line)
    if config.train.compile:
        progress.say(ranks.together(lambda: compile_blocks(module.to(ranks.device), config)))
    if len(writers) < ranks.world:
        progress.say(
            f"{len(writers)} of {ranks.world} ranks see {records.checkpoints.path} and write checkpoints; the "
            "others get theirs from rank 0"
        )
    state = ranks.together(lambda: _load(start, module, is_seen=ranks.rank in writers))
    if start.checkpoint is not None and len(writers) < ranks.world:
        state = send_state(ranks, state)
    engine = ranks.together(lambda: build_engine(module, config, ranks))
    resources.callback(engine.close)
    guards = ranks.broadcast(records.recall_guards(start))
    if state is not None:
        engine.load_state(*state, updates=guards.updates)
        del state
    resources.enter_context(ray_for_ranks(config.data, ranks))
    held_out = HeldOut(config, dataset, held_rows, ranks)
    hosts = ranks.gather_objects(socket.gethostname())
    chosen = {"activation_checkpointing": policy, "zero_stage": config.train.stage}
    records.begin(start.step, len(dataset.rows), device=ranks.device.type, hosts=len(set(hosts)), **chosen)
    resources.enter_context(system_rows(config, ranks.local_rank == 0 and ranks.rank in writers))
    saver = Saver(engine, ranks, records, progress, writers, config.checkpoint.background)
    resources.enter_context(saver)
    clock = resources.enter_context(ForwardClock(engine.module, ranks.device))
    stragglers = Stragglers(hosts)
    parts = engine, held_out, records, progress, stop, guards, watchdog, saver, clock, stragglers
    return _Run(config, ranks, dataset, rows, *parts)


def _train(run: _Run, start: StartingPoint) -> int:
    train = run.config.train
    if start.held_out_step < start.step:
        _measure(run, start.step)
    with open_stream(run.config, run.dataset, run.rows) as stream:
        batches = stream.batches(_schedule(run.config, run.ranks, start.step))
        for step in range(start.step, train.steps):
            began = time.perf_counter()
            rate = learning_rate(step, run.config.optimizer, train)
            count = accumulation(run.config, run.ranks)
            metrics = train_step(
                run.engine, batches, count, step, rate, run.ranks, run.stop, run.guards, run.watchdog, run.clock
            )
            _tell(run, step, rate, metrics, time.perf_counter() - began)
            run.watchdog.arm()
            run.saver.look()
            done = step + 1
            if not metrics.is_stop_asked or done == train.steps:
                _measure(run, done)
            if done == train.steps:
                # Before the last save: a run whose last checkpoint stands has its pictures too.
                with run.watchdog.patient("drawing"):
                    run.records.draw(run.held_out.previews(run.engine.module))
            if metrics.is_stop_asked or done % run.config.checkpoint.every == 0 or done == train.steps:
                _save(run, done)
            if metrics.is_stop_asked and done < train.steps:
                _finish_saving(run)
                run.records.status = "KILLED"
                run.progress.say(f"stopped as asked after step {done}, saved; start the same command again to go on")
                return EXIT_REQUEUE
    _finish_saving(run)
    run.records.status = "FINISHED"
    run.progress.say(f"done: {train.steps} steps, in {run.config.output}")
    return 0


def _schedule(config: PretrainConfig, ranks: Ranks, first_step: int) -> Iterator[range]:
    """The positions of every micro-batch that this rank will need, in order."""
    for step in range(first_step, config.train.steps):
        yield from micro_batches(step, config.train.batch, config.train.micro_batch, ranks.rank, ranks.world)


def _load(start: StartingPoint, module: nn.Module, is_seen: bool) -> State | None:
    """The checkpoint's tensors, once they are seen to fit the module; before an engine cuts its parameters up."""
    if start.checkpoint is None or not is_seen:
        return None
    weights, moments = start.checkpoint.load()
    check_fits(start.checkpoint, weights, {name: value.shape for name, value in module.state_dict().items()})
    return weights, moments


def _tell(run: _Run, step: int, rate: float, metrics: StepMetrics, seconds: float) -> None:
    position = (step + 1) * run.config.train.batch
    noteworthy: dict[str, Any] = {}
    if metrics.noteworthy:
        noteworthy = {"left_out" if metrics.is_left_out else "noted": metrics.noteworthy, "volumes": metrics.volumes}
        done = "left out" if metrics.is_left_out else "made all the same"
        run.progress.say(f"step {step + 1}: {metrics.noteworthy} on volumes {', '.join(metrics.volumes)}; {done}")
    if run.ranks.world > 1:
        rank, times = slowest(metrics.own_s)
        noteworthy |= {"slowest_rank": rank, "slowest_times": times}
    for line in run.stragglers.note(metrics.own_s, seconds):
        run.progress.say(f"step {step + 1}: {line}")
    run.records.row(
        "step",
        step + 1,
        epoch=position / len(run.rows),
        position=position,
        loss=_finite(metrics.losses["loss"]),
        parts={name: _finite(value) for name, value in metrics.losses.items() if name != "loss"},
        learning_rate=rate,
        grad_norm=_finite(metrics.grad_norm),
        samples_per_second=run.config.train.batch / seconds,
        data_wait=metrics.wait_s / seconds,
        **noteworthy,
    )
    run.progress.step(step + 1, metrics.losses["loss"], rate, seconds, metrics.wait_s)


def _finite(value: float) -> float | None:
    """As JSON has it."""
    return value if math.isfinite(value) else None


def _measure(run: _Run, step: int) -> None:
    if not run.held_out.is_due(step):
        return
    with run.watchdog.patient("measuring held-out samples"):
        values = run.held_out.measure(run.engine.module)
    if not math.isfinite(math.fsum(values.values())):
        run.ranks.fail(
            DivergedError(
                f"step {step}: the held-out loss is not finite: lower optimizer.learning_rate, or set "
                "optimizer.clip_norm, in a new output folder"
            )
        )
    run.records.row("held_out", step, held_out=values)
    told = [_share(loss, values[trivial_name(name)]) for name, loss in values.items() if trivial_name(name) in values]
    run.progress.say(
        f"step {step}: held-out loss {values['loss']:.4f}; as shares of the trivial predictor's: {', '.join(told)}"
    )


def _extreme(rows: Sequence[Row], choose: Callable[[Iterable[float]], float]) -> Spacing3:
    z, y, x = (choose(row.spacing_mm[axis] for row in rows) for axis in range(3))
    return (z, y, x)


def _share(loss: float, trivial: float) -> str:
    """A ratio for people; held-out views of nothing but air leave the trivial predictor no error."""
    return f"{loss / trivial:.2f}" if trivial else "-"


def _save(run: _Run, step: int) -> None:
    with run.watchdog.patient("saving"):
        run.saver.save(step, run.guards.updates)


def _finish_saving(run: _Run) -> None:
    with run.watchdog.patient("saving"):
        run.saver.finish()


def _refuse_other_copy(dataset: Dataset, expected: str) -> None:
    if dataset.fingerprint != expected:
        raise StoreError(
            f"{dataset.path}: holds the dataset {dataset.fingerprint[:16]} on this rank's machine, rank 0 has "
            f"{expected[:16]}: "
            "give all machines the same store"
        )


def told_share_inside(rows: Sequence[Row], box: Size3) -> str:
    """How much of a crop lies inside its volume on average; the rest is air, and teaches nothing."""
    inside = sum(math.prod(min(size, by) / by for size, by in zip(row.shape, box, strict=True)) for row in rows)
    share = inside / len(rows)
    told = f"at most {share:.0%} of a box of {' x '.join(map(str, box))} voxels lies inside its volume, on average"
    few = ": build the store with a coarser --spacing, or take a smaller plan.box"
    return told + (few if share < _FEW_INSIDE else "")


_FEW_INSIDE = 0.5


def _opening(config: PretrainConfig, ranks: Ranks, step: int, module: nn.Module, volumes: int, held_out: int) -> str:
    parameters = sum(parameter.numel() for parameter in trained_parameters(module).values())
    engine = f"DeepSpeed ZeRO-{config.train.stage}" if config.train.engine == "deepspeed" else "plain torch"
    taken_up = f"taken up at step {step} of {config.train.steps}" if step else f"{config.train.steps} steps"
    return (
        f"{config.output}: {taken_up}; {parameters:,} parameters, {ranks.world} rank{'s' * (ranks.world > 1)} on "
        f"{ranks.device.type}, {engine}; {volumes} volumes to train on, {held_out} held out"
    )
