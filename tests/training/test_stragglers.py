"""A rank that lags is named within 50 steps, once; one slow step names nobody."""

import random
import subprocess
from pathlib import Path

import pytest
import torch

from mim_scale.training.journal import read_journal
from mim_scale.training.stragglers import TIMES, WINDOW, ForwardClock, Stragglers, slowest
from tests.synthetic import make_dataset
from tests.training.jobs import PRETRAIN, ROOT, environment, torchrun, write_config
from tests.training.standin import small_config

SITE = """
import os, time
from mim_scale.methods.mask_in_mask import MaskInMask
real = MaskInMask.forward
def slow(self, batch):
    if os.environ.get("RANK") == "1":
        time.sleep(0.3)
    return real(self, batch)
MaskInMask.forward = slow
"""


def steps_of(world: int, slow: int | None, count: int, times: float, seed: int) -> list[list[float]]:
    draw = random.Random(seed)
    return [[draw.uniform(0.9, 1.1) * (times if rank == slow else 1.0) for rank in range(world)] for _ in range(count)]


@pytest.mark.parametrize("world", [2, 3, 8, 64])
def test_a_slow_rank_is_named_within_fifty_steps_and_once(world: int) -> None:
    stragglers = Stragglers([f"host{rank}" for rank in range(world)])
    for own_s in steps_of(world, None, 200, 1.0, seed=world):
        assert stragglers.note(own_s) == []
    told = [line for own_s in steps_of(world, 1, 50, 1.5, seed=1) for line in stragglers.note(own_s)]
    assert len(told) == 1
    assert told[0].startswith("rank 1 on host1 is slow: 1.")
    for own_s in steps_of(world, None, 50, 1.0, seed=2):
        assert stragglers.note(own_s) == []
    assert [line for own_s in steps_of(world, 1, 50, 1.5, seed=3) for line in stragglers.note(own_s)], "fell back again"


def test_a_slow_step_now_and_then_is_none() -> None:
    stragglers = Stragglers(["a", "b"])
    for number, own_s in enumerate(steps_of(2, None, 200, 1.0, seed=5)):
        assert stragglers.note([own_s[0], own_s[1] * (20 if number % 4 == 0 else 1)]) == []


def test_alone_nobody_lags() -> None:
    stragglers = Stragglers(["a"])
    assert all(not stragglers.note([float(number)]) for number in range(3 * WINDOW))


def test_slowest() -> None:
    rank, times = slowest([1.0, 3.0, 2.0, 2.0])
    assert (rank, times) == (1, 1.5)
    assert slowest([0.0, 0.0])[0] == 0


def test_the_clock_counts_forward_passes_alone() -> None:
    module = torch.nn.Linear(2, 2)
    with ForwardClock(module, torch.device("cpu")) as clock:
        for _ in range(2):
            module(torch.zeros(1, 2))
        assert 0 < clock.take() < 1
        assert clock.take() == 0
    module(torch.zeros(1, 2))
    assert clock.take() == 0


@pytest.mark.dist
@pytest.mark.soak
def test_two_ranks_one_of_them_slow(tmp_path: Path) -> None:
    make_dataset(tmp_path / "store")
    (tmp_path / "sitecustomize.py").write_text(SITE)
    config = write_config(small_config(str(tmp_path / "store"), str(tmp_path / "run"), steps=50), tmp_path)
    command = [*torchrun(2), PRETRAIN, "--config", str(config), "held_out.every=1000", "checkpoint.every=50"]
    job = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(PYTHONPATH=f"{tmp_path}:{ROOT}"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert job.returncode == 0, job.stderr[-2000:]
    (line,) = [line for line in job.stdout.splitlines() if "is slow" in line]
    assert line.startswith("step 20: rank 1 on ")
    rows = [row for row in read_journal(tmp_path / "run" / "journal.jsonl") if row["kind"] == "step"]
    assert sum(row["slowest_rank"] == 1 and row["slowest_times"] > TIMES for row in rows) > 40
