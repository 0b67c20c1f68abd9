"""Archives by their first bytes: they are named, not opened, as a tree of scans is what a source folder holds."""

from pathlib import Path

_STARTS = (
    b"PK\x03\x04",
    b"PK\x05\x06",
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ\0",
    b"7z\xbc\xaf\x27\x1c",
    b"Rar!\x1a\x07",
    b"\x28\xb5\x2f\xfd",
)
_TAR = b"ustar"
_TAR_AT = 257


def is_archive(path: Path) -> bool:
    """Whether a file is a zip, tar, 7z or rar archive, or compressed by gzip, bzip2, xz or zstd; OSError passes."""
    with open(path, "rb") as file:
        start = file.read(_TAR_AT + len(_TAR))
    return start.startswith(_STARTS) or start[_TAR_AT:] == _TAR
