"""Pre-training from the first step to the last, or from where a checkpoint left it, on any number of ranks."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch
from torch import nn

from mim_scale.config import PretrainConfig
from mim_scale.config_file import config_values, digest_config
from mim_scale.errors import EXIT_REQUEUE, MimScaleError
from mim_scale.methods.build import build_method
from mim_scale.sampling.order import micro_batches
from mim_scale.store.dataset import Dataset
from mim_scale.store.manifest import Row, split_subjects
from mim_scale.streaming.device import to_device
from mim_scale.streaming.stream import open_stream
from mim_scale.training.checkpoint import Checkpoint, CheckpointFolder, check_fits
from mim_scale.training.engine import Engine, build_engine, trained_parameters
from mim_scale.training.held_out import HeldOut
from mim_scale.training.journal import Journal
from mim_scale.training.progress import Progress
from mim_scale.training.ranks import Ranks
from mim_scale.training.run_folder import CHECKPOINTS, JOURNAL, RunLock, adopt_config, config_of_record, refuse_other_run
from mim_scale.training.schedule import learning_rate
from mim_scale.training.step import StepMetrics, train_step
from mim_scale.training.stop import StopRequest
from mim_scale.training.tracking import NoTracker, Status, Tracker, open_tracker

NUM_PICTURES = 3
"""Held-out samples that are drawn."""


def pretrain(config: PretrainConfig, ranks: Ranks, stop: StopRequest) -> int:
    """Train, measure, save and draw until `train.steps` updates are made.

    Returns:
        0 when all steps are made, 75 when a signal asked to stop and the state was saved.

    Raises:
        MimScaleError: see errors.py; on several ranks AllRanksEnd, after one line.
    """
    with ExitStack() as stack:
        # Refusals come before any work, and before anything is written but the lock.
        dataset = ranks.together(lambda: Dataset.open(config.data.store))
        rows, held_out_rows = ranks.together(
            lambda: split_subjects(dataset.rows, config.seed, config.data.held_out_subjects)
        )
        ranks.together(lambda: micro_batches(0, config.train.batch, config.train.micro_batch, ranks.rank, ranks.world))
        output = Path(config.output)
        if ranks.rank == 0:
            lock = ranks.together(lambda: RunLock(output))
            stack.callback(lock.release)
        else:
            ranks.together(lambda: None)
        checkpoint = ranks.on_first(lambda: _resume_point(config, dataset, output))
        if checkpoint is not None and checkpoint.step >= config.train.steps:
            if ranks.rank == 0:
                print(f"already done: {checkpoint.step} steps in {checkpoint.path}", flush=True)
            return 0
        run = _Run(config, ranks, dataset, rows, held_out_rows, stop, stack)
        run.begin(checkpoint)
        return run.train()


def _resume_point(config: PretrainConfig, dataset: Dataset, output: Path) -> Checkpoint | None:
    """1. a damaged checkpoint is skipped with a word; 2. the newest whole one is taken, if it is this run's; 3. none: begin anew."""
    adopt_config(config, output)
    folder = CheckpointFolder(output / CHECKPOINTS, config.checkpoint.keep)
    folder.remove_leftovers()
    checkpoint = folder.newest(lambda text: print(text, flush=True))
    if checkpoint is None:
        return None
    where = str(checkpoint.path)
    refuse_other_run(config_of_record(checkpoint.record, where), config, where)
    if checkpoint.record.get("fingerprint") != dataset.fingerprint:
        raise MimScaleError(
            f"{dataset.path}: the store's fingerprint is {dataset.fingerprint[:16]}, the run in {output} was begun on "
            f"{str(checkpoint.record.get('fingerprint'))[:16]}: give it that store, or choose another output"
        )
    return checkpoint


class _Run:
    """What one process holds while it trains."""

    def __init__(
        self,
        config: PretrainConfig,
        ranks: Ranks,
        dataset: Dataset,
        rows: tuple[Row, ...],
        held_out_rows: tuple[Row, ...],
        stop: StopRequest,
        stack: ExitStack,
    ) -> None:
        self.config, self.ranks, self.dataset, self.rows, self.stop = config, ranks, dataset, rows, stop
        self.output = Path(config.output)
        self.held_out_rows = held_out_rows
        self.held_out = HeldOut(config, dataset, held_out_rows, ranks)
        self.checkpoints = CheckpointFolder(self.output / CHECKPOINTS, config.checkpoint.keep)
        self.is_first = ranks.rank == 0
        self.start = 0
        self.stack = stack
        self.engine: Engine = build_engine(build_method(config), config, ranks)
        stack.callback(self.engine.close)
        self.journal = Journal(self.output / JOURNAL) if self.is_first else None
        if self.journal is not None:
            stack.callback(self.journal.close)
        self.tracker: Tracker = NoTracker()
        if self.is_first:
            self.tracker = open_tracker(config.tracking, self.output, self.output / JOURNAL)

    def begin(self, checkpoint: Checkpoint | None) -> None:
        """Take the state of a checkpoint, or keep the fresh one; say so in the journal."""
        config, ranks = self.config, self.ranks
        if checkpoint is not None:
            weights, moments = ranks.together(checkpoint.load)
            shapes = {name: tuple(p.shape) for name, p in build_shapes(config).items()}
            ranks.together(lambda: check_fits(checkpoint, weights, shapes))
            self.engine.load_state(weights, moments, checkpoint.step)
            self.start = checkpoint.step
        digest = digest_config(config)
        if self.journal is not None:
            self.journal.write(
                "start",
                self.start,
                world=ranks.world,
                fingerprint=self.dataset.fingerprint,
                config_digest=digest,
                time=time.time(),
            )
        self.tracker.start(config_values(config), {"fingerprint": self.dataset.fingerprint, "config_digest": digest})

    def train(self) -> int:
        """Steps from start to the last; returns the exit code."""
        status: Status = "FAILED"
        try:
            with self._transport():
                code = self._steps()
            status = "FINISHED" if code == 0 else "KILLED"
            return code
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            self.tracker.close(status)

    def _transport(self) -> "ExitStack | nullcontext[None]":
        if self.config.data.transport != "ray":
            return nullcontext()
        from mim_scale.ray_cluster import ray_cluster

        stack = ExitStack()
        # The first rank of each machine starts a cluster there unless RAY_ADDRESS names one; its neighbours join it.
        own = self.ranks.together(
            lambda: stack.enter_context(ray_cluster()) if self.ranks.local_rank == 0 else ""
        )
        addresses = self.ranks.gather_objects((self.ranks.local_rank, own))
        if self.ranks.local_rank != 0 and "RAY_ADDRESS" not in os.environ:
            leader = self.ranks.rank - self.ranks.local_rank
            os.environ["RAY_ADDRESS"] = addresses[leader][1]
            stack.callback(os.environ.pop, "RAY_ADDRESS", None)
        return stack

    def _steps(self) -> int:
        config, ranks, train = self.config, self.ranks, self.config.train
        progress = Progress(self.start, train.steps, train.batch, self.is_first)
        self._measure(self.start, progress)
        count = train.batch // (train.micro_batch * ranks.world)
        saved = self.start
        try:
            with ranks.together(lambda: open_stream(config, self.dataset, self.rows)) as stream:
                batches = stream.batches(self._schedule())
                for step in range(self.start, train.steps):
                    begun = time.perf_counter()
                    rate = learning_rate(step, config.optimizer, train)
                    metrics = train_step(self.engine, batches, count, step, rate, ranks, self.stop)
                    seconds = time.perf_counter() - begun
                    self._write(step, metrics, rate, seconds)
                    progress.step(step + 1, metrics.losses["loss"], rate, seconds, metrics.wait_s)
                    done = step + 1
                    self._measure(done, progress)
                    is_last = done == train.steps or metrics.is_stop_asked
                    if is_last or done % config.checkpoint.every == 0:
                        self._save(done)
                        saved = done
                    if metrics.is_stop_asked and done < train.steps:
                        progress.say(f"asked to stop: saved after step {saved}; the same command goes on from there")
                        return EXIT_REQUEUE
            self._draw(progress)
            return 0
        finally:
            progress.close()

    def _schedule(self) -> Iterator[range]:
        train = self.config.train
        for step in range(self.start, train.steps):
            yield from micro_batches(step, train.batch, train.micro_batch, self.ranks.rank, self.ranks.world)

    def _write(self, step: int, metrics: StepMetrics, rate: float, seconds: float) -> None:
        if self.journal is None:
            return
        batch = self.config.train.batch
        losses = dict(metrics.losses)
        self.journal.write(
            "step",
            step + 1,
            epoch=step * batch // len(self.rows),
            position=step * batch,
            loss=losses.pop("loss"),
            parts=losses,
            learning_rate=rate,
            grad_norm=metrics.grad_norm,
            samples_per_second=batch / seconds,
            data_wait=metrics.wait_s / seconds,
        )

    def _measure(self, done: int, progress: Progress) -> None:
        if not self.held_out.is_due(done):
            return
        values = self.held_out.measure(self.engine.module)
        if self.journal is not None:
            self.journal.write("held_out", done, held_out=values)
        levels = range(1, len(self.config.plan.levels) + 1)
        ratios = ", ".join(f"level {n} {values[f'level_{n}'] / values[f'trivial_{n}']:.2f}" for n in levels)
        progress.say(f"held out after step {done}: loss {values['loss']:.4f}; as a share of the trivial predictor's: {ratios}")

    def _save(self, done: int) -> None:
        weights, moments = self.engine.state()
        facts = {
            "position": done * self.config.train.batch,
            "config": config_values(self.config),
            "config_digest": digest_config(self.config),
            "fingerprint": self.dataset.fingerprint,
            "world": self.ranks.world,
        }
        self.ranks.on_first(lambda: str(self.checkpoints.save(done, weights, moments, facts)))

    def _draw(self, progress: Progress) -> None:
        """Pictures of fixed held-out samples (every rank runs the network, the first one draws), and of the losses."""
        from mim_scale.training.pictures import draw_loss_curve, draw_reconstruction, read_rows

        folder = self.output / "pictures"
        module: nn.Module = self.engine.module
        if self.held_out_rows:
            chunks = [range(n, n + 1) for n in range(min(NUM_PICTURES, self.config.held_out.samples))]
            with open_stream(self.config, self.dataset, self.held_out_rows, held_out=True) as stream, torch.no_grad():
                for number, batch in enumerate(stream.batches(chunks), start=1):
                    levels = module.preview(to_device(batch, self.ranks.device))  # type: ignore[operator]  # a method has it
                    if self.is_first:
                        path = folder / f"reconstruction_{number}.png"
                        draw_reconstruction(levels, f"held-out volume {batch.keys[0]}", path)
                        self.tracker.image(path)
        if self.is_first:
            draw_loss_curve(read_rows(self.output / JOURNAL), folder / "loss.png")
            self.tracker.image(folder / "loss.png")
            progress.say(f"pictures: {folder}")


def build_shapes(config: PretrainConfig) -> dict[str, nn.Parameter]:
    """The trained parameters of the config's method, without memory for their values."""
    with torch.device("meta"):
        return trained_parameters(build_method(config))
