"""Whatever the disk does at whichever operation of a commit, what stands afterwards is whole: the old or the new.

`python -m tests.faults.test_enumerated` prints how many cases there are.
"""

import os
import tempfile
from collections.abc import Hashable
from pathlib import Path
from threading import Event

import pytest
import torch

from mim_scale.commit import new_folder, publish_folder, write_file, write_part
from mim_scale.errors import CheckpointError, DamagedError, StoreError
from mim_scale.store.dataset import Dataset, commit_dataset
from mim_scale.store.manifest import QuarantineRow
from mim_scale.training.checkpoint import CheckpointFolder, Piece, read_checkpoint
from mim_scale.training.checkpoint_write import Share, write_share
from mim_scale.training.journal import Journal, read_journal
from tests.faults.enumerate import Outcomes, Writing, enumerate_faults
from tests.faults.faulty_disk import CRASHES, REFUSALS, TWISTS
from tests.synthetic import make_volume, store_volume
from tests.training.checkpoints import whole

KEEP = 2
MEMORY = "/dev/shm"


def save(root: Path, step: int, count: int = 1) -> None:
    """Save a checkpoint as `count` ranks do, the last rank first, so that nobody waits."""
    folder = CheckpointFolder(root / "checkpoints", KEEP)
    values = torch.arange(6.0) + step
    for number in reversed(range(count)):
        pieces = [
            Piece("weights", "layer", (6 * count,), 6 * number, values),
            whole("moments", f"layer.{number}/exp_avg", values / 2),
            whole("moments", f"layer.{number}/exp_avg_sq", values[:0]),
        ]
        write_share(folder, Share(step, "token", number, count, pieces, {"config": {}}), Event())


def newest(root: Path) -> Hashable:
    """What a run would be taken up from, and that as many verified checkpoints stand behind it as there should."""
    folder = CheckpointFolder(root / "checkpoints", KEEP)
    folder.remove_leftovers()

    def never(text: str) -> None:
        raise AssertionError(text)

    found = folder.newest(never)
    if found is None:
        return None
    whole = [read_checkpoint(path) for path in folder.folders()]
    assert len(whole) >= min(KEEP, found.step)
    assert all(path.name.startswith("step_") for path in (root / "checkpoints").iterdir())
    tensors = [(name, tuple(value.tolist())) for part in found.load() for name, value in sorted(part.items())]
    return found.step, *tensors


def saved(steps: int, count: int = 1) -> Writing:
    """The checkpoint after `steps` earlier ones."""

    def prepare(root: Path) -> None:
        for step in range(1, steps + 1):
            save(root, step)

    words = ("first", "second", "third, which deletes the first")[steps]
    writers = f" by {count} ranks" if count > 1 else ""
    return Writing(
        f"checkpoint, {words}{writers}", prepare, lambda r: save(r, steps + 1, count), newest, CheckpointError
    )


def over_a_damaged_one() -> Writing:
    def prepare(root: Path) -> None:
        for step in (1, 2):
            save(root, step)
        (root / "checkpoints" / "step_00000002" / "weights.safetensors").write_bytes(b"damaged")

    def look(root: Path) -> Hashable:
        folder = CheckpointFolder(root / "checkpoints", KEEP)
        folder.remove_leftovers()
        found = folder.newest(lambda _: None)
        assert found is not None
        return found.step

    return Writing("checkpoint, where a damaged one stands", prepare, lambda r: save(r, 2), look, CheckpointError)


def dataset(is_first: bool) -> Writing:
    rejected = QuarantineRow("f" * 16, "nifti", "no_ct", "not a CT")

    def commit(root: Path, subjects: tuple[str, ...]) -> None:
        path = root / "store"
        rows = [_row(path, number, subject) for number, subject in enumerate(subjects)]
        commit_dataset(path, sorted(rows, key=lambda row: row.key), [rejected], {"volumes": len(rows)})

    def prepare(root: Path) -> None:
        for number in range(2):
            _row(root / "store", number, "a")
        if not is_first:
            commit(root, ("a",))
        # Of a build that was killed: what reads it back for the new table, as a stale read does, would name it.
        (root / "store" / "manifest.parquet.next").write_bytes(b"left behind")

    def look(root: Path) -> Hashable:
        try:
            found = Dataset.open(root / "store")
        except DamagedError:
            raise
        except StoreError:
            return None
        return found.fingerprint, tuple(row.key for row in found.rows), found.quarantine, str(found.record)

    name = "dataset, first commit" if is_first else "dataset, over an earlier one"
    return Writing(name, prepare, lambda r: commit(r, ("a", "b")), look, StoreError, ("store",) if is_first else ())


_ROWS: dict[int, object] = {}


def _row(path: Path, number: int, subject: str) -> object:
    """The row of a small volume, which is stored where it is not yet."""
    from dataclasses import replace

    if number not in _ROWS:
        with tempfile.TemporaryDirectory() as folder:
            _ROWS[number] = store_volume(Path(folder), make_volume((8, 16, 16), number))
    (path / "volumes").mkdir(parents=True, exist_ok=True)
    return replace(_ROWS[number], subject=subject, group=subject)


def file_written() -> Writing:
    def look(root: Path) -> Hashable:
        return (root / "record.json").read_bytes()

    return Writing(
        "file, replaced",
        lambda root: write_file(root / "record.json", b"old " * 9),
        lambda root: write_file(root / "record.json", b"new " * 8),
        look,
        OSError,
    )


def folder_published() -> Writing:
    def publish(root: Path, text: bytes) -> None:
        temporary = new_folder(root / "export")
        for name in ("model", "config.json"):
            write_part(temporary / name, [text, text])
        publish_folder(temporary, root / "export")

    def look(root: Path) -> Hashable:
        return tuple(sorted((path.name, path.read_bytes()) for path in (root / "export").iterdir()))

    return Writing("folder, over another", lambda r: publish(r, b"old"), lambda r: publish(r, b"new"), look, OSError)


def journal_row(rows: int) -> Writing:
    def write(root: Path, last: int) -> None:
        journal = Journal(root / "run" / "journal.jsonl")
        try:
            for step in range(1, last + 1):
                journal.write("step", step, loss=step / 3)
            journal.sync()
        finally:
            journal.close()

    def look(root: Path) -> Hashable:
        path = root / "run" / "journal.jsonl"
        if path.parent.is_dir():
            Journal(path).close()
        return tuple(str(row) for row in read_journal(path))

    name = f"journal, {'a row appended' if rows else 'made with its first row'}"
    return Writing(
        name,
        lambda root: write(root, rows) if rows else None,
        lambda root: write(root, rows + 1),
        look,
        (CheckpointError, OSError),  # type: ignore[arg-type]
    )


QUICK = [saved(0), saved(2), dataset(is_first=True), file_written(), folder_published(), journal_row(0), journal_row(3)]
LONGER = [saved(1), saved(1, count=2), over_a_damaged_one(), dataset(is_first=False)]


@pytest.mark.parametrize(
    "writing",
    [*QUICK, *(pytest.param(writing, marks=pytest.mark.soak) for writing in LONGER)],
    ids=lambda writing: writing.name,
)
def test_the_old_or_the_new_whatever_happens_when(writing: Writing) -> None:
    with in_memory() as folder:
        outcomes = enumerate_faults(writing, Path(folder))
    assert outcomes.total > 5 * outcomes.operations
    assert set(outcomes.cases) >= {*CRASHES, *REFUSALS, "short write"}


def in_memory() -> tempfile.TemporaryDirectory[str]:
    """A folder that costs no disk: what is durable is known without one."""
    return tempfile.TemporaryDirectory(dir=MEMORY if os.path.isdir(MEMORY) else None)


def main() -> None:
    """A table of the cases."""
    faults = (*CRASHES, *REFUSALS, *TWISTS)
    print(f"| what is written | operations | {' | '.join(faults)} | cases |")
    print("|---" * (len(faults) + 3) + "|")
    for writing in (*QUICK, *LONGER):
        with in_memory() as folder:
            found: Outcomes = enumerate_faults(writing, Path(folder))
        cases = " | ".join(str(found.cases[fault]) for fault in faults)
        print(f"| {writing.name} | {found.operations} | {cases} | {found.total} |", flush=True)


if __name__ == "__main__":
    main()
