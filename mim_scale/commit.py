"""The one way bytes that must survive reach the disk: beside, fsync, rename, fsync of the folder.

A reader sees the old thing or the new thing, never half of one, whatever instant the process dies at.
"""

import hashlib
import os
import shutil
from pathlib import Path

TEMPORARY = ".tmp-"
"""Names that start so are leftovers of a killed writer: readers ignore them, writers may delete them."""


def temporary_beside(final: Path) -> Path:
    """A name in the same folder (so that rename is atomic), unique to this process."""
    return final.with_name(f"{TEMPORARY}{os.getpid()}-{final.name}")


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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def publish_folder(temporary: Path, final: Path) -> None:
    """Make every byte below `temporary` durable, then give the folder its final name.

    Whatever stood at `final` before is moved away first and deleted after.
    """
    for root, _, names in os.walk(temporary):
        for name in names:
            sync_file(Path(root) / name)
        sync_folder(Path(root))
    replaced = temporary.with_name(temporary.name + "-replaced")
    if final.exists():
        os.replace(final, replaced)
    os.replace(temporary, final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
