"""A step against the same one from stock layers (`mim-scale bench step`), and what each checkpointing policy costs."""

import statistics
import time
from pathlib import Path

import torch

from mim_scale.cli import run
from mim_scale.config import PretrainConfig
from mim_scale.config_file import load_config
from mim_scale.methods.build import build_method
from mim_scale.methods.cost import FEWEST_FIRST
from mim_scale.methods.noise import noise_batch

RUNS = 5
CONFIGS = Path(__file__).parents[1] / "configs"


def main() -> None:
    """Print the figures of docs/benchmarks/2026-11-26-step.md."""
    run(["bench", "step", "--config", *(str(CONFIGS / f"{size}.yaml") for size in ("tiny", "base"))])
    torch.set_num_threads(1)
    methods = {}
    for policy in FEWEST_FIRST:
        config = load_config(PretrainConfig, CONFIGS / "demo.yaml", [f"train.activation_checkpointing={policy}"])
        methods[policy] = build_method(config)
    batch = noise_batch(config, torch.device("cpu"))
    seconds: dict[str, list[float]] = {policy: [] for policy in methods}
    for _ in range(RUNS + 1):
        for policy, method in methods.items():
            start = time.process_time()
            method(batch).total.backward()
            seconds[policy].append(time.process_time() - start)
    for policy, values in seconds.items():
        median = statistics.median(values[1:])
        print(f"demo step, checkpointing {policy}: {median:.3f} ({min(values[1:]):.3f} to {max(values[1:]):.3f}) CPU s")


if __name__ == "__main__":
    main()
