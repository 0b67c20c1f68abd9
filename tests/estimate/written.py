"""Runs and links as they are found on disk, made up, and what is said of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from mim_scale.cli import run
from mim_scale.config_file import dump_config
from mim_scale.estimate.scaling import Link, ring_s
from mim_scale.methods.cost import Cost
from mim_scale.training.journal import Journal
from mim_scale.training.run_folder import CONFIG, JOURNAL
from tests.training.standin import small_config

MILLION = 1_000_000
GIB = 2**30
COST = Cost(
    MILLION, 0, 0, activation_bytes=GIB, gradient_bytes=4 * MILLION, state_bytes=12 * MILLION, batch_bytes=0, tensors=9
)
WITHIN, BETWEEN = Link(1e-5, 1e9), Link(1e-4, 1e8)


def write_run(
    folder: Path,
    world: int = 1,
    step_s: float = 0.5,
    steps: int = 30,
    is_kept: bool = True,
    start: dict[str, Any] | None = None,
    **train: Any,
) -> Path:
    """A run of steps that wait a tenth of their time, with a save and a measurement every ten.

    Args:
        start: What else its first row tells.
    """
    config = small_config(**{"steps": 100, "batch": 8, "engine": "plain", "activation_checkpointing": "none"} | train)
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(dump_config(config))
    journal = Journal(folder / JOURNAL)
    chosen = {"device": "cpu", "hosts": 1, "activation_checkpointing": "none", "zero_stage": 0}
    journal.write("start", 0, time=0.0, world=world, **(chosen if start is None else start))
    for step in range(1, steps + 1):
        seconds = step_s * (1 + 0.02 * (step % 3 - 1))
        facts = {"samples_per_second": config.train.batch / seconds, "data_wait": 0.1, "loss": 1.0}
        journal.write("step", step, time=float(step), **facts)
        if is_kept and step % 10 == 0:
            journal.write("save", step, time=float(step), stall_s=0.02, write_s=0.4, bytes=1)
            journal.write("held_out", step, time=step + 3.0, held_out={"loss": 1.0})
    journal.close()
    return folder


def write_link(path: Path) -> Path:
    parts = {}
    for name, known, members in (("within", WITHIN, 8), ("between", BETWEEN, 2)):
        sizes = [4, 1 << 20]
        seconds = [ring_s(size, members, known) for size in sizes]
        parts[name] = {**vars(known), "members": members, "sizes": sizes, "seconds": seconds}
    path.write_text(json.dumps({"kind": "mim-scale link", "device": "cpu", "cores": 8, **parts}))
    return path


def estimated(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert run(["estimate", "--json", *map(str, words)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found
