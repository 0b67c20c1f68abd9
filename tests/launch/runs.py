"""Small real runs under launchers: where they stand, what they ended with."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from mim_scale.training.journal import read_journal
from tests.synthetic import make_dataset
from tests.training.checkpoints import state_of
from tests.training.jobs import PRETRAIN, ROOT, environment, write_config
from tests.training.standin import small_config

LIMIT_S = 180
SUPERVISE = [sys.executable, str(ROOT / "launch" / "supervise.py")]


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


@contextlib.contextmanager
def supervised(*words: str, options: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """A supervisor over words, its lines in a pipe; whatever of it is alive at the end is ended."""
    job = subprocess.Popen(
        [*SUPERVISE, *options, "--", *words],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield job
    finally:
        for process in family(job):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        job.kill()
        job.wait(timeout=LIMIT_S)


def family(job: subprocess.Popen[str]) -> list[psutil.Process]:
    """All that came of a job."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(job.pid).children(recursive=True)
    return []


def ended(job: subprocess.Popen[str], limit_s: float = LIMIT_S) -> tuple[int, list[str]]:
    """The code, and what the supervisor said."""
    _, text = job.communicate(timeout=limit_s)
    return job.returncode, [line for line in text.splitlines() if line.startswith(("supervisor: ", "error: "))]


def gone(processes: list[psutil.Process], within_s: float = 5) -> bool:
    """Whether none of them runs any more."""
    # Orphans whose parents were killed may stay as zombies of a process 1 that does not look after them.
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        alive = [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return True
        time.sleep(0.05)
    return False
