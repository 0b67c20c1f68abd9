"""How long training stands still for a save, beside a plain `torch.save` of the same state on one rank, in turns.

`python -m benchmarks.checkpoints`, or several ranks: `torchrun --nproc_per_node 2 -m benchmarks.checkpoints`. The stall
is that of the slowest rank. The plain save is of rank 0 alone, and does not count how the state came to be there.
"""

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
ENGINES = {"plain": ["train.engine=plain"]} | {
    f"DeepSpeed stage {stage}": ["train.engine=deepspeed", f"train.zero_stage={stage}"] for stage in (1, 2, 3)
}


def main() -> None:
    """Print a table: medians and ranges of ROUNDS turns after one that is not counted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/base.yaml"))
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the one of temporary files)")
    options = parser.parse_args()
    with joined(read_placement(os.environ)) as ranks:
        say = print if ranks.rank == 0 else lambda *_, **__: None
        threads = torch.get_num_threads()
        say(f"{platform.machine()}, {os.cpu_count()} cores, {ranks.world} ranks of {threads} threads")
        say("| engine | state, MB | torch.save, s | stall, s | stall / torch.save | written in, s | first stall, s |")
        say("|---|---|---|---|---|---|---|")
        for name, settings in ENGINES.items():
            with tempfile.TemporaryDirectory(dir=options.folder) as own:
                folder = Path(ranks.broadcast(own))
                config = load_config(PretrainConfig, options.config, [*settings, f"output={folder}/run"])
                say(f"| {name} | {measure(config, ranks, folder)} |", flush=True)
                ranks.gather([0.0])


def measure(config: PretrainConfig, ranks: Ranks, folder: Path) -> str:
    """The columns of one engine; of rank 0."""
    module = build_method(config, "none")
    engine = build_engine(module, config, ranks)
    fill(engine)
    records = Records(config, "f" * 64, [(1.0, 1.0, 1.0)] * 2, ranks.world, is_kept_here=ranks.rank == 0)
    plain, stalls, faults = [], [], []
    with records:
        ranks.on_first(records.take_up)
        progress = Progress(0, 1, 1, is_shown=False)
        with Saver(engine, ranks, records, progress, range(ranks.world), background=True) as saver:
            for turn in range(ROUNDS + 1):
                plain.append(torch_save(engine, ranks, folder / "plain.pt"))
                os.sync()
                ranks.gather([0.0])
                began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                saver.save(turn + 1, turn + 1)
                stalls.append(ranks.gather([time.perf_counter() - began]).max())
                faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
                saver.finish()
    engine.close()
    if ranks.rank:
        return ""
    rows = [row for row in read_journal(folder / "run" / "journal.jsonl") if row["kind"] == "save"]
    ratios = [stall / saved for stall, saved in zip(stalls[1:], plain[1:], strict=True)]
    columns = [f"{rows[0]['bytes'] / 1e6:.0f}", told(plain[1:]), told(stalls[1:]), told(ratios)]
    first = f"{stalls[0]:.3f} ({faults[0]:,} page faults; later {max(faults[1:]):,})"
    return " | ".join([*columns, told([row["write_s"] for row in rows[1:]]), first])


def fill(engine: Engine) -> None:
    """Moments as after a step, not the zeros that need no memory; the same on all ranks."""
    torch.manual_seed(0)
    weights, moments = {}, {}
    for kind, name, tensor in engine.state():
        if kind == "weights":
            weights[name] = tensor.detach().clone()
        else:
            moments[name] = torch.rand(tensor.shape)
    engine.load_state(weights, moments, updates=1)


def torch_save(engine: Engine, ranks: Ranks, path: Path) -> float:
    """Seconds of a save as most programs make it: into a file that is replaced, neither synced nor hashed."""
    found = gathered(engine)
    os.sync()
    seconds = 1.0
    if ranks.rank == 0:
        began = time.perf_counter()
        torch.save(found, path)
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
