"""A build as a user meets it: all accounted for, interruptible anywhere, and never a danger to what was there."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.build.executor import Work
from data_pipeline.build.ledger import builder_lock
from data_pipeline.build.run import Outcome, Silent, run_build
from data_pipeline.build.task import Task, TaskResult, build_volume, died
from mim_scale.errors import SourceError, StoreError
from mim_scale.store.dataset import Dataset
from mim_scale.store.geometry import whole_box
from mim_scale.store.manifest import Row
from tests.pipeline.sources import Series, config, oracle, phantom, write_image, write_series

ROOT = Path(__file__).parents[2]


class Inline:
    """The plain twin of the executors: one task after the other, here."""

    def run(self, work: Work, tasks: Iterable[Task]) -> Generator[TaskResult]:
        for task in tasks:
            yield work(task)


@pytest.fixture
def _inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.build.run.make_executor", lambda config: Inline())


def _archive(root: Path) -> Path:
    """Five good inputs in four formats, one twice, and four bad ones."""
    write_image(root / "a.nii.gz", phantom(0), "RAS")
    write_image(root / "b.nrrd", phantom(1), "PIR")
    write_image(root / "c.mha", phantom(2))
    write_series(root / "series one", Series(phantom(3)))
    write_series(root / "series two", Series(phantom(4), (1, 0, 0, 0, 0, -1)))
    write_image(root / "z copy of b.nii", phantom(1))
    (root / "broken.nii.gz").write_bytes(b"no gzip at all")
    (root / "what").write_bytes(b"?" * 1000)
    write_image(root / "labels.nii.gz", (phantom(0) > 0).astype(np.uint8))
    write_series(root / "gap", Series(phantom(5)), skip=(4,))
    (root / "notes.txt").write_text("words")
    return root


def _rows(store: Path) -> list[Row]:
    return sorted(Dataset.open(store).rows, key=lambda row: row.key)


def _files(store: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(store)): path.read_bytes() for path in (store / "volumes").rglob("*") if path.is_file()
    }


def _check_archive(outcome: Outcome) -> None:
    assert outcome.num_sources == len(outcome.rows) + len(outcome.quarantine) == 10
    assert outcome.num_ignored == 1
    assert dict(outcome.reasons) == {"duplicate": 1, "unreadable": 2, "hu_implausible": 1, "missing_slices": 1}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _archive(tmp_path_factory.mktemp("archive"))


@pytest.fixture(scope="module")
def clean(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of an uninterrupted local build."""
    store = tmp_path_factory.mktemp("clean") / "store"
    _check_archive(run_build(config(archive, store), Silent()))
    return store


def test_every_good_input_is_stored_as_simpleitk_reads_it(archive: Path, clean: Path) -> None:
    dataset = Dataset.open(clean)
    stored = [dataset.reader(row).read_box(0, whole_box(row.shape)) for row in dataset.rows]
    for inputs in ("a.nii.gz", "b.nrrd", "c.mha", "series one/*", "series two/*"):
        paths = sorted(archive.glob(inputs))
        if len(paths) > 1:
            continue  # SimpleITK wants slices in order; test_formats does that
        expected = oracle(paths)[0]
        assert sum(np.array_equal(expected, voxels) for voxels in stored) == 1
    for row, voxels in zip(dataset.rows, stored, strict=True):
        assert (row.hu_min, row.hu_max, row.bytes_raw) == (voxels.min(), voxels.max(), voxels.nbytes)
        assert row.hu_mean == pytest.approx(voxels.mean())


def test_nothing_that_names_a_person_or_a_file_is_in_the_store(clean: Path) -> None:
    text = b"".join(path.read_bytes() for path in clean.rglob("*") if path.is_file())
    dataset = Dataset.open(clean)
    shown = repr((dataset.rows, dataset.quarantine, dataset.record)).encode() + text
    for canary in (b"CANARY", b"series one", b"labels.nii", b"broken.nii", b"z copy"):
        assert canary not in shown


@pytest.mark.usefixtures("_inline")
def test_build_twice_and_with_another_executor_gives_the_same(archive: Path, clean: Path, tmp_path: Path) -> None:
    outcome = run_build(config(archive, tmp_path / "again"), Silent())
    assert outcome.fingerprint == Dataset.open(clean).fingerprint
    assert _rows(tmp_path / "again") == _rows(clean)
    assert _files(tmp_path / "again") == _files(clean)


@pytest.mark.ray
def test_ray_gives_the_same(archive: Path, clean: Path, tmp_path: Path) -> None:
    _check_archive(run_build(config(archive, tmp_path / "ray", executor="ray"), Silent()))
    assert _rows(tmp_path / "ray") == _rows(clean)
    assert Dataset.open(tmp_path / "ray").quarantine == Dataset.open(clean).quarantine
    assert _files(tmp_path / "ray") == _files(clean)


def test_a_finished_build_returns_at_once(archive: Path, clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.build.run.Inventory.read_headers", None)
    outcome = run_build(config(archive, clean), Silent())
    assert outcome.was_complete
    _check_archive(outcome)


@pytest.mark.parametrize(("num_done", "kill"), [(1, os.kill), (3, os.killpg)], ids=["driver killed", "all killed"])
def test_a_killed_build_goes_on(
    archive: Path, clean: Path, tmp_path: Path, num_done: int, kill: Callable[[int, int], None]
) -> None:
    store = tmp_path / "store"
    command = [sys.executable, "launch/build_shards.py", "--config", "configs/build.yaml"]
    command += [f"source={archive}", f"store={store}", "executor=local", "workers=1"]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    ledger = store / "build" / "ledger.jsonl"
    deadline = time.monotonic() + 60
    while not (ledger.is_file() and ledger.read_bytes().count(b"\n") >= num_done) and time.monotonic() < deadline:
        time.sleep(0.002)
    kill(process.pid, signal.SIGKILL)
    process.wait()
    _wait_until_gone(process.pid)
    if not (store / "dataset.json").is_file():
        with pytest.raises(StoreError, match="no commit record"):
            Dataset.open(store)
    (store / "volumes" / ".tmp-1-left.zarr").mkdir(exist_ok=True)
    with open(ledger, "ab") as file:
        file.write(b'{"key": "torn')
    _check_archive(run_build(config(archive, store), Silent()))
    assert _rows(store) == _rows(clean)
    assert _files(store) == _files(clean)


def _wait_until_gone(group: int) -> None:
    """Workers end with their driver."""
    deadline = time.monotonic() + 30
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.02)
        pytest.fail("workers outlived their driver by 30 s")


@pytest.mark.usefixtures("_inline")
def test_only_what_is_not_done_is_done(tmp_path: Path) -> None:
    source, store, seen = tmp_path / "in", tmp_path / "store", []
    for seed in range(3):
        write_image(source / f"{seed}.nii", phantom(seed))

    def work(task: Task) -> TaskResult:
        seen.append(task.source.name)
        return build_volume(task)

    run_build(config(source, store), Silent(), work)
    write_image(source / "3.nii", phantom(3))
    write_image(source / "1.nii", phantom(11))
    (source / "2.nii").unlink()
    seen.clear()
    outcome = run_build(config(source, store), Silent(), work)
    assert seen == ["1.nii", "3.nii"]
    assert len(outcome.rows) == len(list((store / "volumes").iterdir())) == 3
    shutil.rmtree(store / "volumes" / f"{outcome.rows[0].key}.zarr")
    seen.clear()
    assert run_build(config(source, store), Silent(), work).fingerprint == outcome.fingerprint
    assert len(seen) == 1


@pytest.mark.usefixtures("_inline")
def test_a_worker_that_died_is_tried_again_by_the_next_build(tmp_path: Path) -> None:
    source, store = tmp_path / "in", tmp_path / "store"
    write_image(source / "a.nii", phantom(0))
    write_image(source / "dies.nii", phantom(1))
    outcome = run_build(
        config(source, store),
        Silent(),
        lambda task: died(task, "") if "dies" in task.source.name else build_volume(task),
    )
    assert dict(outcome.reasons) == {"worker_died": 1}
    assert len(run_build(config(source, store), Silent()).rows) == 2


@pytest.mark.usefixtures("_inline")
def test_subjects_come_from_the_table_then_the_header_then_the_volume(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for seed, name in enumerate(("a.nii", "b.nii", "c.nii", "c copy.nii")):
        write_image(source / name, phantom(seed))
    for seed, name in enumerate(("d", "e"), start=10):
        write_series(source / name, Series(phantom(seed)))
    write_series(source / "f", replace(Series(phantom(12)), tags={"PatientID": "OTHER"}))
    (source / "subjects.csv").write_text("path,subject\na.nii,Jane Roe\nb.nii,Jane Roe\nf,Jane Roe\n")
    outcome = run_build(config(source, tmp_path / "store"), Silent())
    subjects = [row.subject for row in outcome.rows]
    assert all(len(subject) == 16 and int(subject, 16) >= 0 for subject in subjects)
    groups = sorted(subjects.count(subject) for subject in set(subjects))
    assert groups == [1, 1, 2, 3]  # c, its unlisted neighbour, d + e by PatientID, Jane Roe


def test_a_bad_subjects_table_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "in" / "a.nii", phantom())
    (tmp_path / "in" / "subjects.csv").write_text("file,person\na.nii,x\n")
    with pytest.raises(SourceError, match="line 2 lacks a path or a subject"):
        run_build(config(tmp_path / "in", tmp_path / "store"), Silent())
    assert not (tmp_path / "store").exists()


@pytest.mark.usefixtures("_inline")
def test_refusals_touch_nothing(tmp_path: Path) -> None:
    source, store = tmp_path / "in", tmp_path / "store"
    with pytest.raises(SourceError, match="does not exist"):
        run_build(config(source, store), Silent())
    source.mkdir()
    with pytest.raises(SourceError, match="no image"):
        run_build(config(source, store), Silent())
    assert not store.exists()
    write_image(source / "a.nii", phantom())
    with pytest.raises(StoreError, match="lie in each other"):
        run_build(config(source, source / "store"), Silent())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(StoreError, match="is no store; nothing was touched"):
        run_build(config(source, tmp_path / "mine"), Silent())
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(StoreError, match="is a file"):
        run_build(config(source, tmp_path / "mine" / "thesis.txt"), Silent())


@pytest.mark.usefixtures("_inline")
def test_a_store_of_another_source_is_kept_and_other_settings_build_again_what_they_touch(tmp_path: Path) -> None:
    source, other, store = tmp_path / "in", tmp_path / "other", tmp_path / "store"
    write_image(source / "a.nii", phantom(0))
    write_image(other / "a.nii", phantom(1))
    outcome = run_build(config(source, store), Silent())
    with pytest.raises(StoreError, match="none of them is in this source"):
        run_build(config(other, store), Silent())
    assert Dataset.open(store).fingerprint == outcome.fingerprint
    assert {path.name for path in (store / "volumes").iterdir()} == {f"{row.key}.zarr" for row in outcome.rows}
    started: list[str] = []

    def work(task: Task) -> TaskResult:
        started.append(task.key)
        return build_volume(task)

    assert run_build(config(source, store, min_slices=4), Silent(), work).fingerprint == outcome.fingerprint
    assert not started, "a volume that is thick enough stays"
    again = run_build(config(source, store, spacing=(3.0, 3.0, 3.0), min_slices=4), Silent(), work)
    assert len(started) == 1
    assert again.fingerprint != outcome.fingerprint
    assert "settings differ from the last build (spacing null -> [3.0, 3.0, 3.0])" in again.notes[0]
    assert len(list((store / "volumes").iterdir())) == 1


@pytest.mark.usefixtures("_inline")
def test_nothing_to_store_is_said_with_the_reasons(tmp_path: Path) -> None:
    write_image(tmp_path / "in" / "thin.nii", phantom(shape=(5, 20, 22)))
    with pytest.raises(SourceError, match="none of 1 inputs can be stored: too_few_slices 1"):
        run_build(config(tmp_path / "in", tmp_path / "store"), Silent())
    outcome = run_build(config(tmp_path / "in", tmp_path / "store", min_slices=5), Silent())
    assert len(outcome.rows) == 1


def test_two_builders_at_once(tmp_path: Path) -> None:
    write_image(tmp_path / "in" / "a.nii", phantom())
    with (
        builder_lock(tmp_path / "store"),
        pytest.raises(StoreError, match=f"process {os.getpid()} on .* is building it"),
    ):
        run_build(config(tmp_path / "in", tmp_path / "store"), Silent())


@pytest.mark.usefixtures("_inline")
def test_a_full_disk_ends_the_build_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    write_image(tmp_path / "in" / "a.nii", phantom())
    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.build.task.write_volume", full)
        with pytest.raises(StoreError, match="No space left on device"):
            run_build(config(tmp_path / "in", tmp_path / "store"), Silent())
    assert len(run_build(config(tmp_path / "in", tmp_path / "store"), Silent()).rows) == 1


@pytest.mark.usefixtures("_inline")
def test_spacing_is_resampled_and_kept_in_the_record(tmp_path: Path) -> None:
    write_image(tmp_path / "in" / "a.nii", phantom(shape=(18, 40, 44)))
    outcome = run_build(config(tmp_path / "in", tmp_path / "store", spacing=(1.5, 1.5, 1.5)), Silent())
    (row,) = outcome.rows
    assert row.spacing_mm == (1.5, 1.5, 1.5)
    assert row.shape == (30, 24, 23)
    assert "resampled" in row.repairs
    record = json.loads((tmp_path / "store" / "dataset.json").read_text())
    assert record["build_config"]["spacing"] == [1.5, 1.5, 1.5]
