"""The operations that writing is made of, where what is written must survive; tests put failing ones in their place.

Call them as `disk.rename(...)`, never by a name of your own. Each is one thing that a disk does or refuses.
"""

import ctypes
import errno
import hashlib
import io
import os
from pathlib import Path

_HERE = -100
"""AT_FDCWD: relative paths start at the working directory."""
_RENAME_EXCHANGE = 2
"""Flag of Linux's renameat2."""


def create(path: Path) -> io.FileIO:
    """A new file, unbuffered; one that is there already is an error."""
    return open(path, "xb", buffering=0)


def append(path: Path) -> io.FileIO:
    """A file to write to at its end, unbuffered; made where it is missing."""
    return open(path, "ab", buffering=0)


def write(file: io.FileIO, data: bytes | memoryview) -> int:
    """Write some of the data; returns how many bytes. A refusal names the file, which the system's own does not."""
    try:
        return file.write(data) or 0
    except OSError as error:
        error.filename = error.filename or file.name
        raise


def truncate(file: io.FileIO, size: int) -> None:
    """Cut a file off."""
    file.truncate(size)


def fsync(file: io.FileIO) -> None:
    """Make the bytes of an open file durable."""
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Make the bytes of a file durable, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def chmod(path: Path, mode: int) -> None:
    """Set who may read and write a file."""
    path.chmod(mode)


def rename(path: Path, other: Path) -> None:
    """Give a file or folder another name, in one step; a file, or an empty folder, that has it is gone then."""
    os.replace(path, other)


def exchange(path: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system has no such call."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_HERE, os.fsencode(path), _HERE, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}:
        return False
    raise OSError(code, os.strerror(code), str(other))


def unlink(path: Path) -> None:
    """Delete a file."""
    path.unlink()


def mkdir(path: Path) -> None:
    """Make a folder."""
    path.mkdir()


def rmdir(path: Path) -> None:
    """Delete an empty folder."""
    path.rmdir()


def read(path: Path) -> bytes:
    """The bytes of a small file."""
    return path.read_bytes()


def digest(path: Path) -> str:
    """The SHA-256 of a file as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
