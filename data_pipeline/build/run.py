"""A build from end to end: look, plan, do what is not done, commit. Interrupt it anywhere and start it again."""

import json
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.build.executor import Work, make_executor
from data_pipeline.build.ledger import (
    builder_lock,
    is_begun,
    open_ledger,
    read_finished,
    read_ledger,
    remove_leftovers,
    remove_volumes_but,
    stored_keys,
    write_finished,
)
from data_pipeline.build.plan import PIPELINE_VERSION, make_tasks, settings, tree_digest
from data_pipeline.build.task import Task, TaskResult, build_volume
from data_pipeline.reasons import PASSING, Reason
from data_pipeline.sources.find import find_files, find_sources
from data_pipeline.subjects import TABLE, listed_subject, pseudonym, read_subjects
from mim_scale.config import BuildConfig
from mim_scale.errors import DamagedError, SourceError, StoreError
from mim_scale.store.array_store import folder_bytes
from mim_scale.store.dataset import MANIFEST, RECORD, VOLUMES, Dataset, commit_dataset, read_record, volume_folder
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
    notes: tuple[str, ...] = ()
    """What the user should know beside the numbers, a line each."""

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
    last, is_damaged = _last_build(store)
    digest = tree_digest(root, files, config)
    finished = _finished_outcome(store, last, digest)
    if finished is not None:
        return finished
    tree = find_sources(root, progress.looked)
    subjects = read_subjects(root)
    tasks = make_tasks(root, tree.sources, config)
    with builder_lock(store):
        remove_leftovers(store)
        _make_volumes_folder(store)
        before = {row.key for row in last.rows} if last is not None else stored_keys(store) if is_damaged else set()
        results = _run_tasks(config, tasks, progress, work)
        rows, quarantine = _tables(tasks, results, subjects)
        _refuse_nothing(root, quarantine, rows)
        _refuse_other_source(store, before, rows)
        fingerprint = commit_dataset(store, rows, quarantine, settings(config))
        may_pass = any(row.reason in PASSING for row in quarantine)
        if not may_pass:
            # What could not be read this time may be back the next: until then its volume stays where it is.
            remove_volumes_but(store, {row.key for row in rows})
            write_finished(store, {"tree": digest, "fingerprint": fingerprint, "ignored": tree.num_ignored})
        notes = (*_notes(last, is_damaged, rows, may_pass), *_unknown_subjects(rows))
        return Outcome(len(tasks), rows, quarantine, tree.num_ignored, fingerprint, False, notes)


def _run_tasks(config: BuildConfig, tasks: list[Task], progress: Progress, work: Work) -> dict[str, TaskResult]:
    """The result of every task by its key, from the ledger where it still holds."""
    store = Path(config.store)
    known = read_ledger(store)
    results = {
        task.key: known[task.key] for task in tasks if task.key in known and _is_whole(store, known[task.key].row)
    }
    to_do = [task for task in tasks if task.key not in results]
    progress.began(len(results), len(tasks))
    if not to_do:
        return results
    with open_ledger(store) as ledger, closing(make_executor(config).run(work, to_do)) as ended:
        for result in ended:
            if result.rejected is None or result.rejected[0] not in PASSING:
                ledger.add(result)
            results[result.key] = result
            progress.advanced()
    return results


def _is_whole(store: Path, row: Row | None) -> bool:
    """Whether a volume has as many bytes on disk as were committed: what can be seen without reading it."""
    return row is None or folder_bytes(volume_folder(store, row.key)) == row.bytes_stored


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
            subject = listed_subject(subjects, (task.source.name, *task.source.files)) or result.row.subject
            rows[result.row.content_hash] = replace(result.row, subject=subject)
    return tuple(rows.values()), tuple(quarantine)


def _last_build(store: Path) -> tuple[Dataset | None, bool]:
    """The dataset that stands there, and whether its record or a table of it is damaged."""
    if not (store / RECORD).exists():
        return None, False
    try:
        dataset = Dataset.open(store)
        dataset.quarantine  # noqa: B018  # read here, so that damage shows here
    except DamagedError:
        return None, True
    return dataset, False


def _notes(last: Dataset | None, is_damaged: bool, rows: tuple[Row, ...], may_pass: bool) -> tuple[str, ...]:
    if is_damaged:
        return ("the record of the last build was damaged: it was written anew",)
    if last is None:
        return ()
    notes = []
    if last.record["build_config"].get("pipeline_version") != PIPELINE_VERSION:
        notes.append("the last build was made by an older program: every volume was built again")
    num_dropped = len({row.key for row in last.rows} - {row.key for row in rows})
    if num_dropped and may_pass:
        notes.append(f"{num_dropped} volumes of the last build are left out until their sources can be read again")
    elif num_dropped:
        notes.append(f"{num_dropped} volumes of the last build are no longer in the source: removed")
    return tuple(notes)


def _unknown_subjects(rows: tuple[Row, ...]) -> tuple[str, ...]:
    """A warning: two files of one patient that nothing ties together can end on two sides of a split."""
    unknown = sum(row.subject == pseudonym("volume", row.content_hash) for row in rows)
    if not unknown:
        return ()
    return (f"{unknown} volumes name no patient: each counts as its own subject; {TABLE} in the source says more",)


def _finished_outcome(store: Path, dataset: Dataset | None, digest: str) -> Outcome | None:
    """The outcome of the last build, where nothing has changed since and everything is in place."""
    noted = read_finished(store)
    if noted is None or dataset is None or noted.get("tree") != digest:
        return None
    if noted.get("fingerprint") != dataset.fingerprint or not all(_is_whole(store, row) for row in dataset.rows):
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
    has_record = (store / RECORD).is_file()
    if has_record and (before := _settings_before(store)) is not None:
        now = settings(config)
        changed = [name for name in now if before.get(name) != now[name] and not _is_older(name, before)]
        if changed:
            shown = ", ".join(
                f"{name} {json.dumps(before.get(name))} there and {json.dumps(now[name])} here" for name in changed
            )
            raise StoreError(
                f"{store}: was built with other settings: {shown}; build into another folder, or delete this one"
            )
    elif not is_begun(store) and any(store.iterdir()) and not _has_our_names(store):
        raise StoreError(f"{store}: exists and is no store; nothing was touched; choose another folder")


def _is_older(name: str, before: dict[str, Any]) -> bool:
    """Whether this is the pipeline's version and an older one: its results are built again, which is no refusal."""
    version = before.get(name)
    return name == "pipeline_version" and isinstance(version, int) and version < PIPELINE_VERSION


def _settings_before(store: Path) -> dict[str, Any] | None:
    """What the last build was asked for; None where its record is damaged."""
    try:
        before = read_record(store)["build_config"]
    except DamagedError:
        return None
    return before if isinstance(before, dict) else None


def _has_our_names(store: Path) -> bool:
    """Whether a folder with a damaged record, whose build/ was removed, still looks like a store."""
    return (store / RECORD).is_file() and (store / MANIFEST).is_file() and (store / VOLUMES).is_dir()


def _make_volumes_folder(store: Path) -> None:
    try:
        (store / VOLUMES).mkdir(exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"{store / VOLUMES}: cannot be made a folder ({error.strerror}); move away what stands there"
        ) from None


def _refuse_nothing(root: Path, quarantine: tuple[QuarantineRow, ...], rows: tuple[Row, ...]) -> None:
    if not rows:
        reasons = ", ".join(
            f"{reason} {count}" for reason, count in Counter(row.reason for row in quarantine).most_common()
        )
        raise SourceError(f"{root}: none of {len(quarantine)} inputs can be stored: {reasons}")


def _refuse_other_source(store: Path, before: set[str], rows: tuple[Row, ...]) -> None:
    """A store that would lose every volume it has was built from something else."""
    if before and not before & {row.key for row in rows}:
        remove_volumes_but(store, before)
        raise StoreError(
            f"{store}: holds {len(before)} volumes and none of them is in this source; build into another folder, "
            "or delete this one"
        )
