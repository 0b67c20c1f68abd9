"""A run on a failing cluster, simulated: 300 seeds hold, and a program with a fault of its own does not."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mim_scale.sampling.order import micro_batches
from mim_scale.training import checkpoint, loop, run_folder, saving
from mim_scale.training.guards import Guards
from mim_scale.training.journal import Journal
from mim_scale.training.records import Records
from mim_scale.training.tracking_mlflow import MlflowTracker
from tests.simulation.patches import patched
from tests.simulation.simulate import BrokenError, in_memory, simulate, simulate_some

SEEDS, PART = 300, 25
KINDS = 12
MOST_SEEDS = 200


@pytest.mark.parametrize("first", range(0, SEEDS, PART))
def test_seeds(first: int) -> None:
    count, happened, failed = simulate_some(range(first, first + PART))
    assert not failed, failed[0]
    assert count == PART
    assert len(happened) >= KINDS, happened


def test_a_seed_is_replayed(tmp_path: Path) -> None:
    """Turn by turn, so that a failing one can be looked at."""
    logs = []
    with patched():
        for _ in range(2):
            logs.append(simulate(29, tmp_path).log)
    assert logs[0] == logs[1]
    assert len(logs[0]) > 10


def _wait_for_own_thread(self: Any, wait_s: float | None = 0.0, look: Any = saving.Saver.look) -> bool:
    if self._under_way is not None and not self._background:
        self._under_way.thread.join()
    done: bool = look(self, wait_s)
    return done


def _mirrored(step: int, batch: int, micro_batch: int, rank: int, world: int) -> list[range]:
    return micro_batches(step, batch, micro_batch, world - 1 - rank, world)


def _schedule_late(config: Any, ranks: Any, first_step: int, schedule: Any = loop._schedule) -> Any:
    last = config.train.steps - 1
    if first_step in (0, last):
        return schedule(config, ranks, first_step)
    return itertools.chain(schedule(config, ranks, first_step + 1), schedule(config, ranks, last))


FAULTY_PROGRAMS: dict[str, tuple[Any, str, Callable[..., Any], str]] = {
    "ranks take each other's samples": (loop, "micro_batches", _mirrored, "history is not"),
    "a sample is left out at each start": (loop, "_schedule", _schedule_late, "history is not"),
    "a torn row stays in the journal": (
        Journal,
        "_cut",
        lambda self, end: setattr(self, "_end", end),
        "no fault excuses it",
    ),
    "the journal is not durable before a save": (Records, "sync", lambda self: None, "journal has steps"),
    "hashes are not compared": (
        checkpoint,
        "read_checkpoint",
        checkpoint.read_record,
        "is not what|no fault excuses it",
    ),
    "the oldest checkpoint is taken up": (
        checkpoint.CheckpointFolder,
        "folders",
        lambda self, folders=checkpoint.CheckpointFolder.folders: folders(self)[::-1],
        "taken up at step",
    ),
    "steps left out are forgotten": (
        Guards,
        "recall",
        lambda self, rows, step, updates: setattr(self, "updates", step),
        "is not what",
    ),
    "a failed share is waited for": (saving.Saver, "look", _wait_for_own_thread, "StuckError"),
    "MLflow is not asked what it has": (
        MlflowTracker,
        "_last_step",
        lambda self, mark: self._seen.get(mark, -1),
        "MLflow has steps",
    ),
    "nothing keeps a second launch out": (
        run_folder.fcntl,
        "flock",
        lambda descriptor, how: None,
        "two launches hold the folder|no fault excuses it",
    ),
}
"""Of the training: what is wrong, and where; and what the simulation says to it."""
LATE = {"a failed share is waited for": 150, "a torn row stays in the journal": 25, "hashes are not compared": 40}
"""What few seeds find: where to begin, to save time."""


@pytest.mark.parametrize("name", FAULTY_PROGRAMS)
def test_a_faulty_program_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, value, words = FAULTY_PROGRAMS[name]
    with in_memory() as folder, patched():
        monkeypatch.setattr(owner, attribute, value)
        for seed in range(LATE.get(name, 0), MOST_SEEDS):
            try:
                simulate(seed, folder)
            except BrokenError as error:
                found = str(error)
                break
        else:
            pytest.fail(f"{name}: no seed below {MOST_SEEDS} found it")
    assert re.search(words, found), found
    assert f"--first {seed} " in found
