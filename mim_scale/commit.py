"""The one way bytes that must survive reach the disk: beside, fsync, rename, fsync of the folder.

A reader sees the old thing or the new thing, never half of one, whatever instant the process dies at.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY = ".tmp-"
"""Names that start so are leftovers of a killed writer: readers ignore them, writers may delete them."""

_UMASK = os.umask(0)
os.umask(_UMASK)
_HERE = -100
"""AT_FDCWD: relative paths start at the working directory."""
_RENAME_EXCHANGE = 2
"""Flag of Linux's renameat2."""


def temporary_beside(final: Path) -> Path:
    """A name in the same folder (so that rename is atomic) that nobody else has: machines can share a process id."""
    return final.with_name(f"{TEMPORARY}{os.getpid()}-{uuid.uuid4().hex[:8]}-{final.name}")


def sync_folder(folder: Path) -> None:
    """Make the names inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the bytes of a file durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Replace a file by data, whole or not at all."""
    with new_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to; it replaces the one at `path` when the `with` ends well, else nothing happened."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        # A full disk must not be filled further by half-written files.
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def publish_folder(temporary: Path, final: Path) -> None:
    """Make every byte below `temporary` durable, then give the folder its final name.

    Whatever stood at `final` before is exchanged for it in one step, where the system can do that, and then deleted.
    """
    for root, _, names in os.walk(temporary):
        for name in names:
            # Some libraries write for the owner alone; what is handed over is as readable as other new files.
            (Path(root) / name).chmod(0o666 & ~_UMASK)
            sync_file(Path(root) / name)
        sync_folder(Path(root))
    replaced = temporary.with_name(temporary.name + "-replaced")
    while not _take_place(temporary, final):
        # No exchange on this file system: for an instant nothing has the final name.
        shutil.rmtree(replaced, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.replace(final, replaced)
    sync_folder(final.parent)
    for old in (temporary, replaced):
        shutil.rmtree(old, ignore_errors=True)


def _take_place(temporary: Path, final: Path) -> bool:
    """Give a folder its final name; False where another thing has it and cannot be exchanged."""
    while True:
        try:
            os.replace(temporary, final)
            return True
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR} or not os.path.lexists(temporary):
                raise
        try:
            return _exchange(temporary, final)
        except FileNotFoundError:
            # Another process moved the old one away between the two calls.
            continue


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system has no such call."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}:
        return False
    raise OSError(code, os.strerror(code), str(other))


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
