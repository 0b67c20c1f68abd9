"""The rows that a build commits, from the ledger: who is a duplicate, who belongs together, who is kept out.

A few bytes are held for each volume, never rows: those are read from the ledger again as they are written.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.build.compact import Names, name_of, number_of
from data_pipeline.build.ledger import FOLDER, Ledger
from data_pipeline.build.task import Task, TaskResult
from data_pipeline.duplicates import groups
from data_pipeline.hold_out import HoldOut
from data_pipeline.leakage import StoredVoxels
from data_pipeline.reasons import PASSING, Reason
from mim_scale.errors import StoreError
from mim_scale.store.manifest import FingerprintRow, QuarantineRow, Row, iter_fingerprints, write_fingerprints

_KEPT = np.dtype([("key", ">u8"), ("task", "V16"), ("subject", ">u8"), ("is_known", "?")])
"""A volume that goes into the manifest; `is_known` says whether anything tells whose it is."""
_REFUSED = np.dtype([("source", ">u8"), ("task", "V16")])


@dataclass
class Tables:
    """What a build commits."""

    ledger: Ledger
    kept: NDArray[np.void]
    """By key."""
    refused: NDArray[np.void]
    """By source key."""
    found: dict[bytes, tuple[str, str]]
    """Reason and detail of the refused, by task, where they come from here and not from the task."""
    reasons: Counter[str]
    bytes_raw: int
    bytes_stored: int
    aliases: list[tuple[str, str]] = field(default_factory=list)
    """(key, subject) of copies that are refused as such: whose their volume is, too."""
    groups: dict[str, str] = field(default_factory=dict)
    """Of keys whose group is another than their subject."""

    def hold_out(self, held: dict[str, str]) -> None:
        """Refuse these volumes, by key, for these details."""
        is_held = np.isin(self.kept["key"], np.array([number_of(key) for key in held], np.uint64))
        refused = bytearray()
        for record in self.kept[is_held]:
            task_key = record["task"].tobytes()
            result = self.ledger.at(task_key)
            assert result.row is not None
            self.bytes_raw -= result.row.bytes_raw
            self.bytes_stored -= result.row.bytes_stored
            self.found[task_key] = (Reason.HELD_OUT, held[result.row.key])
            self.reasons[Reason.HELD_OUT] += 1
            refused += bytes.fromhex(result.source_key) + task_key
        self.kept = self.kept[~is_held]
        self.refused = _sorted(np.concatenate([self.refused, np.frombuffer(refused, _REFUSED)]), "source")

    @property
    def keys(self) -> Names:
        """Of the volumes that are kept."""
        return Names(self.kept["key"])

    @property
    def num_subjects(self) -> int:
        """Whose volumes are kept."""
        return len(Names(self.kept["subject"]))

    @property
    def num_unknown_subjects(self) -> int:
        """Volumes of which nothing says whose they are."""
        return int(np.count_nonzero(~self.kept["is_known"]))

    @property
    def may_pass(self) -> bool:
        """Whether some inputs were refused for what lies in the machine."""
        return any(reason in PASSING for reason in self.reasons)

    def rows(self) -> Iterator[Row]:
        """The manifest, by key."""
        for _, row, subject in self._results():
            yield replace(row, subject=subject, group=self.groups.get(row.key, subject))

    def quarantine(self) -> Iterator[QuarantineRow]:
        """The refused inputs, by source key."""
        for record in self.refused:
            task_key = record["task"].tobytes()
            result = self.ledger.at(task_key)
            reason, detail = self.found.get(task_key) or result.rejected or ("", "")
            yield QuarantineRow(result.source_key, result.source_format, reason, detail)

    def fingerprints(self) -> Iterator[FingerprintRow]:
        """The volume fingerprints, by key."""
        for result, row, subject in self._results():
            yield FingerprintRow(row.key, subject, row.series, row.content_hash, row.voxel_hash, result.fingerprint)

    def _results(self) -> Iterator[tuple[TaskResult, Row, str]]:
        """(result, its row, whose it is) of the volumes that are kept, by key."""
        for record in self.kept:
            result = self.ledger.at(record["task"].tobytes())
            assert result.row is not None
            yield result, result.row, name_of(int(record["subject"]))


def _sorted(records: NDArray[np.void], by: str) -> NDArray[np.void]:
    return records[np.argsort(records[by], kind="stable")]


def collect(tasks: Iterable[Task], ledger: Ledger) -> Tables:
    """Go through every source's result in the sources' order: of equal volumes the first is kept, whoever ended first.

    Raises:
        KeyError: a task has no result yet.
    """
    kept, refused = bytearray(), bytearray()
    found: dict[bytes, tuple[str, str]] = {}
    reasons: Counter[str] = Counter()
    bytes_raw = bytes_stored = 0
    seen: set[bytes] = set()
    aliases: list[tuple[str, str]] = []
    for task in tasks:
        task_key = bytes.fromhex(task.key[:32])
        result = ledger.at(task_key)
        row = result.row
        content = bytes.fromhex(row.content_hash)[:16] if row is not None else b""
        if row is None or content in seen:
            reason = (result.rejected or ("", ""))[0] if row is None else Reason.DUPLICATE
            if row is not None:
                found[task_key] = (Reason.DUPLICATE, f"equal to volume {row.key}, voxel for voxel")
                aliases.append((row.key, task.pseudonyms.subject(task.source.subject, "") or row.subject))
            refused += bytes.fromhex(task.source_key) + task_key
            reasons[str(reason)] += 1
            continue
        seen.add(content)
        listed = task.pseudonyms.subject(task.source.subject, "")
        is_known = bool(listed) or row.subject != task.pseudonyms.pseudonym("volume", row.content_hash)
        kept += bytes.fromhex(row.key) + task_key + bytes.fromhex(listed or row.subject) + bytes([is_known])
        bytes_raw, bytes_stored = bytes_raw + row.bytes_raw, bytes_stored + row.bytes_stored
    return Tables(
        ledger,
        _sorted(np.frombuffer(kept, _KEPT), "key"),
        _sorted(np.frombuffer(refused, _REFUSED), "source"),
        found,
        reasons,
        bytes_raw,
        bytes_stored,
        aliases,
    )


def compare(store: Path, tables: Tables, hold_out: HoldOut, key_check: str) -> None:
    """Compare the volumes with one another and with what is to be kept out; fill in groups, move copies to the refused.

    A large search runs in a process of its own, so that its memory is gone when the tables are written.
    """
    table = store / FOLDER / "fingerprints.parquet"
    write_fingerprints(table, tables.fingerprints())
    try:
        if len(tables.kept) < _ENOUGH_FOR_A_PROCESS:
            tables.groups, held = _search(table, hold_out, key_check, tables.aliases)
        else:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                tables.groups, held = pool.submit(_search, table, hold_out, key_check, tables.aliases).result()
    except BrokenProcessPool:
        raise StoreError(f"{store}: the search for copies was killed (no memory?); run the build again") from None
    finally:
        table.unlink()
    if held:
        tables.hold_out(held)


_ENOUGH_FOR_A_PROCESS = 500


def _search(
    table: Path, hold_out: HoldOut, key_check: str, aliases: list[tuple[str, str]]
) -> tuple[dict[str, str], dict[str, str]]:
    """The group of each volume whose group is not its subject, and why a volume is held out."""
    rows = tuple(iter_fingerprints(table))
    found = groups(rows, aliases)
    voxels = StoredVoxels(table.parent.parent)
    held = hold_out.matches(rows, key_check, voxels) if hold_out.sides else {}
    details = {key: f"{why.evidence}: {why.key} of {why.list_name}" for key, why in held.items()}
    # Whoever is in a test set is out with all their scans.
    first_of = {found[key]: key for key in sorted(details, reverse=True)}
    for row in rows:
        if row.key not in details and found[row.key] in first_of:
            details[row.key] = f"same_patient: as volume {first_of[found[row.key]]}, which is held out"
    return {row.key: found[row.key] for row in rows if found[row.key] != row.subject}, details
