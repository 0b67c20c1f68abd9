"""CPU seconds of a step: packed tokens against masked whole grids, and each checkpointing policy: `make bench`."""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from mim_scale.config import Checkpointing, PretrainConfig
from mim_scale.config_file import load_config
from mim_scale.methods.build import build_method
from mim_scale.models.hybrid import HybridEncoder
from mim_scale.sampling.plan import plan
from mim_scale.streaming.batch import Batch, Sample, collate
from mim_scale.streaming.device import to_device

RUNS = 5
SAMPLES = 4
CONFIGS = Path(__file__).parents[1] / "configs"


def main() -> None:
    """Print one line a measurement: the median and the range of `RUNS` runs after one warm-up."""
    torch.set_num_threads(1)
    print(f"{platform.machine()}, torch {torch.__version__}, one thread, {RUNS} runs after one warm-up")
    for size, ratio in (("demo", 0.6), ("base", 0.6), ("base", 0.75)):
        compare_stems(size, ratio)
    for policy in get_args(Checkpointing):
        config = load_config(PretrainConfig, CONFIGS / "demo.yaml", [f"train.activation_checkpointing={policy}"])
        method, batch = build_method(config), to_device(_batch(config), "cpu")
        seconds = measure(lambda method=method, batch=batch: method(batch).total.backward())
        print(f"demo step, checkpointing {policy}: {_told([s / SAMPLES for s in seconds])} CPU s a sample")


def compare_stems(size: str, ratio: float) -> None:
    """The encoder of a preset on 4 views, the same weights and masks, the two turn by turn; outputs compared first."""
    config = load_config(PretrainConfig, CONFIGS / f"{size}.yaml")
    encoder = HybridEncoder(config.model, config.plan.view, config.plan.token)
    tokens = config.plan.num_tokens
    visible = torch.stack([torch.randperm(tokens)[: round(tokens * (1 - ratio))].sort().values for _ in range(4)])
    views = torch.rand(4, 1, *config.plan.view)
    packed, whole = encoder(views, visible), encoder.on_whole_grids(views, visible)
    apart = float((packed - whole).detach().abs().max() / whole.detach().abs().max())
    assert apart < 1e-5, apart
    passes = (
        lambda: encoder(views, visible).square().sum().backward(),
        lambda: encoder.on_whole_grids(views, visible).square().sum().backward(),
    )
    pairs = [[one_run(run) for run in passes] for _ in range(RUNS + 1)][1:]
    ratios = [whole / packed for packed, whole in pairs]
    ours, reference = ([pair[side] for pair in pairs] for side in (0, 1))
    print(
        f"{size} encoder, 4 views, ratio {ratio}: packed {_told(ours)} CPU s, whole grids {_told(reference)} CPU s, "
        f"ratio {_told(ratios)}; outputs apart {apart:.1e} of their largest"
    )


def measure(run: Callable[[], None]) -> list[float]:
    """CPU seconds of each counted run."""
    return [one_run(run) for _ in range(RUNS + 1)][1:]


def one_run(run: Callable[[], None]) -> float:
    """CPU seconds of one run."""
    start = time.process_time()
    run()
    return time.process_time() - start


def _told(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _batch(config: PretrainConfig) -> Batch:
    voxels = np.random.default_rng(0).integers(-1024, 1000, config.plan.box, dtype=np.int16)
    return collate([Sample(n, "noise", voxels, plan(0, n, config.plan.box, config.plan)) for n in range(SAMPLES)])


if __name__ == "__main__":
    main()
