"""A build from end to end: look, plan, do what is not done, commit. Interrupt it anywhere and start it again."""

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.build.compact import Names
from data_pipeline.build.executor import Work, make_executor
from data_pipeline.build.ledger import (
    Ledger,
    builder_lock,
    read_finished,
    remove_leftovers,
    remove_volumes_but,
    write_finished,
)
from data_pipeline.build.plan import Estimate, estimate, make_tasks, part_of, settings
from data_pipeline.build.standing import (
    Standing,
    changes,
    losses,
    read_standing,
    refuse_foreign,
    refuse_overlap,
    waivers_of,
)
from data_pipeline.build.tables import Tables, collect, compare
from data_pipeline.build.task import Task, build_volume
from data_pipeline.deidentify import PseudonymKey, deidentification_record
from data_pipeline.hold_out import HoldOut
from data_pipeline.pseudonym_key import load_key
from data_pipeline.sources.inventory import Inventory, kept_headers
from mim_scale.config import BuildConfig
from mim_scale.errors import DamagedError, SourceError, StoreError
from mim_scale.store.array_store import folder_bytes
from mim_scale.store.dataset import (
    MANIFEST,
    QUARANTINE,
    VOLUMES,
    Dataset,
    commit_dataset,
    read_table,
    table_path,
    volume_folder,
)
from mim_scale.store.manifest import QuarantineRow, Row, iter_rows, read_quarantine


@dataclass(frozen=True)
class Outcome:
    """What a build made."""

    store: Path
    num_sources: int
    num_volumes: int
    num_subjects: int
    num_quarantined: int
    num_ignored: int
    reasons: Counter[str]
    """Quarantined sources by reason."""
    bytes_raw: int
    bytes_stored: int
    fingerprint: str
    """Empty where nothing was committed: a part of a build."""
    was_complete: bool = False
    """Whether nothing had to be done."""
    notes: tuple[str, ...] = ()
    """What the user should know beside the numbers, a line each."""

    @cached_property
    def _dataset(self) -> Dataset:
        return Dataset.open(self.store)

    @property
    def rows(self) -> tuple[Row, ...]:
        """The manifest, read from the store."""
        return self._dataset.rows

    @property
    def quarantine(self) -> tuple[QuarantineRow, ...]:
        """The refused inputs, read from the store."""
        return self._dataset.quarantine


class Progress(Protocol):
    """Hears how far a build is."""

    def looked(self, done: int, total: int) -> None:
        """So many headers were read."""

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


@dataclass
class _Build:
    """What the steps of one build share."""

    config: BuildConfig
    pseudonyms: PseudonymKey
    inventory: Inventory
    waivers: dict[str, str]
    before: Standing
    hold_out: HoldOut
    notes: list[str] = field(default_factory=list)

    @property
    def store(self) -> Path:
        return Path(self.config.store)

    @property
    def part(self) -> tuple[int, int] | None:
        """(this one, of so many)."""
        if self.config.part is None:
            return None
        one, many = map(int, self.config.part.split("/"))
        return one, many

    def tasks(self) -> Iterator[Task]:
        """Every task of the whole build, in the sources' order."""
        return make_tasks(self.inventory.address, self.inventory.sources(), self.config, self.pseudonyms, self.waivers)

    def own_tasks(self) -> Iterator[Task]:
        """Those of this part."""
        part = self.part
        return (task for task in self.tasks() if part is None or part_of(task, part[1]) == part[0])

    def settings(self) -> dict[str, Any]:
        """What the record says that the build was asked for."""
        asked = settings(self.config, self.pseudonyms.check)
        return asked | {
            "min_slices": self.config.min_slices,
            "hold_out": [side.digest for side in self.hold_out.sides],
            "waivers": self.waivers,
            "deidentification": deidentification_record(self.pseudonyms),
        }


def run_build(config: BuildConfig, progress: Progress, work: Work = build_volume) -> Outcome:
    """Build a store, or go on with one.

    Raises:
        ConfigError: the key cannot be used.
        SourceError: the source is missing, holds no image, or nothing in it can be stored.
        StoreError: the store's folder holds something else, or cannot be written.
    """
    root, store = config.source, Path(config.store)
    with Inventory(root, kept_headers(root)) as inventory:
        tree = inventory.list_files()
        refuse_overlap(root, store)
        refuse_foreign(store)
        before = read_standing(store)
        build = _prepare(config, inventory, before)
        digest = build.pseudonyms.digest([tree, build.settings()])
        finished = _finished_outcome(store, before, digest)
        if finished is not None:
            return finished
        inventory.read_headers(progress.looked, config.workers or 1)
        lost = [] if config.replace else losses(before, build.settings(), build.tasks())
        if lost:
            raise StoreError(f"{store}: {lost[0]}")
        with builder_lock(store, "-of-".join(map(str, build.part or ()))):
            if _fingerprint(read_standing(store)) != _fingerprint(before):
                raise StoreError(f"{store}: another build has finished here in the meantime; run this one again")
            return _do(build, digest, progress, work)


def _fingerprint(standing: Standing) -> str | None:
    return standing.record["fingerprint"] if standing.record is not None else None


def plan_build(config: BuildConfig, progress: Progress) -> Estimate:
    """What `run_build` would have to do; nothing is written.

    Raises:
        SourceError: the source is missing or holds no image.
        StoreError: the store's folder holds something else.
    """
    root, store = config.source, Path(config.store)
    with Inventory(root, kept_headers(root)) as inventory, Ledger(store) as ledger:
        inventory.list_files()
        refuse_overlap(root, store)
        refuse_foreign(store)
        before = read_standing(store)
        inventory.read_headers(progress.looked, config.workers or 1)
        build = _prepare(config, inventory, before)
        found = estimate(build.tasks(), config, ledger)
        asked = build.settings()
        found.warnings = [*losses(before, asked, build.tasks()), *changes(before, asked, "will be built again")]
        return found


def _prepare(config: BuildConfig, inventory: Inventory, before: Standing) -> _Build:
    key = load_key(Path(config.key_file) if config.key_file is not None else None)
    hold_out = HoldOut.load(map(Path, config.hold_out), key)
    return _Build(config, key, inventory, waivers_of(Path(config.store), before), before, hold_out)


def _do(build: _Build, digest: str, progress: Progress, work: Work) -> Outcome:
    store, inventory = build.store, build.inventory
    if build.part is None:
        # Beside builders of other parts, what looks left over may be theirs.
        remove_leftovers(store)
    _make_volumes_folder(store)
    part = "-of-".join(map(str, build.part or ()))
    with Ledger(store, part) as ledger:
        reasons = _run_tasks(build, ledger, progress, work)
        if build.part is not None:
            return _part_outcome(build, ledger, reasons)
        tables = collect(build.tasks(), ledger)
        _refuse_nothing(inventory.address, tables)
        _refuse_other_source(build, tables.keys)
        compare(store, tables, build.hold_out, build.pseudonyms.check)
        _refuse_nothing(inventory.address, tables)
        keys = tables.keys
        fingerprint = commit_dataset(store, tables.rows(), tables.quarantine(), build.settings(), tables.fingerprints())
        if not tables.may_pass:
            # What could not be read this time may be back the next: until then its volume stays where it is.
            remove_volumes_but(store, keys)
            write_finished(store, {"tree": digest, "fingerprint": fingerprint, "ignored": inventory.num_ignored})
        return Outcome(
            store,
            inventory.num_sources,
            len(keys),
            tables.num_subjects,
            len(tables.refused),
            inventory.num_ignored,
            tables.reasons,
            tables.bytes_raw,
            tables.bytes_stored,
            fingerprint,
            notes=(*_notes(build, tables, keys), *inventory.notes),
        )


def _run_tasks(build: _Build, ledger: Ledger, progress: Progress, work: Work) -> Counter[str]:
    """Do what is not done; reasons of what was refused in this run come back."""
    # One byte a task: they come in the same order each time.
    is_to_do = bytearray(not _is_done(build.store, ledger, task) for task in build.own_tasks())
    progress.began(is_to_do.count(False), len(is_to_do))
    reasons: Counter[str] = Counter()
    if not any(is_to_do):
        return reasons
    tasks = compress(build.own_tasks(), is_to_do)
    with closing(make_executor(build.config).run(work, tasks)) as ended:
        for result in ended:
            ledger.add(result)
            if result.rejected is not None:
                reasons[result.rejected[0]] += 1
            progress.advanced()
    return reasons


def _is_done(store: Path, ledger: Ledger, task: Task) -> bool:
    result = ledger.result(task)
    return result is not None and (result.row is None or is_whole(store, result.row))


def is_whole(store: Path, row: Row) -> bool:
    """Whether a volume has as many bytes on disk as were committed: what can be seen without reading it."""
    return folder_bytes(volume_folder(store, row.key)) == row.bytes_stored


def _part_outcome(build: _Build, ledger: Ledger, reasons: Counter[str]) -> Outcome:
    results = [result for task in build.own_tasks() if (result := ledger.result(task)) is not None]
    rows = [result.row for result in results if result.row is not None]
    return Outcome(
        build.store,
        len(results),
        len(rows),
        len({row.subject for row in rows}),
        len(results) - len(rows),
        build.inventory.num_ignored,
        reasons,
        sum(row.bytes_raw for row in rows),
        sum(row.bytes_stored for row in rows),
        "",
        notes=(
            f"part {build.config.part} is done; once all parts are, the same build without --part commits the store",
            *build.inventory.notes,
        ),
    )


def _notes(build: _Build, tables: Tables, keys: Names) -> Iterator[str]:
    before = build.before
    if before.is_damaged:
        yield "the record of the last build was damaged: it was written anew"
    elif before.record is not None:
        changed = list(changes(before, build.settings(), "was built again"))
        yield from changed
        num_dropped = len(before.keys) - before.keys.num_shared(keys)
        if num_dropped and tables.may_pass:
            yield f"{num_dropped} volumes of the last build are left out until their sources can be read again"
        elif num_dropped and not changed:
            yield f"{num_dropped} volumes of the last build are no longer in the source: removed"
    if tables.num_unknown_subjects:
        yield (
            f"{tables.num_unknown_subjects} volumes name no patient: each counts as its own subject; "
            "a subjects.csv in the source, or a list's column subject, says more"
        )
    if tables.groups:
        yield (f"{len(tables.groups)} volumes have copies under another subject: they stay on one side of a split")


def _finished_outcome(store: Path, before: Standing, digest: str) -> Outcome | None:
    """The outcome of the last build, where nothing has changed since and everything is in place."""
    noted = read_finished(store)
    if noted is None or before.record is None or noted.get("tree") != digest:
        return None
    if noted.get("fingerprint") != before.record["fingerprint"]:
        return None
    raw = stored = 0
    for row in iter_rows(table_path(store, before.record, MANIFEST)):
        if not is_whole(store, row):
            return None
        raw, stored = raw + row.bytes_raw, stored + row.bytes_stored
    try:
        quarantine = read_table(store, before.record, QUARANTINE, read_quarantine)
    except DamagedError:
        return None
    return Outcome(
        store,
        before.record["num_volumes"] + len(quarantine),
        before.record["num_volumes"],
        before.record["num_subjects"],
        len(quarantine),
        int(noted["ignored"]),
        Counter(row.reason for row in quarantine),
        raw,
        stored,
        str(before.record["fingerprint"]),
        was_complete=True,
    )


def _make_volumes_folder(store: Path) -> None:
    try:
        (store / VOLUMES).mkdir(exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"{store / VOLUMES}: cannot be made a folder ({error.strerror}); move away what stands there"
        ) from None


def _refuse_nothing(root: str, tables: Tables) -> None:
    if not len(tables.kept):
        reasons = ", ".join(f"{reason} {count}" for reason, count in tables.reasons.most_common())
        raise SourceError(f"{root}: none of {len(tables.refused)} inputs can be stored: {reasons}")


def _refuse_other_source(build: _Build, keys: Names) -> None:
    """A store that would lose every volume it has, and knows none of the sources, was built from something else."""
    before = build.before
    if not len(before.keys) or before.keys.num_shared(keys):
        return
    is_changed = before.record is not None and before.record["build_config"] != build.settings()
    if is_changed and any(task.source_key in before.source_keys for task in build.tasks()):
        # Other settings give other volumes: then the sources must be the same.
        return
    remove_volumes_but(build.store, before.keys)
    raise StoreError(
        f"{build.store}: holds {len(before.keys)} volumes and none of them is in this source; build into another "
        "folder, or delete this one"
    )
