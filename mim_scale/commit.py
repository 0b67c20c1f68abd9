"""The one way bytes that must survive reach the disk: beside, fsync, rename, fsync of the folder.

A reader sees the old thing or the new thing, never half of one, whatever instant the process dies at, whatever the disk
refuses, and where the power fails: tests/faults tries every operation of it.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mim_scale import disk

TEMPORARY = ".tmp-"
"""Names that start so are leftovers of a killed writer: readers ignore them, writers may delete them."""

_UMASK = os.umask(0)
os.umask(_UMASK)
_BUFFER = 1 << 18


def temporary_beside(final: Path) -> Path:
    """A name in the same folder (so that rename is atomic) that nobody else has: machines can share a process id."""
    return final.with_name(f"{TEMPORARY}{os.getpid()}-{uuid.uuid4().hex[:8]}-{final.name}")


def sync_folder(folder: Path) -> None:
    """Make the names inside a folder durable."""
    disk.sync(folder)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, durably; one that is there stays."""
    if not path.is_dir():
        make_folder(path.parent)
        try:
            disk.mkdir(path)
        except FileExistsError:
            if not path.is_dir():
                raise
        disk.sync(path.parent)


def new_folder(final: Path) -> Path:
    """An empty folder under a temporary name, to be filled and published under its final one."""
    make_folder(final.parent)
    temporary = temporary_beside(final)
    disk.mkdir(temporary)
    return temporary


def remove(path: Path) -> None:
    """Delete a file, or a folder and what is in it; what cannot be deleted stays, and nothing is no error."""
    if not os.path.lexists(path):
        return
    inside = [Path(root) / name for root, folders, files in os.walk(path, topdown=False) for name in files + folders]
    for entry in (*inside, path):
        with contextlib.suppress(OSError):
            (disk.rmdir if entry.is_dir() and not entry.is_symlink() else disk.unlink)(entry)


def write_all(file: io.FileIO, data: bytes | memoryview) -> None:
    """Write all of the data, in as many pieces as the disk takes it."""
    left = memoryview(data).cast("B")
    while left:
        written = disk.write(file, left)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left = left[written:]


def write_file(path: Path, data: bytes) -> None:
    """Replace a file by data, whole or not at all."""
    with new_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to; it replaces the one at `path` when the `with` ends well, else nothing happened."""
    make_folder(path.parent)
    temporary = temporary_beside(path)
    try:
        with disk.create(temporary) as raw:
            file = io.BufferedWriter(_Raw(raw), _BUFFER)
            yield file
            file.flush()
            disk.fsync(raw)
        disk.rename(temporary, path)
    finally:
        # A full disk must not be filled further by half-written files.
        if temporary.exists():
            with contextlib.suppress(OSError):
                disk.unlink(temporary)
    disk.sync(path.parent)


class _Raw(io.RawIOBase):
    """A file whose bytes go through `disk.write`."""

    def __init__(self, file: io.FileIO) -> None:
        self._file, self._size = file, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        write_all(self._file, view)
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size


class Hashed(io.RawIOBase):
    """Passes on what is written to a file, and knows its SHA-256: of what was meant, not of what is read back."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()

    def writable(self) -> bool:
        """It can be written to."""
        return True

    def write(self, data: Any) -> int:
        """Write and hash."""
        self._digest.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    @property
    def sha256(self) -> str:
        """Of all that was written so far, as hex."""
        return self._digest.hexdigest()


def write_part(path: Path, pieces: Iterable[bytes | memoryview]) -> tuple[str, int]:
    """Write a file, durably, into a folder that is not published yet; returns its SHA-256 as hex, and its bytes."""
    digest, size = hashlib.sha256(), 0
    with disk.create(path) as file:
        for piece in pieces:
            write_all(file, piece)
            digest.update(piece)
            size += len(piece)
        disk.fsync(file)
    return digest.hexdigest(), size


def publish_folder(temporary: Path, final: Path) -> None:
    """Make every byte below `temporary` durable, then give the folder its final name.

    Whatever stood at `final` before is exchanged for it in one step, where the system can do that, and then deleted.
    """
    for root, _, names in os.walk(temporary):
        for name in names:
            # Some libraries write for the owner alone; what is handed over is as readable as other new files.
            disk.chmod(Path(root) / name, 0o666 & ~_UMASK)
            disk.sync(Path(root) / name)
        disk.sync(Path(root))
    replaced = temporary.with_name(temporary.name + "-replaced")
    while not _take_place(temporary, final):
        # No exchange on this file system: for an instant nothing has the final name.
        remove(replaced)
        with contextlib.suppress(FileNotFoundError):
            disk.rename(final, replaced)
    disk.sync(final.parent)
    for old in (temporary, replaced):
        remove(old)


def _take_place(temporary: Path, final: Path) -> bool:
    """Give a folder its final name; False where another thing has it and cannot be exchanged."""
    while True:
        try:
            disk.rename(temporary, final)
            return True
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR} or not os.path.lexists(temporary):
                raise
        try:
            return disk.exchange(temporary, final)
        except FileNotFoundError:
            # Another process moved the old one away between the two calls.
            continue


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file as hex."""
    return disk.digest(path)


def sha256_values(values: Any) -> str:
    """The SHA-256, as hex, of JSON values: equal values, equal digest; text that is not valid counts as its escapes."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def sealed(values: dict[str, Any]) -> tuple[bytes, str]:
    """JSON values as the bytes of a file that carries its own digest, and that digest."""
    digest = sha256_values(values)
    return (json.dumps({**values, "digest": digest}, indent=1, sort_keys=True) + "\n").encode(), digest


def has_seal(values: dict[str, Any]) -> bool:
    """Whether values carry the digest of the others; the bytes that they came from may be written otherwise."""
    return values.get("digest") == sha256_values(_without_seal(values))


def unsealed(data: bytes) -> dict[str, Any]:
    """The values of a sealed file, with their digest.

    Raises:
        ValueError: the bytes are not those that `sealed` would write.
    """
    try:
        values: dict[str, Any] = json.loads(data)
        # Bytes, not values alone: a flipped bit can leave the values as they are (the e of 1e-5, the hex of an escape).
        is_whole = data == sealed(_without_seal(values))[0]
    except (AttributeError, RecursionError):
        is_whole = False
    if not is_whole:
        raise ValueError("not the bytes that were sealed")
    return values


def _without_seal(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "digest"}
