"""Making a pack: samples cut, encoded and written in order; killed anywhere and started again, it ends in equal bytes.

A shard counts as done when its index stands and every byte of it holds; so packing again also mends a damaged pack.
"""

import errno
import fcntl
import os
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from mim_scale.commit import TEMPORARY, sealed, sha256_file, sha256_values, write_file
from mim_scale.config import PretrainConfig
from mim_scale.errors import ConfigError, DamagedError, HostError, StoreError
from mim_scale.store.dataset import Dataset
from mim_scale.store.manifest import Row, split_subjects, write_rows
from mim_scale.store.tar_store import (
    END,
    ShardIndex,
    check_shard,
    find_index,
    index_path,
    member_bytes,
    new_shard,
    write_index,
)
from mim_scale.streaming.pack import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    MEMBERS,
    NOTE,
    RECORD,
    SIDES,
    ShardEntry,
    difference,
    encode,
    job_of,
    member_name,
    read_record,
)
from mim_scale.streaming.reader import SampleReader
from mim_scale.streaming.stream_threads import in_order

SHARD_BYTES = 512_000_000

Encoded = Generator[tuple[bytes, ...], None, None]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Watcher(Protocol):
    """Who is told how far packing is."""

    def began(self, done: int, total: int) -> None:
        """So many samples are done, of so many in all."""

    def advanced(self, samples: int, num_bytes: int, /) -> None:
        """So many more samples are in the pack, in so many more bytes."""


@dataclass(frozen=True)
class Outcome:
    """What packing came to."""

    record: dict[str, Any]
    num_written: int
    """Shards that this call wrote; the others were there."""


def write_pack(
    config: PretrainConfig,
    folder: Path,
    first: int,
    stop: int,
    shard_bytes: int = SHARD_BYTES,
    watcher: Watcher | None = None,
) -> Outcome:
    """Pack positions `first` to `stop` - 1 of a run and its held-out samples, or go on with an interrupted packing.

    Args:
        config: The run's; data.store is where voxels come from.
        folder: New, empty, or begun by the same call before.
        shard_bytes: A shard takes no further sample that would make it larger.

    Raises:
        ConfigError: no position is asked for.
        StoreError: the store cannot be used, or the folder holds something else, such as another pack.
        DamagedError: bytes of the store are damaged; finished shards are kept.
        HostError: the disk is full.
    """
    if not 0 <= first < stop:
        raise ConfigError(f"positions {first} to {stop}: nothing to pack; give --from and a larger --to")
    dataset = Dataset.open(config.data.store)
    rows = dict(zip(SIDES, split_subjects(dataset.rows, config.seed, config.data.held_out_subjects), strict=True))
    ranges = {"train": range(first, stop), "held_out": range(config.held_out.samples if rows["held_out"] else 0)}
    job = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **job_of(config, dataset.fingerprint),
        "from": first,
        "to": stop,
        "held_out_samples": len(ranges["held_out"]),
        "shard_bytes": shard_bytes,
    }
    if watcher is not None:
        watcher.began(0, sum(map(len, ranges.values())))
    try:
        with _kept_alone(folder), ExitStack() as stack:
            _take_up(folder, job)
            _clear(folder)
            pool = stack.enter_context(ThreadPoolExecutor(max(1, config.data.workers), thread_name_prefix="mim-pack"))
            packer = _Packer(folder, job, pool, config.data.read_ahead, watcher)
            shards = {}
            for held_out, side in enumerate(SIDES):
                if ranges[side]:
                    reader = SampleReader(dataset, rows[side], config.plan, config.seed, bool(held_out))
                    shards[side] = packer.pack(reader, side, ranges[side])
            return Outcome(_commit(folder, job, shards, dataset.rows), packer.num_written)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise HostError(
            f"{folder}: {os.strerror(error.errno)}; finished shards are kept: make room and start the same again"
        ) from None


class _Packer:
    """Writes the shards of one pack."""

    def __init__(
        self, folder: Path, job: dict[str, Any], pool: ThreadPoolExecutor, read_ahead: int, watcher: Watcher | None
    ) -> None:
        self._folder, self._job, self._shard_bytes = folder, sha256_values(job), job["shard_bytes"]
        self._pool, self._read_ahead, self._watcher = pool, read_ahead, watcher
        self.num_written = 0

    def pack(self, reader: SampleReader, side: str, positions: range) -> list[ShardEntry]:
        """The shards of these positions, each either found whole or written."""
        entries: list[ShardEntry] = []
        first = positions.start
        samples: _Ahead | None = None
        while first < positions.stop:
            name = f"{side}-{len(entries):05d}"
            found = self._find(name, first)
            if found is None:
                samples = samples or _Ahead(self._encoded(reader, range(first, positions.stop)))
                index = self._write(name, side, first, samples)
                digest = write_index(self._folder, name, index)
                self.num_written += 1
            else:
                index, digest = found
                if samples is not None:
                    samples.close()
                    samples = None
                self._tell(index.stop - first, index.bytes)
            entries.append(ShardEntry(name, first, index.stop, index.bytes, index.sha256, digest))
            first = index.stop
        if samples is not None:
            samples.close()
        return entries

    def _find(self, name: str, first: int) -> tuple[ShardIndex, str] | None:
        """The shard of this name where it is whole and begins at this position."""
        try:
            index, digest = find_index(self._folder, name)
        except DamagedError:
            return None
        faults = check_shard(self._folder, name, index)
        is_ours = (index.job, index.first) == (self._job, first)
        return (index, digest) if is_ours and next(faults, None) is None else None

    def _write(self, name: str, side: str, first: int, samples: "_Ahead") -> ShardIndex:
        # Without its index a tar is nothing: so it goes before the tar is replaced.
        index_path(self._folder, name).unlink(missing_ok=True)
        stop = first
        with new_shard(self._folder, name, self._job, first) as shard:
            while (members := samples.next()) is not None:
                size = sum(member_bytes(len(data)) for data in members)
                if stop > first and shard.size + size + len(END) > self._shard_bytes:
                    samples.put_back(members)
                    break
                for kind, data in zip(MEMBERS, members, strict=True):
                    shard.add(member_name(side, stop, kind), data)
                stop += 1
                self._tell(1, size)
            return shard.end(stop)

    def _encoded(self, reader: SampleReader, positions: range) -> Encoded:
        return in_order(self._pool, lambda position: encode(reader.sample(position)), positions, self._read_ahead)

    def _tell(self, samples: int, num_bytes: int) -> None:
        if self._watcher is not None:
            self._watcher.advanced(samples, num_bytes)


class _Ahead:
    """Encoded samples in order, of which the last one can be put back: the one that a full shard has no room for."""

    def __init__(self, samples: Encoded) -> None:
        self._samples = samples
        self._back: tuple[bytes, ...] | None = None

    def next(self) -> tuple[bytes, ...] | None:
        if self._back is None:
            return next(self._samples, None)
        members, self._back = self._back, None
        return members

    def put_back(self, members: tuple[bytes, ...]) -> None:
        self._back = members

    def close(self) -> None:
        self._samples.close()


@contextmanager
def _kept_alone(folder: Path) -> Iterator[None]:
    """Keep other packers out of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(f"{folder}: another `data pack` is writing in it; wait for it, or end it") from None
        except OSError:
            # A file system without locks: two packers write equal bytes.
            pass
        yield
    finally:
        os.close(descriptor)


def _is_leftover(path: Path, name: str) -> bool:
    return path.name.startswith(TEMPORARY) and path.name.endswith(f"-{name}") and path.is_file()


def _clear(folder: Path) -> None:
    """Clear away what a killed packer of this very pack left half-written."""
    for leftover in folder.glob(f"{TEMPORARY}*"):
        if leftover.is_file():
            leftover.unlink()


def _take_up(folder: Path, job: dict[str, Any]) -> None:
    """See that the folder is new or this job's, and note in it whose it is.

    Raises:
        StoreError: it is another's.
    """
    is_damaged = False
    for name in (RECORD, NOTE):
        if not (folder / name).exists():
            continue
        try:
            held = read_record(folder / name)
        except DamagedError:
            # Shards say themselves whose they are, so what is whole of them is not lost.
            is_damaged = True
            continue
        if found := difference(job, held):
            what, wanted, was = found
            raise StoreError(f"{folder}: holds a pack with {what} {was}, not {wanted}; name another folder")
        return
    # What a packer leaves that was killed while it wrote this very note is no other thing.
    others = (path for path in sorted(folder.iterdir()) if not _is_leftover(path, NOTE))
    if not is_damaged and (other := next(others, None)) is not None:
        raise StoreError(f"{folder}: holds other things ({other.name}) and no pack; name a new folder")
    write_file(folder / NOTE, sealed(job)[0])


def _commit(
    folder: Path, job: dict[str, Any], shards: dict[str, list[ShardEntry]], rows: Iterable[Row]
) -> dict[str, Any]:
    """Write the record, from which on the pack exists; returns its values."""
    entries = [entry for side in SIDES for entry in shards.get(side, [])]
    names = {entry.name for entry in entries}
    for path in folder.iterdir():
        if path.stem.rpartition("-")[0] in SIDES and path.stem not in names:
            # Of a packing that cut shards elsewhere, by another version of a library.
            path.unlink()
    write_rows(folder / MANIFEST, rows)
    record = {
        **job,
        "shards": {side: [asdict(entry) for entry in shards.get(side, [])] for side in SIDES},
        "files": {MANIFEST: sha256_file(folder / MANIFEST)},
    }
    write_file(folder / RECORD, sealed(record)[0])
    (folder / NOTE).unlink(missing_ok=True)
    return record
