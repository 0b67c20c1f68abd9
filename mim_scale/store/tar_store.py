"""Shards: named byte strings in a plain tar, an index beside it; equal bytes for equal content, every read checked.

A shard NAME is two files: NAME.tar, which tar and the webdataset library read, and NAME.json, its index, written last.
PACK.md in mim_scale/streaming fixes both.
"""

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c

from mim_scale.commit import new_file, sealed, unsealed, write_file
from mim_scale.errors import DamagedError

END = bytes(1024)
"""Two empty records end a tar."""

_RECORD = 512


@dataclass(frozen=True, slots=True)
class Member:
    """One byte string of a shard."""

    name: str
    offset: int
    """Of its first byte in the tar."""
    length: int
    crc32c: int


@dataclass(frozen=True)
class ShardIndex:
    """What is where in a shard."""

    job: str
    """Digest of what the shard is a part of: a shard of another whole is not taken for one of this."""
    first: int
    """The first position that it holds."""
    stop: int
    """The first position that it does not hold any more; it holds all between."""
    bytes: int
    """Of the tar."""
    sha256: str
    """Of the tar."""
    members: tuple[Member, ...]
    """As they lie in the tar; each position has the same number of them."""

    def members_at(self, position: int) -> tuple[Member, ...]:
        """The members of a position that the shard holds."""
        count = len(self.members) // (self.stop - self.first)
        start = (position - self.first) * count
        return self.members[start : start + count]


class ShardWriter:
    """Appends members to a tar. Nothing but names and bytes goes in: no time, no owner."""

    def __init__(self, file: BinaryIO, job: str, first: int) -> None:
        self._file = file
        self._job = job
        self._first = first
        self._digest = hashlib.sha256()
        self._members: list[Member] = []
        self.size = 0

    def add(self, name: str, data: bytes) -> None:
        """Append one member."""
        self._write(tar_header(name, len(data)))
        self._members.append(Member(name, self.size, len(data), google_crc32c.value(data)))
        self._write(data)
        self._write(_padding(len(data)))

    def end(self, stop: int) -> ShardIndex:
        """Write the end of the tar; returns its index, which holds positions up to `stop`."""
        self._write(END)
        return ShardIndex(self._job, self._first, stop, self.size, self._digest.hexdigest(), tuple(self._members))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)


def tar_header(name: str, length: int) -> bytes:
    """The record that stands before a member: a function of its name and length."""
    entry = tarfile.TarInfo(name)
    entry.size = length
    entry.mode = 0o644
    return entry.tobuf(tarfile.USTAR_FORMAT)


def member_bytes(length: int) -> int:
    """What a member of this length takes in a tar."""
    return _RECORD + length + len(_padding(length))


@contextmanager
def new_shard(folder: Path, name: str, job: str, first: int) -> Iterator[ShardWriter]:
    """Write a shard's tar; it has its name when the `with` ends well, else nothing happened."""
    with new_file(tar_path(folder, name)) as file:
        yield ShardWriter(file, job, first)


def write_index(folder: Path, name: str, index: ShardIndex) -> str:
    """Write a shard's index: from then on the shard is whole. Returns the index's digest."""
    data, digest = sealed(_values(index))
    write_file(index_path(folder, name), data)
    return digest


def read_index(folder: Path, name: str, digest: str) -> ShardIndex:
    """The index of a shard that a record names.

    Raises:
        DamagedError: it is missing, damaged, or not the one of that digest.
    """
    index, found = find_index(folder, name)
    if found != digest:
        raise DamagedError(f"{index_path(folder, name)}: is not the index that was committed; {MEND}")
    return index


def find_index(folder: Path, name: str) -> tuple[ShardIndex, str]:
    """The index of a shard that nothing names yet, and its digest.

    Raises:
        DamagedError: it is missing or damaged.
    """
    path = index_path(folder, name)
    values = read_sealed(path)
    try:
        digest = values.pop("digest")
        members = tuple(Member(*member) for member in values.pop("members"))
        return ShardIndex(**values, members=members), digest
    except (KeyError, TypeError):
        raise DamagedError(f"{path}: is no index of a shard; {MEND}") from None


def read_sealed(path: Path) -> dict[str, Any]:
    """What a sealed file of a pack holds, with its digest.

    Raises:
        DamagedError: it is missing, or not byte for byte as it was written.
    """
    try:
        return unsealed(path.read_bytes())
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read ({error.strerror}); {MEND}") from None
    except ValueError:
        raise DamagedError(f"{path}: is damaged; {MEND}") from None


def _values(index: ShardIndex) -> dict[str, Any]:
    members = [[member.name, member.offset, member.length, member.crc32c] for member in index.members]
    values = {name: getattr(index, name) for name in ("job", "first", "stop", "bytes", "sha256")}
    return {**values, "members": members}


MEND = "run the same `mim-scale data pack` again, which mends it"
"""What to do about a damaged shard."""


def read_member(folder: Path, name: str, member: Member) -> bytes:
    """The bytes of a member, checked.

    Raises:
        DamagedError: the tar is missing or shorter than that, or the bytes fail their checksum.
    """
    path = tar_path(folder, name)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(descriptor, member.length, member.offset)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DamagedError(f"{path}: member {member.name}: cannot be read ({error.strerror}); {MEND}") from None
    if google_crc32c.value(data) != member.crc32c or len(data) != member.length:
        raise DamagedError(f"{path}: member {member.name}: {_fault(data, member)}; {MEND}")
    return data


def check_shard(
    folder: Path,
    name: str,
    index: ShardIndex,
    is_deep: bool = False,
    use: Callable[[int, Sequence[bytes]], None] | None = None,
) -> Iterator[str]:
    """Every byte of a shard's tar against its index; yields a line for each fault.

    Args:
        is_deep: Compare the SHA-256 too, where nothing else is at fault.
        use: Called with every whole sample: (position, its members).
    """
    path = tar_path(folder, name)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != index.bytes:
                yield f"{path}: {size} bytes, {index.bytes} were committed; {MEND}"
                return
            yield from _check_records(path, file, index, is_deep, use)
    except OSError as error:
        yield f"{path}: cannot be read ({error.strerror}); {MEND}"


def _check_records(
    path: Path, file: BinaryIO, index: ShardIndex, is_deep: bool, use: Callable[[int, Sequence[bytes]], None] | None
) -> Iterator[str]:
    digest, is_whole = hashlib.sha256(), True

    def take(count: int) -> bytes:
        data = file.read(count)
        if is_deep:
            digest.update(data)
        return data

    for position in range(index.first, index.stop):
        sample: list[bytes] = []
        for member in index.members_at(position):
            header, data, padding = take(_RECORD), take(member.length), take(-member.length % _RECORD)
            sample.append(data)
            fault = ""
            if google_crc32c.value(data) != member.crc32c:
                fault = _fault(data, member)
            elif header != tar_header(member.name, member.length):
                fault = "its tar header is damaged"
            elif padding != _padding(member.length):
                fault = "the padding after it is damaged"
            if fault:
                is_whole = False
                yield f"{path}: member {member.name}: {fault}; {MEND}"
        if use is not None and is_whole:
            use(position, sample)
    if take(len(END) + 1) != END:
        is_whole = False
        yield f"{path}: the end of the tar is damaged; {MEND}"
    if is_deep and is_whole and digest.hexdigest() != index.sha256:
        yield f"{path}: does not have the SHA-256 of its index; {MEND}"


def tar_path(folder: Path, name: str) -> Path:
    """Where a shard's members are."""
    return folder / f"{name}.tar"


def index_path(folder: Path, name: str) -> Path:
    """Where a shard's index is."""
    return folder / f"{name}.json"


def _padding(length: int) -> bytes:
    return bytes(-length % _RECORD)


def _fault(data: bytes, member: Member) -> str:
    if len(data) < member.length:
        return f"the file ends {member.length - len(data)} bytes before its end"
    return "fails its checksum"
