"""A build from end to end: look, plan, do what is not done, commit. Interrupt it anywhere and start it again."""

import json
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from data_pipeline.build.executor import Work, make_executor
from data_pipeline.build.ledger import (
    builder_lock,
    is_begun,
    open_ledger,
    read_finished,
    read_ledger,
    remove_leftovers,
    remove_volumes_but,
    write_finished,
)
from data_pipeline.build.plan import make_tasks, settings, tree_digest
from data_pipeline.build.task import Task, TaskResult, build_volume
from data_pipeline.reasons import Reason
from data_pipeline.sources.find import find_files, find_sources
from data_pipeline.subjects import listed_subject, read_subjects
from mim_scale.config import BuildConfig
from mim_scale.errors import SourceError, StoreError
from mim_scale.store.dataset import RECORD, VOLUMES, Dataset, commit_dataset, read_record, volume_folder
from mim_scale.store.manifest import QuarantineRow, Row


@dataclass(frozen=True)
class Outcome:
    """What a build made."""

    num_sources: int
    rows: tuple[Row, ...]
    quarantine: tuple[QuarantineRow, ...]
    num_ignored: int
    fingerprint: str
    was_complete: bool
    """Whether nothing had to be done."""

    @property
    def reasons(self) -> Counter[str]:
        """Quarantined sources by reason."""
        return Counter(row.reason for row in self.quarantine)


class Progress(Protocol):
    """Hears how far a build is."""

    def looked(self, done: int, total: int) -> None:
        """So many files were looked at."""

    def began(self, done: int, total: int) -> None:
        """So many tasks are done already, of so many."""

    def advanced(self) -> None:
        """One more task ended."""


class Silent:
    """The Progress that says nothing."""

    def looked(self, done: int, total: int) -> None:
        """Nothing."""

    def began(self, done: int, total: int) -> None:
        """Nothing."""

    def advanced(self) -> None:
        """Nothing."""


def run_build(config: BuildConfig, progress: Progress, work: Work = build_volume) -> Outcome:
    """Build a store, or go on with one.

    Raises:
        SourceError: the source is missing, holds no image, or nothing in it can be stored.
        StoreError: the store's folder holds something else, belongs to another build, or cannot be written.
    """
    root, store = Path(config.source), Path(config.store)
    files = find_files(root)
    _refuse_overlap(root, store)
    _refuse_foreign(store, config)
    digest = tree_digest(root, files, config)
    finished = _finished_outcome(store, digest)
    if finished is not None:
        return finished
    tree = find_sources(root, progress.looked)
    subjects = read_subjects(root)
    tasks = make_tasks(root, tree.sources, config)
    with builder_lock(store):
        remove_leftovers(store)
        (store / VOLUMES).mkdir(exist_ok=True)
        results = _run_tasks(config, tasks, progress, work)
        rows, quarantine = _tables(tasks, results, subjects)
        _refuse_nothing(root, quarantine, rows)
        _refuse_other_source(store, rows)
        fingerprint = commit_dataset(store, rows, quarantine, settings(config))
        remove_volumes_but(store, {row.key for row in rows})
        outcome = Outcome(len(tasks), rows, quarantine, tree.num_ignored, fingerprint, False)
        if Reason.WORKER_DIED not in outcome.reasons:
            write_finished(store, {"tree": digest, "fingerprint": fingerprint, "ignored": tree.num_ignored})
        return outcome


def _run_tasks(config: BuildConfig, tasks: list[Task], progress: Progress, work: Work) -> dict[str, TaskResult]:
    """The result of every task by its key, from the ledger where it still holds."""
    store = Path(config.store)
    known = read_ledger(store)
    results = {
        task.key: known[task.key] for task in tasks if task.key in known and _is_there(store, known[task.key].row)
    }
    to_do = [task for task in tasks if task.key not in results]
    progress.began(len(results), len(tasks))
    if not to_do:
        return results
    with open_ledger(store) as ledger, closing(make_executor(config).run(work, to_do)) as ended:
        for result in ended:
            if result.rejected is None or result.rejected[0] != Reason.WORKER_DIED:
                ledger.add(result)
            results[result.key] = result
            progress.advanced()
    return results


def _is_there(store: Path, row: Row | None) -> bool:
    return row is None or volume_folder(store, row.key).is_dir()


def _tables(
    tasks: Iterable[Task], results: dict[str, TaskResult], subjects: dict[str, str]
) -> tuple[tuple[Row, ...], tuple[QuarantineRow, ...]]:
    """Manifest and quarantine in the sources' order: of equal volumes the same one is kept, whoever ended first."""
    rows: dict[str, Row] = {}
    quarantine = []
    for task in tasks:
        result = results[task.key]
        if result.row is None:
            quarantine.append(result.quarantine_row(task.source))
        elif result.row.content_hash in rows:
            detail = f"equal to volume {result.row.key}, voxel for voxel"
            quarantine.append(QuarantineRow(task.source.key, task.source.format, Reason.DUPLICATE, detail))
        else:
            subject = listed_subject(subjects, task.source.name) or result.row.subject
            rows[result.row.content_hash] = replace(result.row, subject=subject)
    return tuple(rows.values()), tuple(quarantine)


def _finished_outcome(store: Path, digest: str) -> Outcome | None:
    """The outcome of the last build, where nothing has changed since and everything is in place."""
    noted = read_finished(store)
    if noted is None or noted.get("tree") != digest or not (store / RECORD).is_file():
        return None
    dataset = Dataset.open(store)
    if noted.get("fingerprint") != dataset.fingerprint or not all(_is_there(store, row) for row in dataset.rows):
        return None
    num_sources = len(dataset.rows) + len(dataset.quarantine)
    return Outcome(num_sources, dataset.rows, dataset.quarantine, int(noted["ignored"]), dataset.fingerprint, True)


def _refuse_overlap(root: Path, store: Path) -> None:
    source, target = root.resolve(), store.resolve()
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise StoreError(
            f"{store}: store and source {root} lie in each other; choose a folder for the store outside of it"
        )


def _refuse_foreign(store: Path, config: BuildConfig) -> None:
    """A folder is written to only if it is new, empty, or a store of these settings."""
    if not store.exists():
        return
    if not store.is_dir():
        raise StoreError(f"{store}: is a file, expected a folder for the store; choose another path")
    if (store / RECORD).is_file():
        before, now = read_record(store)["build_config"], settings(config)
        changed = [name for name in now if before.get(name) != now[name]]
        if changed:
            shown = ", ".join(
                f"{name} {json.dumps(before.get(name))} there and {json.dumps(now[name])} here" for name in changed
            )
            raise StoreError(
                f"{store}: was built with other settings: {shown}; build into another folder, or delete this one"
            )
    elif not is_begun(store) and any(store.iterdir()):
        raise StoreError(f"{store}: exists and is no store; nothing was touched; choose another folder")


def _refuse_nothing(root: Path, quarantine: tuple[QuarantineRow, ...], rows: tuple[Row, ...]) -> None:
    if not rows:
        reasons = ", ".join(
            f"{reason} {count}" for reason, count in Counter(row.reason for row in quarantine).most_common()
        )
        raise SourceError(f"{root}: none of {len(quarantine)} inputs can be stored: {reasons}")


def _refuse_other_source(store: Path, rows: tuple[Row, ...]) -> None:
    """A store that would lose every volume it has was built from something else."""
    if not (store / RECORD).is_file():
        return
    before = {row.key for row in Dataset.open(store).rows}
    if not before & {row.key for row in rows}:
        remove_volumes_but(store, before)
        raise StoreError(
            f"{store}: holds {len(before)} volumes and none of them is in this source; build into another folder, "
            "or delete this one"
        )
