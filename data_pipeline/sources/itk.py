"""NRRD and MetaImage files, through SimpleITK, and the data files that their headers may point to."""

import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import SimpleITK as sitk

from data_pipeline.reasons import Reason, Rejected, reading_failed
from data_pipeline.sources.inflate import LARGEST_RATIO, inflate
from data_pipeline.sources.source import LPS_TO_RAS, Scan

_VOXEL_BYTES = {
    sitk.sitkInt8: 1,
    sitk.sitkUInt8: 1,
    sitk.sitkInt16: 2,
    sitk.sitkUInt16: 2,
    sitk.sitkInt32: 4,
    sitk.sitkUInt32: 4,
    sitk.sitkInt64: 8,
    sitk.sitkUInt64: 8,
    sitk.sitkFloat32: 4,
    sitk.sitkFloat64: 8,
}
_DATA_FILE = frozenset({"elementdatafile", "data file", "datafile"})
_PIECE = 1 << 20
_MOST_LINES = 10_000
_LONGEST_LINE = 1 << 16

sitk.ProcessObject.SetGlobalWarningDisplay(False)


def read_itk(path: Path, file_bytes: int) -> Scan:
    """Read one volume file.

    Args:
        path: .nrrd .nhdr .mha or .mhd.
        file_bytes: size of the file and its detached data, to see whether the header can be true.

    Raises:
        Rejected: unreadable, or not one 3D volume of plain numbers.
    """
    try:
        image = _read(path, file_bytes)
    except RuntimeError:
        _read_through(path)
        raise Rejected(Reason.UNREADABLE, "the file cannot be decoded: header or data are damaged") from None
    except (OSError, ValueError) as error:
        raise reading_failed(error, "the file cannot be decoded") from None
    affine = np.eye(4)
    direction = np.array(image.GetDirection()).reshape(3, 3)
    affine[:3, :3] = direction * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return Scan(sitk.GetArrayFromImage(image).transpose(2, 1, 0), LPS_TO_RAS @ affine)


def header_size(path: Path) -> tuple[int, float]:
    """Count of voxels, and mm3 of one, by the header alone; RuntimeError or Rejected where it cannot be read."""
    reader = _reader(path)
    return math.prod(reader.GetSize()), math.prod(reader.GetSpacing())


def _reader(path: Path) -> sitk.ImageFileReader:
    """A reader that has read the header."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        # SimpleITK aborts the process on such a name.
        raise Rejected(Reason.UNREADABLE, "its name is no valid text: rename the file or its folder") from None
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


def _read(path: Path, file_bytes: int) -> sitk.Image:
    reader = _reader(path)
    shape = tuple(int(size) for size in reader.GetSize())
    if len(shape) != 3:
        raise Rejected(Reason.NOT_3D, f"{len(shape)} axes of sizes {list(shape)}, expected 3")
    if reader.GetNumberOfComponents() != 1:
        raise Rejected(Reason.NOT_3D, f"{reader.GetNumberOfComponents()} numbers a voxel, expected 1")
    if np.prod(shape, dtype=float) > file_bytes * LARGEST_RATIO:
        raise Rejected(Reason.UNREADABLE, "the header promises more voxels than the file can hold")
    payload = _payload(path)
    if any(part.exists() and not part.is_file() for part, _ in payload.parts):
        raise Rejected(Reason.UNREADABLE, "the header names a data file that is no regular file")
    if payload.is_compressed:
        _check_compressed(payload, math.prod(shape), _VOXEL_BYTES.get(reader.GetPixelID()))
    return reader.Execute()


@dataclass(frozen=True)
class _Payload:
    """Where the voxels lie: files, each with the place of its first byte of data."""

    is_nrrd: bool
    is_compressed: bool
    parts: list[tuple[Path, int]]
    num_skipped: int = 0
    """Bytes of each decoded part that come before its voxels."""


def _payload(path: Path) -> _Payload:
    with open(path, "rb") as file:
        is_nrrd = file.read(4) == b"NRRD"
        file.seek(0)
        fields, names = _fields(file, is_nrrd)
        start = file.tell()
    get = fields.get
    is_compressed = get("encoding", "") in {"gzip", "gz"} if is_nrrd else get("compresseddata", "")[:1] in {"t", "1"}
    line_skip = int(get("line skip") or get("lineskip") or 0) if is_nrrd else 0
    byte_skip = int(get("byte skip") or get("byteskip") or 0) if is_nrrd else 0
    if not is_nrrd and int(get("headersize") or 0) > 0:
        start = int(fields["headersize"])
    parts = [(path.parent / name, 0) for name in names] or [(path, start)]
    if is_compressed and line_skip:
        parts = [(part, _after_lines(part, begin, line_skip)) for part, begin in parts]
    return _Payload(is_nrrd, is_compressed, parts, max(byte_skip, 0))


def _fields(file: IO[bytes], is_nrrd: bool) -> tuple[dict[str, str], list[str]]:
    """The header's fields in small letters and the data files that it names; leaves the file at the end of the header.

    A NRRD header ends with an empty line, one of MetaImage with ElementDataFile.
    """
    fields: dict[str, str] = {}
    for _ in range(_MOST_LINES):
        line = file.readline(_LONGEST_LINE).decode("latin-1")
        if not line or (is_nrrd and not line.strip()):
            return fields, []
        key, value = _field(line, is_nrrd)
        fields[key] = value.lower()
        if key in _DATA_FILE:
            if value.split()[:1] == ["LIST"]:
                lines = file.read(_LONGEST_LINE * 16).decode("latin-1").splitlines()
                return fields, [name.strip() for name in lines if name.strip()]
            if not is_nrrd or value == "LOCAL":
                return fields, [] if value in {"", "LOCAL"} else [value]
            names = [value]
            return fields | _fields(file, is_nrrd)[0], names
    raise ValueError("the header has no end")


def _field(line: str, is_nrrd: bool) -> tuple[str, str]:
    key, _, value = line.partition(":" if is_nrrd or "=" not in line else "=")
    return key.strip().lower(), value.strip()


def _after_lines(path: Path, start: int, count: int) -> int:
    with open(path, "rb") as file:
        file.seek(start)
        for _ in range(count):
            if not file.readline():
                break
        return file.tell()


def _check_compressed(payload: _Payload, num_voxels: int, voxel_bytes: int | None) -> None:
    """Decode to the end, keep nothing: ITK takes what it got before the damage and leaves the rest as it was."""
    promised = num_voxels * (voxel_bytes or 8)
    most = promised + payload.num_skipped
    found = sum(_num_decoded(path, start, payload.is_nrrd, most) - payload.num_skipped for path, start in payload.parts)
    if voxel_bytes is not None and found != promised:
        shown = f"more than {found}" if found > promised else found
        raise Rejected(Reason.UNREADABLE, f"the data decode to {shown} bytes, the header promises {promised}")


def _num_decoded(path: Path, start: int, many: bool, most: int) -> int:
    """Length of a zlib or gzip stream once decoded; stops once it is longer than `most`.

    Raises:
        Rejected: the stream is damaged or cut off.
    """
    if not path.is_file():
        raise Rejected(Reason.UNREADABLE, "a data file that the header names is not there")
    count = 0
    with open(path, "rb") as file:
        file.seek(start)
        for piece in inflate(file, many):
            count += len(piece)
            if count > most:
                break
    return count


def _read_through(path: Path) -> None:
    """Raise Rejected where it was the system that could not read a file: ITK does not tell that from damage."""
    try:
        with open(path, "rb"):
            parts = [path, *(part for part, _ in _payload(path).parts)]
        for part in parts:
            if part.is_file():
                with open(part, "rb") as file:
                    while file.read(_PIECE):
                        pass
    except OSError as error:
        raise reading_failed(error, "the file cannot be read") from None
    except ValueError:
        return


def detached_files(root: Path, file: str) -> tuple[str, ...]:
    """The data files that a .nhdr or .mhd header names, relative to root, as far as they are there."""
    if not file.lower().endswith((".nhdr", ".mhd")):
        return ()
    try:
        with open(root / file, "rb") as opened:
            lines = opened.read(65536).decode("latin-1").splitlines()
    except OSError:
        return ()
    found = (str(PurePosixPath(file).parent / name) for name in _named(lines))
    return tuple(sorted({name for name in found if (root / name).is_file()}))


def _named(lines: list[str]) -> list[str]:
    for number, line in enumerate(lines):
        key, _, value = line.partition("=" if "=" in line else ":")
        if key.strip().lower() not in _DATA_FILE:
            continue
        if value.strip().split()[:1] == ["LIST"]:
            return [name.strip() for name in lines[number + 1 :] if name.strip()]
        return [] if value.strip() in {"", "LOCAL"} else [value.strip()]
    return []
