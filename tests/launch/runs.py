"""Small real runs under launchers: where they stand, what they ended with."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from mim_scale.training.journal import read_journal
from tests.synthetic import make_dataset
from tests.training.checkpoints import state_of
from tests.training.jobs import PRETRAIN, write_config
from tests.training.standin import small_config

LIMIT_S = 180


def small_run(folder: Path, steps: int = 8, engine: str = "plain") -> Path:
    """A store and a config; a step takes a third of a second."""
    make_dataset(folder / "store")
    config = small_config(str(folder / "store"), str(folder / "run"), steps=steps, engine=engine)
    return write_config(config, folder)


def arguments(config: Path, output: Path) -> list[str]:
    """What every launcher is given."""
    return [PRETRAIN, "--config", str(config), f"output={output}", "held_out.every=100"]


def until(happened: Callable[[], Any], is_alive: Callable[[], bool]) -> Any:
    """What happened, once it did."""
    deadline = time.monotonic() + LIMIT_S
    while not (found := happened()):
        assert is_alive(), "it ended before it happened"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def losses(output: Path) -> dict[int, float]:
    """Of every step that was made."""
    return {row["step"]: row["loss"] for row in read_journal(output / "journal.jsonl") if row["kind"] == "step"}


def ranks(pid: int) -> list[psutil.Process]:
    """The processes below pid that train."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            command = process.cmdline()
            if PRETRAIN in command[:4] and "torch.distributed.run" not in command:
                found.append(process)
    return sorted(found, key=lambda process: int(process.environ().get("RANK", "0")))


def assert_same_end(output: Path, other: Path) -> None:
    """Bit for bit: weights, moments, losses."""
    steps = max(losses(other))
    for ours, theirs in zip(state_of(output, steps), state_of(other, steps), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert losses(output) == losses(other)
    assert sorted(losses(output)) == list(range(1, steps + 1))
