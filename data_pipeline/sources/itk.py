"""NRRD and MetaImage files: a strict header, then voxels straight into one array, read to the end and counted."""

import math
import os
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.reasons import Reason, Rejected, reading_failed
from data_pipeline.sources.inflate import LARGEST_RATIO, inflate
from data_pipeline.sources.source import Scan
from data_pipeline.sources.text_header import Header, metaimage_header, nrrd_header, read_fields

_PIECE = 1 << 18
_MOST_REST = 64
"""Bytes after the last voxel that are let pass where nothing is packed; more of them, and the sizes lie."""


def read_itk(path: Path) -> Scan:
    """Read one volume file.

    Args:
        path: .nrrd .nhdr .mha or .mhd.

    Raises:
        Rejected: unreadable, or not one 3D volume of plain numbers.
    """
    try:
        header = _header(path)
        parts = _parts(path, header)
        num_bytes = math.prod(header.shape) * header.dtype.itemsize
        at_least = {"packed": num_bytes / LARGEST_RATIO, "raw": num_bytes, "text": math.prod(header.shape)}
        if at_least[header.encoding] > sum(part.stat().st_size for part in parts):
            raise Rejected(Reason.UNREADABLE, "the header promises more voxels than the file can hold")
        voxels = _text(parts, header) if header.encoding == "text" else _binary(parts, header, num_bytes)
    except OSError as error:
        raise reading_failed(error, "the file cannot be read") from None
    return Scan(voxels.reshape(header.shape, order="F"), header.affine, tuple(sorted(header.repairs)))


def header_size(path: Path) -> tuple[int, float]:
    """Count of voxels, and mm3 of one, by the header alone.

    Raises:
        Rejected: unreadable.
    """
    try:
        header = _header(path)
    except OSError as error:
        raise reading_failed(error, "the file cannot be read") from None
    return math.prod(header.shape), abs(float(np.linalg.det(header.affine[:3, :3])))


def detached_files(root: Path, file: str) -> tuple[str, ...]:
    """The data files that a .nhdr or .mhd header names, relative to root, as far as they are there."""
    if not file.lower().endswith((".nhdr", ".mhd")):
        return ()
    try:
        with open(root / file, "rb") as opened:
            names = read_fields(opened).files
    except (OSError, Rejected):
        return ()
    found = {str(PurePosixPath(file).parent / name) for name in names if _is_inside(name)} - {file}
    return tuple(sorted(name for name in found if (root / name).is_file()))


def _header(path: Path) -> Header:
    with open(path, "rb") as file:
        fields = read_fields(file)
    return nrrd_header(fields) if fields.is_nrrd else metaimage_header(fields)


def _is_inside(name: str) -> bool:
    """Whether a name leads no higher than the header's folder: a header may not fetch files from elsewhere."""
    parts = PurePosixPath(name.replace("\\", "/"))
    return not parts.is_absolute() and ".." not in parts.parts and "\0" not in name


def _parts(path: Path, header: Header) -> list[Path]:
    if not all(_is_inside(name) for name in header.files):
        raise Rejected(Reason.UNREADABLE, "the header names data outside its own folder: move them beside it")
    parts = [path.parent / name for name in header.files] or [path]
    for part in parts:
        if not os.path.exists(part):
            raise Rejected(Reason.UNREADABLE, "a data file that the header names is not there")
        if not part.is_file() or (header.files and part.samefile(path)):
            raise Rejected(Reason.UNREADABLE, "the header names a data file that is no regular file, or itself")
    return parts


def _binary(parts: list[Path], header: Header, num_bytes: int) -> NDArray[Any]:
    if num_bytes % len(parts):
        raise Rejected(Reason.UNREADABLE, "the voxels do not divide among the data files")
    stored = np.empty(num_bytes, np.uint8)
    size = num_bytes // len(parts)
    for index, part in enumerate(parts):
        with open(part, "rb") as file:
            _fill(stored[index * size : (index + 1) * size], file, header)
    voxels: NDArray[Any] = stored.view(header.dtype)
    return voxels


def _fill(target: NDArray[np.uint8], file: IO[bytes], header: Header) -> None:
    """Read one data file's share of the voxels, all of it and nothing else."""
    _seek(file, header, len(target))
    pieces = inflate(file, header.many_streams) if header.encoding == "packed" else iter(lambda: file.read(_PIECE), b"")
    to_skip, count = header.num_bytes, 0
    most = len(target) + (0 if header.encoding == "packed" else _MOST_REST)
    for piece in pieces:
        data = np.frombuffer(piece, np.uint8)[to_skip:]
        to_skip -= min(to_skip, len(piece))
        kept = data[: max(len(target) - count, 0)]
        target[count : count + len(kept)] = kept
        count += len(data)
        if count > most:
            break
    if not len(target) <= count <= most:
        shown = f"more than {len(target)}" if count > most else str(count)
        raise Rejected(Reason.UNREADABLE, f"the data decode to {shown} bytes, the header promises {len(target)}")


def _seek(file: IO[bytes], header: Header, num_bytes: int) -> None:
    if header.start == -1:
        size = file.seek(0, os.SEEK_END)
        if size < num_bytes:
            raise Rejected(Reason.UNREADABLE, f"a data file of {size} bytes, the header promises {num_bytes}")
        file.seek(size - num_bytes)
        return
    file.seek(header.start)
    for _ in range(header.num_lines):
        if not file.readline():
            raise Rejected(Reason.UNREADABLE, "the file has fewer lines than the header says to skip")


def _text(parts: list[Path], header: Header) -> NDArray[Any]:
    words: list[bytes] = []
    for part in parts:
        with open(part, "rb") as file:
            _seek(file, header, 0)
            words += file.read()[header.num_bytes :].split()
    if len(words) != math.prod(header.shape):
        raise Rejected(Reason.UNREADABLE, f"{len(words)} numbers, the header promises {math.prod(header.shape)}")
    try:
        values = np.array(words).astype(np.float64)
    except ValueError:
        raise Rejected(Reason.UNREADABLE, "words where numbers belong") from None
    if header.dtype.kind != "f" and not (np.abs(values) < 2**31).all():
        raise Rejected(Reason.UNREADABLE, "numbers larger than their type can hold")
    return values
