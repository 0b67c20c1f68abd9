"""What a rank holds, measured beside predicted, by engine and ZeRO stage, on this machine's cores.

Each row is a launch of its own: `python -m benchmarks.rank_memory [--config CONFIG] [key=value ...]`. A rank builds its
engine, makes two steps of noise, and tells by how much its resident size rose at most.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from mim_scale.config import PretrainConfig
from mim_scale.config_file import load_config
from mim_scale.estimate.micro_batch import reset_peak
from mim_scale.methods.build import build_method
from mim_scale.methods.cost import Cost, cost_of
from mim_scale.methods.noise import noise_batch
from mim_scale.training.engine import accumulation, build_engine
from mim_scale.training.memory import peak_resident_bytes
from mim_scale.training.placement import read_placement
from mim_scale.training.rank_memory import rank_memory
from mim_scale.training.ranks import joined

ROOT = Path(__file__).parents[1]
ENGINES = ("plain", "0", "1", "2", "3")
WORLDS = (1, 2)
STEPS = 2
RESULT = "PEAK "
MIB = 2**20


def main() -> None:
    """Print the table, or, as a rank, its own peak."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.yaml")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES, help="plain, or a ZeRO stage")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    config = load_config(PretrainConfig, options.config, options.overrides)
    if options.rank:
        print(RESULT + json.dumps(peak_of(config)), flush=True)
        os._exit(0)
    cost = cost_of(config, config.train.activation_checkpointing)
    print(f"{cost.parameters:,} parameters, {cost.activation_bytes / MIB:.0f} MiB of activations")
    print("| engine | ranks | micro-batches a step | measured, MiB | predicted, MiB | off by |")
    print("|---|---|---|---|---|---|")
    for engine in options.engines:
        for world in WORLDS:
            print(row_of(engine, world, cost, options), flush=True)


def settings_of(options: argparse.Namespace, engine: str) -> list[str]:
    """The settings of an engine, behind those of the command line."""
    chosen = ["train.engine=plain"] if engine == "plain" else ["train.engine=deepspeed", f"train.zero_stage={engine}"]
    return [*options.overrides, "checkpoint.background=false", *chosen]


def row_of(engine: str, world: int, cost: Cost, options: argparse.Namespace) -> str:
    """One launch: the rank that held most."""
    overrides = settings_of(options, engine)
    config = load_config(PretrainConfig, options.config, overrides)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    done = subprocess.run(
        [*launcher, "-m", "benchmarks.rank_memory", "--rank", "--config", str(options.config), *overrides],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    # Ranks share the launcher's output: their lines may follow each other without a break.
    peaks = [json.loads(part.split()[0]) for part in done.stdout.split(RESULT)[1:]]
    if len(peaks) != world:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    predicted = rank_memory(cost, config, world, world, is_on_host=True).device
    name = "plain" if engine == "plain" else f"DeepSpeed stage {engine}"
    count = config.train.batch // (config.train.micro_batch * world)
    cells = [name, str(world), str(count), f"{max(peaks) / MIB:.0f}", f"{predicted / MIB:.0f}"]
    return f"| {' | '.join(cells)} | {predicted / max(peaks) - 1:+.0%} |"


def peak_of(config: PretrainConfig) -> int:
    """Bytes that this rank held at most above what it held before its network was built."""
    with joined(read_placement(os.environ)) as ranks:
        if config.train.engine == "deepspeed":
            import mim_scale.training.engine_deepspeed  # noqa: F401  # libraries are no part of it
        batch = noise_batch(config, ranks.device)
        before = reset_peak(torch.device("cpu"))
        engine = build_engine(build_method(config, config.train.activation_checkpointing), config, ranks)
        count = accumulation(config, ranks)
        for _ in range(STEPS):
            engine.set_rates(1e-4)
            for index in range(count):
                engine.forward_backward(batch, last=index == count - 1)
            engine.update()
        peak = peak_resident_bytes() - before
        ranks.gather([0.0])
        return peak


if __name__ == "__main__":
    main()
