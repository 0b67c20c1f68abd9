"""A finished folder into a bucket and back: parts first, the commit record last, so that no reader meets half of one.

Every object carries its SHA-256 as metadata; one that is there with equal size and digest is not sent again. A store's
volumes are named by their content, so a newer build never touches what an older record names; its tables take the place
of the old ones by the same steps as on a disk: beside them first, then the record, then their own names.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_pipeline.storage.objects import ObjectStorage
from data_pipeline.storage.storage import side_by_side
from mim_scale.commit import publish_folder, sha256_file, temporary_beside, write_file
from mim_scale.errors import DamagedError, LostObjectError, SourceError, StorageError, StoreError
from mim_scale.store.array_store import folder_bytes
from mim_scale.store.dataset import (
    MANIFEST,
    PENDING,
    RECORD,
    VOLUMES,
    Dataset,
    parse_record,
    read_record,
    volume_folder,
)
from mim_scale.store.manifest import Row, read_rows
from mim_scale.store.verify import verify

RECORDS = (RECORD, "pack.json", "config.json")
"""Of a store, a pack, an export."""

_WIDTH = 8
"""Volumes or files under way at once."""
_IN_MEMORY = 8 << 20
"""Files up to this size are read once; larger ones twice, for their digest and in parts."""


class Progress(Protocol):
    """Hears how far an upload or a download is."""

    def began(self, done: int, total: int) -> None:
        """So many bytes are to be dealt with."""

    def advanced(self, num_bytes: int, /) -> None:
        """So many more are where they belong."""


@dataclass(frozen=True)
class Pushed:
    """What an upload did."""

    num_objects: int
    num_bytes: int
    num_sent: int
    bytes_sent: int
    """Of what was not there already."""
    num_old: int
    """Objects of volumes that only older builds name."""
    old_deleted: bool


def push_folder(folder: Path, url: str, progress: Progress, delete_old: bool = False) -> Pushed:
    """Upload a store, a pack or an export, or go on with that.

    Args:
        delete_old: afterwards remove the volumes that only older records name; readers of those lose them.

    Raises:
        StoreError: the folder has no commit record, or another upload to the same address was faster.
        DamagedError: the folder is damaged, or changed while it was sent.
        StorageError: the storage cannot be used.
    """
    if not url.startswith(("s3://", "gs://")):
        raise SourceError(f"{url}: is no bucket; give s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
    record = _checked(folder)
    target = ObjectStorage(url)
    target.check()
    return _Push(folder, target, record, progress).run(delete_old)


def _checked(folder: Path) -> str:
    """The name of the folder's commit record; refused where the folder is not whole."""
    found = next((name for name in RECORDS if (folder / name).is_file()), RECORD)
    if found == RECORD:
        read_record(folder)
        problems = verify(folder)
        if problems:
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            raise DamagedError(f"{folder}: damaged, so it is not sent: {problems[0].detail}{more}")
    return found


class _Push:
    def __init__(self, folder: Path, target: ObjectStorage, record: str, progress: Progress) -> None:
        self._folder = folder
        self._target = target
        self._record = record
        self._progress = progress
        self._is_store = record == RECORD
        # By the manifest: what lies in a store's folder besides is none of the dataset.
        self._rows = Dataset.open(folder).rows if self._is_store else ()
        self._data = (folder / record).read_bytes()
        self._tables: dict[str, str] = json.loads(self._data)["files"] if self._is_store else {}
        """Names and digests."""
        self._count = self._bytes = self._sent = self._bytes_sent = 0

    def run(self, delete_old: bool) -> Pushed:
        before, tag = self._record_there()
        if not self._is_store and before not in {None, self._data}:
            raise StoreError(
                f"{self._target.url}: holds another {self._record.partition('.')[0]}; give an address of its own"
            )
        self._progress.began(0, sum(row.bytes_stored for row in self._rows) or folder_bytes(self._folder))
        if before is not None and before != self._data:
            with suppress(ValueError, LookupError, TypeError):  # a record that nobody can read has no tables to save
                self._settle(json.loads(before)["files"])
        for count, num_bytes, sent, bytes_sent in side_by_side(
            self._send_group, self._groups(), _WIDTH if self._is_store else 1
        ):
            self._count, self._bytes = self._count + count, self._bytes + num_bytes
            self._sent, self._bytes_sent = self._sent + sent, self._bytes_sent + bytes_sent
        if before != self._data:
            self._commit(tag, is_first=before is None)
        self._settle(self._tables)
        for name, digest in self._tables.items():
            if self._target.digest(name) != digest:
                raise StorageError(f"{self._target.url}: does not hold {name} as it was sent; run the same again")
            if self._target.digest(name + PENDING) is not None:
                self._target.delete([name + PENDING])
        is_update = before not in {None, self._data}
        num_old = self._old(delete_old) if self._is_store and (is_update or delete_old) else 0
        return Pushed(
            self._count + len(self._tables) + 1, self._bytes, self._sent, self._bytes_sent, num_old, delete_old
        )

    def _groups(self) -> Iterator[dict[str, int]]:
        """Sizes of files by path, in groups that are listed and compared together: one volume's, or all of a pack."""
        for root in [f"{VOLUMES}/{row.key}.zarr" for row in self._rows] if self._is_store else [""]:
            found = {}
            for place, _, names in os.walk(self._folder / root):
                for path in (Path(place, name) for name in names):
                    found[path.relative_to(self._folder).as_posix()] = path.stat().st_size
            found.pop(self._record, None)
            yield found

    def _record_there(self) -> tuple[bytes | None, str | None]:
        try:
            return self._target.read(self._record)
        except LostObjectError:
            return None, None

    def _send_group(self, group: dict[str, int]) -> tuple[int, int, int, int]:
        """Send what is not there of a group; files and bytes of it, and of those that were sent."""
        root = "/".join(next(iter(group)).split("/")[:2]) if self._is_store else None
        there = self._target.listed(root)
        sent = list(
            side_by_side(lambda path: self._send(path, group[path], there), group, 1 if self._is_store else _WIDTH)
        )
        if any(sent):
            there = self._target.listed(root)
            if any(there.get(path) != size for path, size in group.items()):
                raise StorageError(f"{self._target.url}: lacks objects that it took a moment ago; run the same again")
        return len(group), sum(group.values()), len(list(filter(None, sent))), sum(sent)

    def _send(self, path: str, size: int, there: dict[str, int]) -> int:
        """Send a file unless it is there; bytes sent."""
        file = self._folder / path
        data = file.read_bytes() if size <= _IN_MEMORY else None
        digest = hashlib.sha256(data).hexdigest() if data is not None else sha256_file(file)
        is_there = there.get(path) == size and self._target.digest(path) == digest
        if not is_there:
            self._target.put(path, file if data is None else data, digest)
        self._progress.advanced(size)
        return 0 if is_there else size

    def _commit(self, tag: str | None, is_first: bool) -> None:
        for name, digest in self._tables.items():
            table = (self._folder / name).read_bytes()
            if hashlib.sha256(table).hexdigest() != digest:
                raise DamagedError(f"{self._folder}: {name} changed while it was sent; run the same again")
            self._target.put(name if is_first else name + PENDING, table, digest)
        if not self._target.replace(self._record, self._data, hashlib.sha256(self._data).hexdigest(), tag):
            raise StoreError(f"{self._target.url}: another upload to this address was faster; run the same again")
        self._sent, self._bytes_sent = self._sent + len(self._tables) + 1, self._bytes_sent + len(self._data)

    def _settle(self, tables: dict[str, str]) -> None:
        """Give the tables of the record that stands there their own names: the end of an upload, or of a killed one."""
        for name, digest in tables.items():
            if self._target.digest(name) != digest and self._target.digest(name + PENDING) == digest:
                self._target.copy(name + PENDING, name)

    def _old(self, delete: bool) -> int:
        """How many objects of volumes no longer belong to the dataset; they are removed where that is asked for."""
        keys = {row.key for row in self._rows}
        found = 0
        batch: list[str] = []
        for path in self._target.paths(VOLUMES):
            key = path.split("/")[1].removesuffix(".zarr")
            if key in keys and (self._folder / path).is_file():
                continue
            found += 1
            batch.append(path)
            if delete and len(batch) == 1000:
                self._target.delete(batch)
            if len(batch) == 1000:
                batch.clear()
        if delete and batch:
            self._target.delete(batch)
        return found


def pull_store(url: str, store: Path, progress: Progress) -> int:
    """Download a store, or go on with that; its record comes last, and what is damaged is not committed.

    Returns:
        Bytes that were fetched.

    Raises:
        StoreError: there is no store at the address, or the folder holds something else.
        DamagedError: what came is not what the record names.
        StorageError: the storage cannot be used.
    """
    source = ObjectStorage(url)
    source.check()
    if store.exists() and (not store.is_dir() or (not (store / VOLUMES).is_dir() and any(store.iterdir()))):
        raise StoreError(f"{store}: exists and is no store; nothing was touched; choose another folder")
    try:
        data, _ = source.read(RECORD)
        tables = parse_record(data, url)["files"]
    except LostObjectError:
        raise StoreError(f"{url}: has no commit record ({RECORD}): no store, or its upload did not end") from None
    except DamagedError as error:
        raise DamagedError(f"{str(error).partition(';')[0]}; push the store again") from None
    (store / VOLUMES).mkdir(parents=True, exist_ok=True)
    if (store / RECORD).is_file() and (store / RECORD).read_bytes() != data:
        raise StoreError(f"{store}: holds another store; choose another folder, or delete this one")
    for name, digest in tables.items():
        write_file(store / name, _table(source, name, str(digest)))
    rows = read_rows(store / MANIFEST)
    progress.began(0, sum(row.bytes_stored for row in rows))
    fetched = sum(side_by_side(lambda row: _pull_volume(source, store, row, progress), rows, _WIDTH))
    write_file(store / RECORD, data)
    problems = verify(store)
    if problems:
        (store / RECORD).unlink()
        raise DamagedError(f"{url}: {problems[0].detail.partition(';')[0]}; push the store again")
    return fetched


def _table(source: ObjectStorage, name: str, digest: str) -> bytes:
    """The bytes of the table that the record names, from either of the places where a commit may have left it."""
    for path in (name, name + PENDING):
        with suppress(LostObjectError):
            table, _ = source.read(path)
            if hashlib.sha256(table).hexdigest() == digest:
                return table
    raise DamagedError(f"{source.url}: {name} is not the one that the record names; push the store again")


def _pull_volume(source: ObjectStorage, store: Path, row: Row, progress: Progress) -> int:
    """Bytes fetched: none where the volume is here already, with as many bytes as were committed."""
    folder = volume_folder(store, row.key)
    fetched = 0
    if folder_bytes(folder) != row.bytes_stored:
        temporary = temporary_beside(folder)
        try:
            paths = sorted(source.paths(f"{VOLUMES}/{row.key}.zarr"))
            source.fetch(paths, temporary)
            publish_folder(temporary / VOLUMES / f"{row.key}.zarr", folder)
        except FileNotFoundError:
            raise DamagedError(f"{source.url}: volume {row.key} is missing; push the store again") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        fetched = row.bytes_stored
    progress.advanced(row.bytes_stored)
    return fetched
