"""One row a step, whatever was killed when."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mim_scale.errors import CheckpointError
from mim_scale.training.journal import Journal, read_journal
from mim_scale.training.tracking import metrics_of


def write_steps(path: Path, first: int, last: int) -> None:
    journal = Journal(path)
    journal.write("start", first - 1, fingerprint="f")
    for step in range(first, last + 1):
        journal.write("step", step, loss=float(step))
        if step % 2 == 0:
            journal.write("held_out", step, held_out={"loss": step / 2})
    journal.sync()
    journal.close()


def steps(path: Path, kind: str = "step") -> list[int]:
    return [row["step"] for row in read_journal(path) if row["kind"] == kind]


def test_repeated_steps_are_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "run" / "journal.jsonl"
    write_steps(path, 1, 7)
    write_steps(path, 5, 9)
    assert steps(path) == list(range(1, 10))
    assert steps(path, "held_out") == [2, 4, 6, 8]
    assert steps(path, "start") == [0, 4]


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(1, 400), restart=st.integers(1, 6))
def test_a_journal_cut_anywhere_goes_on(tmp_path_factory: pytest.TempPathFactory, cut: int, restart: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "journal.jsonl"
    write_steps(path, 1, 6)
    os.truncate(path, max(0, path.stat().st_size - cut))
    left = steps(path)
    assert left == list(range(1, len(left) + 1))
    write_steps(path, min(restart, len(left) + 1), 8)
    assert steps(path) == list(range(1, 9))
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_remembers_what_it_was_begun_on(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write_steps(path, 1, 3)
    journal = Journal(path)
    assert (journal.last_step, journal.last_held_out) == (3, 2)
    assert journal.first_start is not None
    assert journal.first_start["fingerprint"] == "f"
    journal.close()


def test_damage_before_the_last_line_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write_steps(path, 1, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"kind": "st\n' + b"".join(lines[2:]))
    with pytest.raises(CheckpointError, match="line 2 is not a row"):
        Journal(path)


def test_missing_journal_has_no_rows(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "none.jsonl") == []


def test_full_disk_is_one_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.close()
    journal._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(CheckpointError, match="No space left"):
        journal.write("step", 1, loss=1.0)
    journal.close()


def test_metrics_of_a_row() -> None:
    row = {"kind": "step", "step": 3, "time": 1.0, "loss": 2.0, "parts": {"level_1": 1.5}, "epoch": 1}
    assert metrics_of(row) == {"loss": 2.0, "parts/level_1": 1.5, "epoch": 1.0}
