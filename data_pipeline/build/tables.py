"""The rows that a build commits, from the ledger: who is a duplicate, who belongs together, who is kept out.

Numbers are held for each volume, never rows: those are read from the ledger again as they are written.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from data_pipeline.build.ledger import Ledger
from data_pipeline.build.task import Task
from data_pipeline.reasons import PASSING, Reason
from mim_scale.store.manifest import FingerprintRow, QuarantineRow, Row


@dataclass(frozen=True, slots=True)
class _Kept:
    """One volume that goes into the manifest."""

    key: str
    task_key: bytes
    subject: bytes
    """8 bytes: a table or description says so; empty where the header's stands."""


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
    subjects: set[str] = field(default_factory=set)

    def refuse(self, source_key: str, task_key: bytes, found: tuple[str, str], is_of_task: bool = False) -> None:
        """One input more for the quarantine."""
        self.refused.append(_Refused(source_key, task_key, None if is_of_task else found))
        self.reasons[str(found[0])] += 1

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
        for row, kept in zip(self.rows(), self.kept, strict=True):
            mark = self.ledger.at(kept.task_key).fingerprint
            yield FingerprintRow(row.key, row.subject, row.series, row.content_hash, row.voxel_hash, mark)


def collect(tasks: Iterable[Task], ledger: Ledger) -> Tables:
    """Go through every source's result in the sources' order: of equal volumes the first is kept, whoever ended first.

    Raises:
        KeyError: a task has no result yet.
    """
    tables = Tables(ledger)
    seen: set[bytes] = set()
    ties = _Ties()
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
        subject = listed or row.subject
        tables.kept.append(_Kept(row.key, task_key, bytes.fromhex(listed)))
        tables.bytes_raw += row.bytes_raw
        tables.bytes_stored += row.bytes_stored
        tables.subjects.add(subject)
        tables.num_unknown_subjects += subject == task.pseudonyms.pseudonym("volume", row.content_hash)
        ties.add(row, subject)
    tables.kept.sort(key=lambda kept: kept.key)
    tables.refused.sort(key=lambda refused: refused.source_key)
    tables.groups = ties.groups()
    return tables


class _Ties:
    """Subjects that belong together, because volumes of theirs are copies of each other."""

    def __init__(self) -> None:
        self._above: dict[str, str] = {}
        self._first: dict[tuple[str, bytes], str] = {}
        self._subject_of: dict[str, str] = {}

    def add(self, row: Row, subject: str) -> None:
        """One volume: it ties its subject to those of volumes with equal voxels or of the same series."""
        for kind, mark in (("voxels", row.voxel_hash), ("series", row.series)):
            if mark:
                self.tie(subject, self._first.setdefault((kind, bytes.fromhex(mark)[:12]), subject))
        self._subject_of[row.key] = subject

    def tie(self, one: str, other: str) -> None:
        """Two subjects are one group."""
        first, second = self._root(one), self._root(other)
        if first != second:
            self._above[max(first, second)] = min(first, second)

    def groups(self) -> dict[str, str]:
        """The group of each volume whose group is not its subject."""
        found = {key: self._root(subject) for key, subject in self._subject_of.items() if subject in self._above}
        return {key: group for key, group in found.items() if group != self._subject_of[key]}

    def _root(self, subject: str) -> str:
        while subject in self._above:
            subject = self._above[subject]
        return subject
