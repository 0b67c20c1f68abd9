"""Seconds of a forward and backward pass of the demo network, under each checkpointing policy: `make bench`."""

import platform
import statistics
import time
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from mim_scale.config import Checkpointing, PretrainConfig
from mim_scale.config_file import load_config
from mim_scale.methods.build import build_method
from mim_scale.sampling.plan import plan
from mim_scale.streaming.batch import Sample, collate
from mim_scale.streaming.device import to_device

RUNS = 7
SAMPLES = 4
CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"


def main() -> None:
    """Print one line a policy: median CPU seconds a sample, and the range."""
    torch.set_num_threads(1)
    print(
        f"{platform.machine()}, torch {torch.__version__}, one thread, {SAMPLES} samples, {RUNS} runs after one warm-up"
    )
    for policy in get_args(Checkpointing):
        config = load_config(PretrainConfig, CONFIG, [f"train.activation_checkpointing={policy}"])
        module, batch = build_method(config), to_device(_batch(config), torch.device("cpu"))
        seconds = []
        for _ in range(RUNS + 1):
            start = time.process_time()
            module(batch).total.backward()
            seconds.append((time.process_time() - start) / SAMPLES)
        counted = sorted(seconds[1:])
        median = statistics.median(counted)
        print(f"checkpointing {policy:<5} {median:.3f} CPU s a sample ({counted[0]:.3f} to {counted[-1]:.3f})")


def _batch(config: PretrainConfig):  # type: ignore[no-untyped-def]  # a numpy Batch; benchmarks are not type-checked
    voxels = np.random.default_rng(0).integers(-1024, 1000, config.plan.box, dtype=np.int16)
    return collate([Sample(n, "noise", voxels, plan(0, n, config.plan.box, config.plan)) for n in range(SAMPLES)])


if __name__ == "__main__":
    main()
