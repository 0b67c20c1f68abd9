"""A process that makes training steps of one rank and times their parts: `python -m mim_scale.estimate.timed_steps`.

One micro-batch a step, through the engine, the stream and the network of a real run; of noise where there is no store.
It says when it is warm, waits for a word, and answers with one line. `calibrate` starts it, alone or several at once.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise, repeat
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from mim_scale.config import PretrainConfig
from mim_scale.config_file import load_config
from mim_scale.errors import exit_with
from mim_scale.methods.build import build_method
from mim_scale.methods.method import Method
from mim_scale.methods.noise import noise_batch
from mim_scale.store.dataset import RECORD
from mim_scale.store.manifest import split_subjects
from mim_scale.streaming.device import TensorBatch, to_device
from mim_scale.streaming.stream import open_dataset, open_stream
from mim_scale.training.compiled import compile_blocks
from mim_scale.training.engine import Engine, build_engine
from mim_scale.training.held_out import WATCHED
from mim_scale.training.memory import peak_resident_bytes, resident_bytes, resolve_checkpointing
from mim_scale.training.placement import Placement
from mim_scale.training.ranks import Ranks, joined
from mim_scale.training.schedule import learning_rate

READY, RESULT = "READY", "RESULT "
WARM_UP = 4
"""Steps that are not counted: pages, caches and compiled kernels come into being."""
READS = 10
FORWARDS = 3


@dataclass(frozen=True)
class TimedSteps:
    """What one process found; seconds of each step in order."""

    device: str
    policy: str
    is_of_store: bool
    micro_batch_s: list[float]
    wait_s: list[float]
    update_s: list[float]
    read_s: float
    """Of a micro-batch by one thread; 0 without a store, likewise the next."""
    read_core_s: float
    copy_s: float
    held_out_s: float
    """A measurement on all held-out samples, from a few of its micro-batches."""
    peak_bytes: int
    """Above what the process held before; on a GPU, all that was allocated."""


def time_steps(config: PretrainConfig, steps: int) -> TimedSteps:
    """Make a few steps, wait for the word, make `steps` more and time them."""
    with joined(Placement(0, 1, 0, "127.0.0.1", 0)) as ranks, ExitStack() as resources:
        before = resident_bytes()
        policy, _ = resolve_checkpointing(config, ranks)
        module = build_method(config, policy)
        if config.train.compile:
            compile_blocks(module.to(ranks.device), config)
        engine = build_engine(module, config, ranks)
        resources.callback(engine.close)
        is_of_store = has_data(config)
        batches = (
            _batches(config, steps, ranks, resources) if is_of_store else repeat(noise_batch(config, ranks.device))
        )
        _make(engine, batches, config, WARM_UP)
        print(READY, flush=True)
        sys.stdin.readline()
        wait_s, micro_batch_s, update_s = _make(engine, batches, config, steps)
        peak = torch.cuda.max_memory_allocated() if ranks.device.type == "cuda" else peak_resident_bytes() - before
        held_out_s = _held_out_s(engine.module, noise_batch(config, ranks.device), config)
        copy_s = _copy_s(engine)
        resources.pop_all().close()
        read_s, read_core_s = _read_s(config) if is_of_store else (0.0, 0.0)
        return TimedSteps(
            ranks.device.type,
            policy,
            is_of_store,
            micro_batch_s,
            wait_s,
            update_s,
            read_s,
            read_core_s,
            copy_s,
            held_out_s,
            peak,
        )


def has_data(config: PretrainConfig) -> bool:
    """Whether the config names samples that are there."""
    return config.data.pack is not None or (Path(config.data.store) / RECORD).is_file()


def _batches(config: PretrainConfig, steps: int, ranks: Ranks, resources: ExitStack) -> Iterator[TensorBatch]:
    dataset = open_dataset(config.data)
    rows, _ = split_subjects(dataset.rows, config.seed, config.data.held_out_subjects)
    stream = resources.enter_context(open_stream(config, dataset, rows))
    size = config.train.micro_batch
    schedule = [range(n * size, (n + 1) * size) for n in range(steps + WARM_UP)]
    return (to_device(batch, ranks.device) for batch in stream.batches(schedule))


def _make(
    engine: Engine, batches: Iterator[TensorBatch], config: PretrainConfig, steps: int
) -> tuple[list[float], list[float], list[float]]:
    """Seconds of waiting for data, of computing, and of the update, step by step."""
    parts: tuple[list[float], list[float], list[float]] = ([], [], [])
    for step in range(steps):
        times = [time.perf_counter()]
        engine.set_rates(learning_rate(step, config.optimizer, config.train))
        batch = next(batches)
        times.append(_now())
        engine.forward_backward(batch, last=True)
        times.append(_now())
        engine.update()
        times.append(_now())
        for part, (start, stop) in zip(parts, pairwise(times), strict=True):
            part.append(stop - start)
    return parts


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _held_out_s(module: nn.Module, batch: TensorBatch, config: PretrainConfig) -> float:
    turns = -(-config.held_out.samples // config.train.micro_batch)
    module.eval()
    with torch.no_grad():
        times = [_now()]
        for _ in range(FORWARDS):
            module(batch)
            times.append(_now())
        cast(Method, module).watch(batch)
        watch_s = _now() - times[-1]
    module.train()
    forward_s = statistics.median(stop - start for start, stop in pairwise(times))
    return turns * forward_s + min(turns, WATCHED) * watch_s


def _copy_s(engine: Engine) -> float:
    """Of the whole state into host memory that is there already, as every save but the first has it."""
    buffers: dict[tuple[str, str], Tensor] = {}
    seconds = 0.0
    for _ in range(2):
        start = _now()
        for piece in engine.pieces():
            key, numbers = (piece.kind, piece.name), piece.numbers.detach()
            if key not in buffers:
                pinned = numbers.device.type == "cuda"
                buffers[key] = torch.empty(numbers.shape, dtype=torch.float32, pin_memory=pinned)
            buffers[key].copy_(numbers, non_blocking=True)
        seconds = _now() - start
    return seconds


def _read_s(config: PretrainConfig) -> tuple[float, float]:
    """(seconds, core seconds) of reading a micro-batch of samples that were not read yet, one after another."""
    values = config.data.model_copy(update={"transport": "threads", "workers": 1, "read_ahead": 1})
    config = config.model_copy(update={"data": values})
    dataset = open_dataset(config.data)
    rows, _ = split_subjects(dataset.rows, config.seed, config.data.held_out_subjects)
    size, first = config.train.micro_batch, config.train.batch
    schedule = [range(first + n * size, first + (n + 1) * size) for n in range(READS)]
    with open_stream(config, dataset, rows) as stream:
        start, core_start = time.perf_counter(), time.process_time()
        for _ in stream.batches(schedule):
            pass
        return (time.perf_counter() - start) / READS, (time.process_time() - core_start) / READS


def main() -> int:
    """Time the steps of the config file that is named first, as many as are named second."""
    config = load_config(PretrainConfig, Path(sys.argv[1]))
    if config.train.keep_freed_memory and not torch.cuda.is_available():
        from mim_scale.training.allocator import keep_freed_memory

        keep_freed_memory()
    print(RESULT + json.dumps(asdict(time_steps(config, int(sys.argv[2])))), flush=True)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    exit_with(main, skip_teardown=True)
