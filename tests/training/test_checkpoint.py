"""A checkpoint is whole or absent: a crash at any operation of a save leaves the old or the new state, no third."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mim_scale import commit
from mim_scale.errors import CheckpointError, OtherVersionError
from mim_scale.training import checkpoint
from mim_scale.training.checkpoint import MOMENTS, RECORD, WEIGHTS, CheckpointFolder, check_fits, read_checkpoint

FACTS = {"position": 8, "config": {}, "config_digest": "d", "fingerprint": "f", "world": 1}


def state(step: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    weights = {"layer.weight": torch.full((3, 5), float(step)), "layer.bias": torch.arange(3.0)}
    moments = {
        f"{name}/{moment}": value + step for name, value in weights.items() for moment in ("exp_avg", "exp_avg_sq")
    }
    return weights, moments


def save(folder: CheckpointFolder, *steps: int) -> None:
    for step in steps:
        folder.save(step, *state(step), FACTS)


def names(folder: CheckpointFolder) -> list[str]:
    return [path.name for path in folder.folders()]


def refuse_to_tell(text: str) -> None:
    raise AssertionError(text)


def assert_is(found: checkpoint.Checkpoint | None, step: int) -> None:
    assert found is not None
    assert found.step == step
    for loaded, expected in zip(found.load(), state(step), strict=True):
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_whole_checkpoint_of_another_version_is_not_passed_over(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    save(folder, 2, 4)
    path = folder.path / "step_00000004" / RECORD
    record = json.loads(path.read_text())
    del record["digest"]
    record["format_version"] = 2
    record["digest"] = commit.sha256_values(record)
    path.write_text(json.dumps(record))
    with pytest.raises(OtherVersionError, match="format version 2, this program reads 1"):
        folder.newest(refuse_to_tell)


def test_round_trip_and_retention(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    assert folder.newest(refuse_to_tell) is None
    save(folder, 2, 4, 6, 100_000_000)
    assert names(folder) == ["step_100000000", "step_00000006"]
    assert sorted(path.name for path in (folder.path / "step_00000006").iterdir()) == [MOMENTS, RECORD, WEIGHTS]
    assert_is(folder.newest(refuse_to_tell), 100_000_000)
    record = json.loads((folder.path / "step_00000006" / RECORD).read_text())
    assert record["format_version"] == 1
    assert record["position"] == 8
    assert record["versions"]["torch"]


class Crash(BaseException):
    """The process dies here."""


class CrashAt:
    """Wraps every operation that a save does on the disk, and dies before or after the n-th of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, after: bool) -> None:
        self.number, self.after, self.count = number, after, 0
        for module, name in (
            (checkpoint, "save_file"),
            (checkpoint, "write_file"),
            (checkpoint, "sha256_file"),
            (commit, "sync_file"),
            (commit, "sync_folder"),
            (os, "replace"),
            (os, "fsync"),
            (shutil, "rmtree"),
            (Path, "mkdir"),
        ):
            monkeypatch.setattr(module, name, self.wrapped(getattr(module, name)))

    def wrapped(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            number, self.count = self.count, self.count + 1
            if number == self.number and not self.after:
                raise Crash
            result = operation(*arguments, **options)
            if number == self.number:
                raise Crash
            return result

        return call


def count_operations(tmp_path: Path) -> int:
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = CheckpointFolder(tmp_path / "counted", keep=1)
        save(folder, 1, 2)
        counter = CrashAt(monkeypatch, -1, after=False)
        save(folder, 3)
    return counter.count


@pytest.mark.parametrize("after", [False, True])
def test_crash_at_every_operation_leaves_old_or_new(tmp_path: Path, after: bool) -> None:
    total = count_operations(tmp_path)
    assert total > 15
    outcomes = []
    for number in range(total):
        path = tmp_path / f"crash_{after}_{number}"
        save(CheckpointFolder(path, keep=1), 1)
        with pytest.MonkeyPatch.context() as monkeypatch:
            CrashAt(monkeypatch, number, after)
            with pytest.raises(Crash):
                save(CheckpointFolder(path, keep=1), 2)
        # A new process: nothing is remembered but the disk.
        again = CheckpointFolder(path, keep=1)
        again.remove_leftovers()
        assert all(entry.name.startswith("step_") for entry in path.iterdir())
        found = again.newest(refuse_to_tell)
        assert found is not None
        assert_is(found, found.step)
        outcomes.append(found.step)
        save(again, 3)
        assert names(again) == ["step_00000003"]
    assert outcomes == sorted(outcomes), "once the new one stands it never falls back"
    assert set(outcomes) == {1, 2}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = [
    *[(damage, name) for damage in (flip, truncate, Path.unlink) for name in (WEIGHTS, MOMENTS, RECORD)],
    (lambda path: path.write_text("{}"), RECORD),
    (lambda path: path.write_text("[1]"), RECORD),
    (lambda path: path.write_bytes(b"\xff"), RECORD),
]


@pytest.mark.parametrize(("damage", "name"), DAMAGES)
def test_damaged_one_is_named_and_skipped(tmp_path: Path, damage: Callable[[Path], None], name: str) -> None:
    save(CheckpointFolder(tmp_path, keep=3), 1, 2, 3)
    damage(tmp_path / "step_00000003" / name)
    told: list[str] = []
    folder = CheckpointFolder(tmp_path, keep=2)
    assert_is(folder.newest(told.append), 2)
    assert len(told) == 1
    assert "step_00000003" in told[0]
    # The damaged one does not count as kept: two good ones remain, and the next save takes its name.
    save(folder, 3)
    assert_is(folder.newest(refuse_to_tell), 3)
    assert names(folder) == ["step_00000003", "step_00000002"]


def test_damaged_ones_do_not_push_good_ones_out(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    save(folder, 1, 2)
    flip(tmp_path / "step_00000002" / WEIGHTS)
    again = CheckpointFolder(tmp_path, keep=2)
    save(again, 5)
    assert names(again) == ["step_00000005", "step_00000002", "step_00000001"]


def test_all_damaged_is_an_error_not_a_new_beginning(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    save(folder, 1, 2)
    for name in names(folder):
        truncate(tmp_path / name / MOMENTS)
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is whole"):
        CheckpointFolder(tmp_path, keep=2).newest(lambda text: None)


def test_other_format_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 99)
    save(CheckpointFolder(tmp_path, keep=1), 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format version 99, this program reads 1"):
        read_checkpoint(tmp_path / "step_00000001")


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"layer.weight": (3, 5)}, "the model has no layer.bias"),
        ({"layer.weight": (3, 4), "layer.bias": (3,)}, r"layer.weight is \[3, 5\], the model's is \[3, 4\]"),
        ({"layer.weight": (3, 5), "layer.bias": (3,), "head": (1,)}, "has no tensor head"),
    ],
)
def test_checkpoint_of_another_model_is_refused(tmp_path: Path, shapes: dict[str, tuple[int, ...]], words: str) -> None:
    save(CheckpointFolder(tmp_path, keep=1), 1)
    with pytest.raises(CheckpointError, match=words):
        check_fits(read_checkpoint(tmp_path / "step_00000001"), state(1)[0], shapes)
