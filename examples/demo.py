"""`make demo`: real CT in, pre-trained weights out, by the commands that a user would type.

    .venv/bin/python examples/demo.py [key=value ...]

Each step prints its command first. Interrupt it whenever you like: started again, every step goes on from where it
was or says that it is done. Overrides (for example train.steps=40) go to the training.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_pipeline.example_data import default_cache
from mim_scale.config import PretrainConfig
from mim_scale.config_file import load_config
from mim_scale.errors import exit_with

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
CONFIG = ROOT / "configs" / "demo.yaml"
SPACING_MM = "2"
"""A box of the demo is then 19 cm of every volume; at their own spacings (0.6 to 10 mm) half of the boxes were air."""


def demo() -> int:
    """Run every step; stop at the first that fails, with its exit code."""
    overrides = sys.argv[1:]
    config = load_config(PretrainConfig, CONFIG, overrides)
    cache = default_cache().absolute()
    os.chdir(ROOT)
    # The launcher imports mlflow before any code of ours could say so.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    output = Path(config.output)
    encoder = output / "encoder"
    steps: list[tuple[str, list[str]]] = [
        ("Fetch real CT", ["mim-scale", "example-data", "--cache", str(cache)]),
        ("Build the store", ["mim-scale", "data", "build", "--spacing", SPACING_MM, str(cache), config.data.store]),
        ("Verify every voxel of it", ["mim-scale", "data", "verify", "--deep", config.data.store]),
        ("Pre-train", [*launcher(config), "launch/pretrain.py", "--config", str(CONFIG.relative_to(ROOT)), *overrides]),
        ("Export the encoder", ["mim-scale", "export", str(output), str(encoder)]),
        ("Load it back", [sys.executable, "-c", f"import mim_scale; mim_scale.load_encoder({str(encoder)!r})"]),
    ]
    console = Console()
    seconds = []
    for number, (title, command) in enumerate(steps, start=1):
        console.rule(f"[bold]{number}/{len(steps)} {title}", align="left")
        console.print(f"$ {' '.join(command)}", style="dim", soft_wrap=True, highlight=False)
        start = time.monotonic()
        code = subprocess.run(command, check=False).returncode
        seconds.append(time.monotonic() - start)
        if code:
            console.print(f"This step ended with exit code {code}; the same command goes on from here.", style="red")
            return code
    report(console, config, encoder, [(title, s) for (title, _), s in zip(steps, seconds, strict=True)])
    return 0


def launcher(config: PretrainConfig) -> list[str]:
    """The deepspeed launcher with as many ranks as there are GPUs, or two on a CPU, that the batch divides by."""
    from torch.cuda import device_count

    ranks = min(device_count() or min(2, os.cpu_count() or 1), config.train.batch // config.train.micro_batch)
    while config.train.batch % (ranks * config.train.micro_batch):
        ranks -= 1
    return ["deepspeed", "--num_gpus", str(ranks)]


def report(console: Console, config: PretrainConfig, encoder: Path, seconds: list[tuple[str, float]]) -> None:
    """Say what was made, where it lies, how fast it went, and what to type next."""
    output, store = Path(config.output), Path(config.data.store)
    rows = [json.loads(line) for line in (output / "journal.jsonl").read_text().splitlines()]
    record = json.loads((store / "dataset.json").read_text())
    speeds = sorted(row["samples_per_second"] for row in rows if "samples_per_second" in row)
    console.rule("[bold]What was made", align="left")
    table = Table(show_header=True, header_style="bold", box=None, pad_edge=False)
    for column in ("what", "where", "how much"):
        table.add_column(column, overflow="fold")
    table.add_row("store", str(store), f"{record['num_volumes']} volumes, {record['num_quarantined']} in quarantine")
    table.add_row("journal, one line a step", str(output / "journal.jsonl"), f"{config.train.steps} steps")
    table.add_row("checkpoints", str(output / "checkpoints"), f"newest {config.checkpoint.keep} kept")
    table.add_row("pictures", str(output / "pictures"), "reconstructions and loss curve")
    table.add_row("encoder", str(encoder), "model.safetensors + config.json")
    console.print(table)
    mlflow = f"{_bin()}/mlflow ui --backend-store-uri sqlite:///{output}/mlflow.db"
    console.print(f"metrics: {mlflow}", soft_wrap=True, highlight=False)
    for title, spent in seconds:
        console.print(f"  {spent:6.1f} s  {title}", highlight=False)
    if speeds:
        console.print(f"training speed: {speeds[len(speeds) // 2]:.2f} samples/s (median of {len(speeds)} steps)")
    held_out = next((row["held_out"] for row in reversed(rows) if "held_out" in row), {})
    for level in range(1, len(config.plan.levels) + 1):
        loss, trivial = held_out.get(f"level_{level}"), held_out.get(f"trivial_{level}")
        if loss is not None and trivial is not None:
            share = f"ratio {loss / trivial:.2f}" if trivial else "no error to compare with"
            console.print(f"held-out loss, level {level}: {loss:.5f}; trivial predictor: {trivial:.5f}; {share}")
    console.rule("[bold]Your own data", align="left")
    for command in (
        "mim-scale data plan /path/to/your/ct stores/mine --spacing 2",
        "mim-scale data build /path/to/your/ct stores/mine --spacing 2",
        "deepspeed --num_gpus 1 launch/pretrain.py --config configs/demo.yaml data.store=stores/mine output=runs/mine",
        "mim-scale export runs/mine encoders/mine",
    ):
        console.print(f"  {_bin()}/{command}", soft_wrap=True, highlight=False)


def _bin() -> Path:
    return BIN.relative_to(ROOT) if BIN.is_relative_to(ROOT) else BIN


if __name__ == "__main__":
    exit_with(demo)
