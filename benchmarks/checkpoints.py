"""How long training stands still for a save, beside a plain `torch.save` of the same state, in turns, on one rank."""

import argparse
import os
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch

from mim_scale.config import PretrainConfig
from mim_scale.config_file import load_config
from mim_scale.methods.build import build_method
from mim_scale.training.engine import Engine, build_engine
from mim_scale.training.journal import read_journal
from mim_scale.training.placement import read_placement
from mim_scale.training.progress import Progress
from mim_scale.training.ranks import Ranks, joined
from mim_scale.training.records import Records
from mim_scale.training.saving import Saver

ROUNDS = 5
ENGINES = {"plain": ["train.engine=plain"], "DeepSpeed stage 1": ["train.engine=deepspeed", "train.zero_stage=1"]}


def main() -> None:
    """Print a table: medians and ranges of ROUNDS turns after one that is not counted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/base.yaml"))
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the one of temporary files)")
    options = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| engine | state, MB | torch.save, s | stall, s | stall / torch.save | written in, s | first stall, s |")
    print("|---|---|---|---|---|---|---|")
    with joined(read_placement(os.environ)) as ranks:
        for name, settings in ENGINES.items():
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                config = load_config(PretrainConfig, options.config, [*settings, f"output={folder}/run"])
                print(f"| {name} | {measure(config, ranks, Path(folder))} |", flush=True)


def measure(config: PretrainConfig, ranks: Ranks, folder: Path) -> str:
    """The columns of one engine."""
    module = build_method(config, "none")
    engine = build_engine(module, config, ranks)
    fill(engine)
    records = Records(config, "f" * 64, [(1.0, 1.0, 1.0)] * 2, ranks.world, is_kept_here=True)
    plain, faults = [], []
    with records:
        records.take_up()
        progress = Progress(0, 1, 1, is_shown=False)
        with Saver(engine, ranks, records, progress, (0,), background=True) as saver:
            for turn in range(ROUNDS + 1):
                os.sync()
                plain.append(torch_save(engine, folder / "plain.pt"))
                os.sync()
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                saver.save(turn + 1, turn + 1)
                faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
                saver.finish()
    engine.close()
    rows = [row for row in read_journal(folder / "run" / "journal.jsonl") if row["kind"] == "save"]
    stalls, writes = ([row[name] for row in rows[1:]] for name in ("stall_s", "write_s"))
    ratios = [stall / saved for stall, saved in zip(stalls, plain[1:], strict=True)]
    columns = [f"{rows[0]['bytes'] / 1e6:.0f}", *(told(values) for values in (plain[1:], stalls, ratios, writes))]
    first = f"{rows[0]['stall_s']:.3f} ({faults[0]:,} page faults; later {max(faults[1:]):,})"
    return " | ".join([*columns, first])


def fill(engine: Engine) -> None:
    """Moments as after a step, not the zeros that need no memory."""
    weights, moments = {}, {}
    for kind, name, tensor in engine.state():
        if kind == "weights":
            weights[name] = tensor.detach().clone()
        else:
            moments[name] = torch.rand(tensor.shape)
    engine.load_state(weights, moments, updates=1)


def torch_save(engine: Engine, path: Path) -> float:
    """Seconds of a save as most programs make it: into a file that is replaced, neither synced nor hashed."""
    began = time.perf_counter()
    torch.save(gathered(engine), path)
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def gathered(engine: Engine) -> dict[str, dict[str, torch.Tensor]]:
    """The live tensors by kind and name; nothing is copied."""
    found: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "moments": {}}
    for kind, name, tensor in engine.state():
        found[kind][name] = tensor.detach()
    return found


def told(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
