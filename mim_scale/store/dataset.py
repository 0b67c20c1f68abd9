"""A dataset: volumes, a manifest, a table of what was refused, and the commit record without which it does not exist.

The record is written last and names the hash of both tables, so a reader sees the dataset before a build or after it,
never half.
"""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from mim_scale import disk
from mim_scale.commit import has_seal, sealed, sha256_file, sha256_values, sync_folder, unsealed, write_file
from mim_scale.errors import DamagedError, StoreError
from mim_scale.store.array_format import FORMAT_VERSION
from mim_scale.store.array_store import VolumeReader
from mim_scale.store.distinct import Distinct
from mim_scale.store.manifest import (
    FingerprintRow,
    QuarantineRow,
    Row,
    read_quarantine,
    read_rows,
    write_fingerprints,
    write_quarantine,
    write_rows,
)

RECORD = "dataset.json"
MANIFEST = "manifest.parquet"
QUARANTINE = "quarantine.parquet"
FINGERPRINTS = "fingerprints.parquet"
VOLUMES = "volumes"
PENDING = ".next"
"""A table whose record is being written stands beside the old one with this suffix; readers go by the record's hash."""

MEND = "run the same `data build` again, which writes it anew"
"""What to do about a damaged record or table."""

_UNSEALED = 1
"""The format version whose records have no digest."""
_OPEN_VOLUMES = 256
_COUNTS = ("num_volumes", "num_subjects", "num_quarantined")
_RECORD_KEYS = ("fingerprint", *_COUNTS, "files", "build_config", "build_config_digest")

Table = TypeVar("Table")


def volume_folder(path: Path, key: str) -> Path:
    """Where a dataset keeps the volume of this key."""
    return path / VOLUMES / f"{key}.zarr"


def fingerprint(rows: Iterable[Row]) -> str:
    """SHA-256, as hex, over format version and sorted (key, content hash, group): equal data, equal fingerprint.

    The group counts because the split goes by it, and with the split the order.
    """
    digest = _new_digest()
    for row in sorted(rows, key=lambda row: row.key):
        _add_to_digest(digest, row)
    return str(digest.hexdigest())


def _new_digest() -> Any:
    return hashlib.sha256(f"mim-scale dataset {FORMAT_VERSION}\n".encode())


def _add_to_digest(digest: Any, row: Row) -> None:
    digest.update(f"{row.key} {row.content_hash} {row.group}\n".encode())


def commit_dataset(
    path: Path,
    rows: Iterable[Row],
    quarantine: Iterable[QuarantineRow],
    build_config_values: dict[str, Any],
    fingerprints: Iterable[FingerprintRow] = (),
) -> str:
    """Make the volumes below `path` a dataset, or replace the one that stands there.

    Tables are written as rows come, so that memory does not grow with their number.

    Args:
        path: The dataset's folder; the volumes of all rows are in it already.
        rows: One for each volume, by key.
        quarantine: One for each refused input, by source key.
        build_config_values: What the build was asked for; kept in the record with its digest.
        fingerprints: One for each volume, by key.

    Returns:
        The dataset's fingerprint.

    Raises:
        StoreError: no rows, rows that are not in the order of their keys, each once, or a disk that refuses.
    """
    with _refusals_as_errors(path):
        tables = (MANIFEST, QUARANTINE, FINGERPRINTS)
        _settle(path, tables)
        count = _Counted(path)
        # Hashed as written: what a network file system reads back may be older.
        files = {
            MANIFEST: write_rows(path / (MANIFEST + PENDING), count.volumes(rows)),
            QUARANTINE: write_quarantine(path / (QUARANTINE + PENDING), count.refused(quarantine)),
            FINGERPRINTS: write_fingerprints(path / (FINGERPRINTS + PENDING), fingerprints),
        }
        record = _record(path, count, files, build_config_values)
        write_file(path / RECORD, sealed(record)[0])
        # From here on the new dataset stands: until these names are in place, readers find the tables by their hash.
        sync_folder(path.parent)
        _settle(path, tables)
    return str(record["fingerprint"])


@contextmanager
def _refusals_as_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{error.filename or path}: {error.strerror or error}: the dataset was not committed to its end; "
            "mend that, then run the same build again"
        ) from None


def _record(
    path: Path, count: "_Counted", files: dict[str, str], build_config_values: dict[str, Any]
) -> dict[str, Any]:
    if not count.num_volumes:
        raise StoreError(f"{path}: nothing to commit: no volume was stored ({count.num_quarantined} inputs refused)")
    return {
        "format": "mim-scale dataset",
        "format_version": FORMAT_VERSION,
        "fingerprint": count.digest.hexdigest(),
        "num_volumes": count.num_volumes,
        "num_subjects": len(count.subjects),
        "num_quarantined": count.num_quarantined,
        "files": files,
        "build_config": build_config_values,
        "build_config_digest": sha256_values(build_config_values),
    }


class _Counted:
    """What a record says of rows, gathered as they pass by."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.digest = _new_digest()
        self.num_volumes = 0
        self.num_quarantined = 0
        self.subjects = Distinct()

    def volumes(self, rows: Iterable[Row]) -> Iterator[Row]:
        last = ""
        for row in rows:
            if row.key == last:
                raise StoreError(f"{self._path}: two manifest rows have the key {last}; store equal volumes once")
            if row.key < last:
                raise StoreError(f"{self._path}: rows come by key: {row.key} after {last}")
            last = row.key
            self.num_volumes += 1
            self.subjects.add(row.subject)
            _add_to_digest(self.digest, row)
            yield row

    def refused(self, rows: Iterable[QuarantineRow]) -> Iterator[QuarantineRow]:
        for row in rows:
            self.num_quarantined += 1
            yield row


def _settle(path: Path, names: tuple[str, ...]) -> None:
    """Give the tables that the record names their final names: the last act of a commit, or of one that was killed."""
    try:
        record = read_record(path)
    except StoreError:
        return
    for name in names:
        pending = path / (name + PENDING)
        if pending.is_file() and sha256_file(pending) == record["files"].get(name):
            disk.rename(pending, path / name)
    sync_folder(path)


class Dataset:
    """A committed dataset, open for reading. Pickles by its path and fingerprint."""

    def __init__(self, path: Path, record: dict[str, Any], rows: tuple[Row, ...]) -> None:
        self.path = path
        self.record = record
        self.rows = rows
        """Sorted by key."""
        self._lock = threading.Lock()
        self._readers: OrderedDict[str, VolumeReader] = OrderedDict()

    @classmethod
    def open(cls, path: Path | str) -> "Dataset":
        """Open a dataset, checking its record and its tables against each other.

        Raises:
            StoreError: no such folder, no commit record, a record of another format version.
            DamagedError: the record is damaged, or a table is not the one that it names.
        """
        path = Path(path)
        record = read_record(path)
        try:
            rows = read_table(path, record, MANIFEST, read_rows)
        except DamagedError:
            # A commit may have come between the two readings: then the record is another one now.
            if (newer := read_record(path)) == record:
                raise
            record, rows = newer, read_table(path, newer, MANIFEST, read_rows)
        dataset = cls(path, record, rows)
        held = {
            "fingerprint": fingerprint(rows),
            **_counts(rows),
            "build_config_digest": sha256_values(record["build_config"]),
        }
        for name, value in held.items():
            if record[name] != value:
                raise DamagedError(f"{path}: {RECORD} says {name} {record[name]}, but it is {value}; {MEND}")
        return dataset

    @property
    def fingerprint(self) -> str:
        """SHA-256, as hex, of what the dataset holds."""
        return str(self.record["fingerprint"])

    @cached_property
    def quarantine(self) -> tuple[QuarantineRow, ...]:
        """The inputs that the build refused, sorted by source key."""
        rows = read_table(self.path, self.record, QUARANTINE, read_quarantine)
        if len(rows) != self.record["num_quarantined"]:
            raise DamagedError(
                f"{self.path}: {RECORD} says num_quarantined {self.record['num_quarantined']}, but it is {len(rows)}; "
                f"{MEND}"
            )
        return rows

    def reader(self, row: Row) -> VolumeReader:
        """The reader of a volume; the most recent ones stay open."""
        with self._lock:
            reader = self._readers.pop(row.key, None)
            if reader is None:
                reader = VolumeReader(volume_folder(self.path, row.key), row.key, row.shape)
            self._readers[row.key] = reader
            if len(self._readers) > _OPEN_VOLUMES:
                self._readers.popitem(last=False)
            return reader

    def __reduce__(self) -> tuple[Callable[[str, str], "Dataset"], tuple[str, str]]:
        return _open_same, (str(self.path.resolve()), self.fingerprint)


def _open_same(path: str, expected: str) -> Dataset:
    dataset = Dataset.open(path)
    if dataset.fingerprint != expected:
        raise StoreError(f"{path}: holds the dataset {dataset.fingerprint[:16]} here, the sender has {expected[:16]}")
    return dataset


def read_record(path: Path) -> dict[str, Any]:
    """A dataset's commit record.

    Raises:
        StoreError: no such folder, no record, another format version.
        DamagedError: the record is not byte for byte as it was written.
    """
    if not path.is_dir():
        raise StoreError(f"{path}: no such store; make one with `mim-scale data build SOURCE {path}`")
    try:
        return parse_record(disk.read(path / RECORD), path)
    except FileNotFoundError:
        raise StoreError(
            f"{path}: has no commit record ({RECORD}): no store, or its build was interrupted; run `data build` again"
        ) from None
    except OSError as error:
        raise DamagedError(f"{path}: {RECORD} is unreadable ({error.strerror}); {MEND}") from None


def parse_record(data: bytes, where: Path | str) -> dict[str, Any]:
    """The values of a commit record; raises as `read_record`, naming `where` it came from."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        raise DamagedError(f"{where}: {RECORD} is damaged: it is no JSON; {MEND}") from None
    if not isinstance(record, dict) or record.get("format") != "mim-scale dataset":
        raise DamagedError(f"{where}: {RECORD} is damaged, or no record of a dataset; {MEND}")
    version = record.get("format_version")
    # A damaged digit must not pass for another version: all but the first version carry a digest.
    if not has_seal(record) and (version != _UNSEALED or "digest" in record):
        raise DamagedError(f"{where}: {RECORD} is damaged: it does not have its own digest; {MEND}")
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{where}: format version {version}, this program reads {FORMAT_VERSION}; build into another folder"
        )
    try:
        unsealed(data)
    except ValueError:
        raise DamagedError(f"{where}: {RECORD} is damaged: it is not as it was written; {MEND}") from None
    missing = [key for key in _RECORD_KEYS if key not in record]
    if missing:
        raise DamagedError(f"{where}: {RECORD} lacks {missing[0]}; {MEND}")
    return record


def read_table(path: Path, record: dict[str, Any], name: str, read: Callable[[Path], Table]) -> Table:
    """The table that the record names.

    Raises:
        DamagedError: neither the file nor the one that stands beside it during a commit has the record's hash.
    """
    return read(table_path(path, record, name))


def table_path(path: Path, record: dict[str, Any], name: str) -> Path:
    """The file of the table that the record names.

    Raises:
        DamagedError: neither the file nor the one that stands beside it during a commit has the record's hash.
    """
    files = record["files"]
    expected = files.get(name) if isinstance(files, dict) else None
    for file in (path / name, path / (name + PENDING)):
        if file.is_file() and sha256_file(file) == expected:
            return file
    state = "does not have the hash that the record names" if (path / name).is_file() else "is missing"
    raise DamagedError(f"{path}: {name} {state}; {MEND}")


def _counts(rows: Sequence[Row]) -> dict[str, int]:
    return {"num_volumes": len(rows), "num_subjects": len({row.subject for row in rows})}
