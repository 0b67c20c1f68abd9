"""The rows that a build commits, from the ledger: who is a duplicate, who belongs together, who is kept out.

Numbers are held for each volume, never rows: those are read from the ledger again as they are written.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

from data_pipeline.build.ledger import FOLDER, Ledger
from data_pipeline.build.task import Task
from data_pipeline.duplicates import groups
from data_pipeline.hold_out import HoldOut
from data_pipeline.leakage import StoredVoxels
from data_pipeline.reasons import PASSING, Reason
from mim_scale.errors import StoreError
from mim_scale.store.manifest import FingerprintRow, QuarantineRow, Row, iter_fingerprints, write_fingerprints


@dataclass(frozen=True, slots=True)
class _Kept:
    """One volume that goes into the manifest."""

    key: str
    task_key: bytes
    subject: bytes
    """8 bytes: a table or description says so; empty where the header's stands."""
    is_known: bool
    """Whether anything says whose it is."""


@dataclass(frozen=True, slots=True)
class _Refused:
    source_key: str
    task_key: bytes
    found: tuple[str, str] | None = None
    """Reason and detail where they come from here and not from the task."""


@dataclass
class Tables:
    """What a build commits."""

    ledger: Ledger
    kept: list[_Kept] = field(default_factory=list)
    refused: list[_Refused] = field(default_factory=list)
    groups: dict[str, str] = field(default_factory=dict)
    """Of keys whose group is another than their subject."""
    reasons: Counter[str] = field(default_factory=Counter)
    bytes_raw: int = 0
    bytes_stored: int = 0
    num_unknown_subjects: int = 0
    subjects: set[bytes] = field(default_factory=set)

    def refuse(self, source_key: str, task_key: bytes, found: tuple[str, str], is_of_task: bool = False) -> None:
        """One input more for the quarantine."""
        self.refused.append(_Refused(source_key, task_key, None if is_of_task else found))
        self.reasons[str(found[0])] += 1

    def hold_out(self, held: dict[str, str]) -> None:
        """Refuse these volumes, by key, for these details."""
        if not held:
            return
        kept, self.kept = self.kept, []
        self.bytes_raw = self.bytes_stored = self.num_unknown_subjects = 0
        self.subjects.clear()
        for one in kept:
            result = self.ledger.at(one.task_key)
            if one.key in held:
                self.refuse(result.source_key, one.task_key, (Reason.HELD_OUT, held[one.key]))
            elif result.row is not None:
                self.keep(one, result.row)
        self.refused.sort(key=lambda refused: refused.source_key)

    def keep(self, kept: _Kept, row: Row) -> None:
        """One volume more for the manifest."""
        self.kept.append(kept)
        self.bytes_raw += row.bytes_raw
        self.bytes_stored += row.bytes_stored
        self.num_unknown_subjects += not kept.is_known
        self.subjects.add(kept.subject or bytes.fromhex(row.subject))

    @property
    def may_pass(self) -> bool:
        """Whether some inputs were refused for what lies in the machine."""
        return any(reason in PASSING for reason in self.reasons)

    def rows(self) -> Iterator[Row]:
        """The manifest, by key."""
        for kept in self.kept:
            row = self.ledger.at(kept.task_key).row
            assert row is not None
            subject = kept.subject.hex() or row.subject
            yield replace(row, subject=subject, group=self.groups.get(row.key, subject))

    def quarantine(self) -> Iterator[QuarantineRow]:
        """The refused inputs, by source key."""
        for refused in self.refused:
            result = self.ledger.at(refused.task_key)
            reason, detail = refused.found or result.rejected or ("", "")
            yield QuarantineRow(result.source_key, result.source_format, reason, detail)

    def fingerprints(self) -> Iterator[FingerprintRow]:
        """The volume fingerprints, by key."""
        for kept in self.kept:
            result = self.ledger.at(kept.task_key)
            row = result.row
            assert row is not None
            subject = kept.subject.hex() or row.subject
            yield FingerprintRow(row.key, subject, row.series, row.content_hash, row.voxel_hash, result.fingerprint)


def collect(tasks: Iterable[Task], ledger: Ledger) -> Tables:
    """Go through every source's result in the sources' order: of equal volumes the first is kept, whoever ended first.

    Raises:
        KeyError: a task has no result yet.
    """
    tables = Tables(ledger)
    seen: set[bytes] = set()
    for task in tasks:
        task_key = bytes.fromhex(task.key[:32])
        result = ledger.at(task_key)
        if result.row is None:
            tables.refuse(task.source_key, task_key, result.rejected or ("", ""), is_of_task=True)
            continue
        row = result.row
        content = bytes.fromhex(row.content_hash)[:16]
        if content in seen:
            detail = f"equal to volume {row.key}, voxel for voxel"
            tables.refuse(task.source_key, task_key, (Reason.DUPLICATE, detail))
            continue
        seen.add(content)
        listed = task.pseudonyms.pseudonym("listed", task.source.subject) if task.source.subject else ""
        is_known = bool(listed) or row.subject != task.pseudonyms.pseudonym("volume", row.content_hash)
        tables.keep(_Kept(row.key, task_key, bytes.fromhex(listed), is_known), row)
    tables.kept.sort(key=lambda kept: kept.key)
    tables.refused.sort(key=lambda refused: refused.source_key)
    return tables


def compare(store: Path, tables: Tables, hold_out: HoldOut, key_check: str) -> None:
    """Compare the volumes with one another and with what is to be kept out; fill in groups, move copies to the refused.

    A large search runs in a process of its own, so that its memory is gone when the tables are written.
    """
    table = store / FOLDER / "fingerprints.parquet"
    write_fingerprints(table, tables.fingerprints())
    try:
        if len(tables.kept) < _ENOUGH_FOR_A_PROCESS:
            tables.groups, held = _search(table, hold_out, key_check)
        else:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                tables.groups, held = pool.submit(_search, table, hold_out, key_check).result()
    except BrokenProcessPool:
        raise StoreError(f"{store}: the search for copies was killed (no memory?); run the build again") from None
    finally:
        table.unlink()
    tables.hold_out(held)


_ENOUGH_FOR_A_PROCESS = 500


def _search(table: Path, hold_out: HoldOut, key_check: str) -> tuple[dict[str, str], dict[str, str]]:
    """The group of each volume whose group is not its subject, and why a volume is held out."""
    rows = tuple(iter_fingerprints(table))
    found = groups(rows)
    voxels = StoredVoxels(table.parent.parent)
    held = hold_out.matches(rows, key_check, voxels) if hold_out.sides else {}
    details = {key: f"{why.evidence}: {why.key} of {why.list_name}" for key, why in held.items()}
    return {row.key: found[row.key] for row in rows if found[row.key] != row.subject}, details
