"""What a build commits is gathered in a few bytes a volume, and comes out as the ledger has it."""

import os
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from data_pipeline.build.compact import Names
from data_pipeline.build.ledger import Ledger
from data_pipeline.build.standing import read_standing
from data_pipeline.build.tables import Tables, collect
from data_pipeline.build.task import Task, TaskResult
from data_pipeline.deidentify import PseudonymKey
from data_pipeline.reasons import Reason
from data_pipeline.sources.source import Source
from mim_scale.store.dataset import commit_dataset
from mim_scale.store.manifest import Row

KEY = PseudonymKey(b"k" * 32)


def tasks(count: int) -> Iterator[Task]:
    for number in range(count):
        source = Source(f"{number:06d}.nii", "nifti", (f"{number:06d}.nii",), subject="A" if number % 10 == 3 else "")
        yield Task(
            KEY.digest([number]), "/in", "/out", source, KEY.pseudonym("source", source.name), None, 16, KEY, (), 0
        )


def result(task: Task) -> TaskResult:
    """Of the task: every twentieth is refused, every twentieth is a copy of the one before."""
    number = int(task.source.name[:6])
    if number % 20 == 19:
        return TaskResult(task.key, task.source_key, "nifti", 16, rejected=(Reason.UNREADABLE, "no image"))
    content = sha256(str(number - (number % 20 == 18)).encode()).hexdigest()
    subject = KEY.pseudonym("volume", content)
    row = Row(
        content[:16], subject, subject, "", "", content, content[::-1], (20, 20, 20), (1.0, 1.0, 1.0),
        tuple(map(float, range(16))), -1000, 100, 3.25, tuple(range(64)), b"\x80", 16000, 9000, 16352, "nifti",
        task.source_key,
    )  # fmt: skip
    return TaskResult(task.key, task.source_key, "nifti", 16, 0.1, row, b"mark")


@pytest.fixture
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def fill(store: Path, count: int) -> None:
    with Ledger(store) as ledger:
        for task in tasks(count):
            ledger.add(result(task))


@pytest.mark.usefixtures("_quick_disk")
def test_copies_are_refused_subjects_counted_and_held_out_ones_move(tmp_path: Path) -> None:
    fill(tmp_path, 40)
    with Ledger(tmp_path) as ledger:
        tables = collect(tasks(40), ledger)
        assert (len(tables.kept), len(tables.refused)) == (36, 4)
        assert tables.reasons == {"duplicate": 2, "unreadable": 2}
        assert (tables.bytes_raw, tables.bytes_stored) == (36 * 16000, 36 * 9000)
        # The table of subjects makes one person of four volumes.
        assert (tables.num_subjects, tables.num_unknown_subjects) == (33, 32)
        rows = list(tables.rows())
        assert [row.key for row in rows] == sorted(tables.keys)
        listed = KEY.pseudonym("listed", "A")
        assert sum(row.subject == row.group == listed for row in rows) == 4
        assert [row.subject for row in tables.fingerprints()] == [row.subject for row in rows]
        tables.hold_out({rows[5].key: "same_voxels: of list 1", rows[7].key: "same_voxels: of list 1"})
        assert [row.key for row in tables.rows()] == [row.key for row in rows if row not in (rows[5], rows[7])]
        assert (tables.bytes_raw, tables.bytes_stored) == (34 * 16000, 34 * 9000)
        quarantine = list(tables.quarantine())
        assert [row.source_key for row in quarantine] == sorted(row.source_key for row in quarantine)
        assert (
            sorted((row.reason, row.detail.partition(":")[0]) for row in quarantine)[2:4]
            == [("held_out", "same_voxels")] * 2
        )
        assert tables.reasons == {"duplicate": 2, "unreadable": 2, "held_out": 2}
        assert {row.detail for row in quarantine if row.reason == "duplicate"} <= {
            f"equal to volume {row.key}, voxel for voxel" for row in rows
        }


def test_names_are_a_set() -> None:
    names = Names.of(["00" * 8, "ab" * 8, "ab" * 8, "no name of ours", "ff" * 8, "ab"])
    assert list(names) == ["00" * 8, "ab" * 8, "ff" * 8]
    assert all(name in names for name in names)
    assert not any(name in names for name in ["01" * 8, "AB", "ff" * 7, "", "no name of ours"])
    assert names.num_shared(Names.of(["ff" * 8, "01" * 8])) == 1
    assert len(Names.of([])) == 0
    assert "00" * 8 not in Names.of([])


@pytest.mark.usefixtures("_quick_disk")
def test_a_build_holds_few_bytes_a_volume(tmp_path: Path) -> None:
    """What stays while tables are written, and the most at any time: both are far below 1 KB."""
    held, most = {}, {}
    for count in (1100, 2200):
        store = tmp_path / str(count)
        fill(store, count)
        with Ledger(store) as ledger:
            _commit(store, collect(tasks(count), ledger))
        tracemalloc.start()
        with Ledger(store) as ledger:
            standing = read_standing(store)
            tables = collect(tasks(count), ledger)
            held[count], _ = tracemalloc.get_traced_memory()
            _commit(store, tables)
            _, most[count] = tracemalloc.get_traced_memory()
            assert standing.keys.num_shared(tables.keys) == len(tables.kept)
        tracemalloc.stop()
    assert (held[2200] - held[1100]) / 1100 < 250
    assert (most[2200] - most[1100]) / 1100 < 500


def _commit(store: Path, tables: Tables) -> None:
    commit_dataset(store, tables.rows(), tables.quarantine(), {}, tables.fingerprints())


@pytest.mark.usefixtures("_quick_disk")
def test_what_is_forgotten_is_done_again(tmp_path: Path) -> None:
    fill(tmp_path, 20)
    every = list(tasks(20))
    with Ledger(tmp_path) as ledger:
        assert ledger.forget({every[3].source_key, every[19].source_key, "ff" * 8}) == 2
    with Ledger(tmp_path) as ledger:
        assert [number for number, task in enumerate(every) if ledger.result(task) is None] == [3, 19]
        ledger.add(replace(result(every[3]), cpu_s=7.0))
    with Ledger(tmp_path) as ledger:
        found = ledger.result(every[3])
        assert found is not None
        assert found.cpu_s == 7.0
