"""Headers of NRRD and MetaImage files, strictly: what a field says is checked, and what it leaves out is not guessed.

Strict and our own, as the reference readers take a missing voxel size for 1 mm, hand out memory that was never written
where compressed data are shorter than promised, and can be brought to corrupt memory by a header alone.
"""

import re
from dataclasses import dataclass
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.reasons import Reason, Rejected
from data_pipeline.sources.source import LPS_TO_RAS

Encoding = Literal["raw", "packed", "text"]

_MOST_LINES = 10_000
_LONGEST_LINE = 1 << 16
_MOST_FILES = 100_000
_PATTERN = re.compile(r"([^%]*%0?\d{0,2}d[^%]*?)\s+(-?\d{1,9})\s+(-?\d{1,9})\s+(-?\d{1,9})(?:\s+\d+)?")

_MM_PER_UNIT = {"mm": 1.0, "millimeter": 1.0, "millimeters": 1.0, "millimetre": 1.0, "": 1.0, "cm": 10.0}
_MM_PER_UNIT |= {"m": 1000.0, "meter": 1000.0, "meters": 1000.0, "um": 1e-3, "\u00b5m": 1e-3, "micron": 1e-3}
_MM_PER_UNIT |= {"microns": 1e-3, "micrometer": 1e-3, "???": 1.0, "none": 1.0}

_NRRD_TYPES = {
    "i1": "signed char,int8,int8_t",
    "u1": "uchar,unsigned char,uint8,uint8_t",
    "i2": "short,short int,signed short,signed short int,int16,int16_t",
    "u2": "ushort,unsigned short,unsigned short int,uint16,uint16_t",
    "i4": "int,signed int,int32,int32_t",
    "u4": "uint,unsigned int,uint32,uint32_t",
    "i8": "longlong,long long,long long int,signed long long,signed long long int,int64,int64_t",
    "u8": "ulonglong,unsigned long long,unsigned long long int,uint64,uint64_t",
    "f4": "float",
    "f8": "double",
}
_META_TYPES = {
    "i1": "met_char",
    "u1": "met_uchar",
    "i2": "met_short",
    "u2": "met_ushort",
    "i4": "met_int,met_long",
    "u4": "met_uint,met_ulong",
    "i8": "met_long_long",
    "u8": "met_ulong_long",
    "f4": "met_float",
    "f8": "met_double",
}
_NRRD_ENCODINGS: dict[str, Encoding] = {"raw": "raw", "gzip": "packed", "gz": "packed"}
_NRRD_ENCODINGS |= {"text": "text", "txt": "text", "ascii": "text"}
_NRRD_WORLDS = {"right-anterior-superior": (1, 1, 1), "ras": (1, 1, 1)}
_NRRD_WORLDS |= {"left-anterior-superior": (-1, 1, 1), "las": (-1, 1, 1)}
_NRRD_WORLDS |= {"left-posterior-superior": (-1, -1, 1), "lps": (-1, -1, 1)}
_NRRD_UNNAMED = frozenset({"", "scanner-xyz", "3d-right-handed", "3d-left-handed"})
_NRRD_SPATIAL = frozenset({"domain", "space", "none", "???"})


@dataclass(frozen=True)
class Header:
    """What a header says of the voxels: what, where in space, and where in which file."""

    shape: tuple[int, ...]
    """Axes (i, j, k), the first of them innermost."""
    dtype: np.dtype[np.generic]
    affine: NDArray[np.float64]
    """Voxel index (i, j, k, 1) -> RAS millimetres."""
    encoding: Encoding
    files: tuple[str, ...]
    """Data files, relative to the header's folder; empty where the data follow the header."""
    start: int
    """First byte of data in each file; -1 where they are the last bytes of it."""
    num_lines: int = 0
    """Lines skipped from there, before unpacking."""
    num_bytes: int = 0
    """Bytes skipped after unpacking."""
    many_streams: bool = False
    repairs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Fields:
    """A header's fields, keys in small letters without spaces, and the names of data files that it lists."""

    is_nrrd: bool
    values: dict[str, str]
    files: tuple[str, ...]
    end: int
    """Of the header, in bytes."""


def read_fields(file: IO[bytes]) -> Fields:
    """The fields, from the start of a file; Rejected where it is no such header."""
    first = _line(file)
    is_nrrd = first.startswith("NRRD")
    if is_nrrd and not re.fullmatch(r"NRRD000[1-5]", first):
        raise _bad("a version of NRRD that is not known")
    if not is_nrrd:
        file.seek(0)
    values: dict[str, str] = {}
    for _ in range(_MOST_LINES):
        line = _line(file)
        if is_nrrd and (line.startswith("#") or ":=" in line):
            continue
        if not line and is_nrrd:
            return Fields(is_nrrd, values, _data_files(values.get("datafile", ""), file), file.tell())
        key, mark, value = line.partition(":" if is_nrrd or "=" not in line else "=")
        key = key.lower().replace(" ", "")
        if not mark or not key:
            raise _bad("a line that is no field" if line else "no ElementDataFile")
        if key in values:
            raise _bad("a field that is there twice")
        values[key] = value.strip()
        if key == "elementdatafile" and not is_nrrd:
            return Fields(is_nrrd, values, _data_files(values[key], file), file.tell())
        if key == "datafile" and value.split()[:1] == ["LIST"]:
            return Fields(is_nrrd, values, _data_files("LIST", file), file.tell())
    raise _bad("more lines than any header has")


def _line(file: IO[bytes]) -> str:
    raw = file.readline(_LONGEST_LINE)
    if len(raw) == _LONGEST_LINE:
        raise _bad("a line longer than any field")
    return raw.decode("utf-8", "surrogateescape").strip()


def _data_files(value: str, file: IO[bytes]) -> tuple[str, ...]:
    """What a field that names data files stands for; empty for the file itself."""
    if value.split()[:1] == ["LIST"]:
        lines = file.read(_LONGEST_LINE * 16).decode("utf-8", "surrogateescape").splitlines()
        return tuple(line.strip() for line in lines if line.strip())
    pattern = _PATTERN.fullmatch(value)
    if pattern:
        first, last, step = (int(number) for number in pattern.groups()[1:])
        numbers = range(first, last + (1 if step > 0 else -1), step) if step else range(0)
        if not 0 < len(numbers) <= _MOST_FILES:
            raise _bad("a pattern that names no files, or far too many")
        return tuple(pattern[1] % number for number in numbers)
    return () if value in {"", "LOCAL"} else (value,)


def nrrd_header(fields: Fields) -> Header:
    """A NRRD header from its fields; Rejected where they are no 3D volume in a known place."""
    get = fields.values.get
    shape = _shape(get("dimension"), get("sizes"))
    kinds = get("kinds", "").lower().split()
    if len(shape) != 3 or not set(kinds) <= _NRRD_SPATIAL:
        raise _not_3d(shape)
    dtype = _dtype(_NRRD_TYPES, get("type", ""))
    encoding = _NRRD_ENCODINGS.get(get("encoding", "").lower())
    if encoding is None:
        raise _bad("an encoding that is not raw, gzip or text")
    order = get("endian", "").lower()
    if order not in {"little", "big"} and dtype.itemsize > 1 and encoding != "text":
        raise _bad("no byte order")
    num_lines, num_bytes = _whole(get("lineskip", "0")), _whole(get("byteskip", "0"))
    is_from_end = num_bytes == -1 and encoding == "raw"
    if num_lines < 0 or (num_bytes < 0 and not is_from_end):
        raise _bad("a negative count of lines or bytes to skip")
    repairs: set[str] = set()
    affine = _nrrd_affine(fields, repairs)
    start = -1 if is_from_end else 0 if fields.files else fields.end
    return Header(
        shape,
        dtype.newbyteorder("big" if order == "big" else "little"),
        affine,
        encoding,
        fields.files,
        start,
        num_lines,
        max(num_bytes, 0),
        many_streams=True,
        repairs=frozenset(repairs),
    )


def _nrrd_affine(fields: Fields, repairs: set[str]) -> NDArray[np.float64]:
    get = fields.values.get
    space = get("space", "").lower()
    signs = _NRRD_WORLDS.get(space)
    if signs is None:
        if space not in _NRRD_UNNAMED or get("spacedimension", "3") != "3":
            raise _bad("a space that is not known")
        # The convention of every other reader.
        signs = (-1, -1, 1)
        repairs.add("orientation_assumed")
    affine = np.eye(4)
    if "spacedirections" in fields.values:
        vectors = re.findall(r"\(([^()]*)\)", get("spacedirections", ""))
        if len(vectors) != 3:
            raise Rejected(Reason.NO_GEOMETRY, f"the header gives {len(vectors)} directions, expected 3")
        affine[:3, :3] = np.array([_numbers(vector.replace(",", " "), 3, "a direction") for vector in vectors]).T
        mm_per_unit = _units(get("spaceunits", ""), repairs)[:, None]
    else:
        affine[:3, :3] = np.diag(_numbers(get("spacings", ""), 3, "the size of a voxel"))
        mm_per_unit = _units(get("units", ""), repairs)[None, :]
    affine[:3, :3] *= mm_per_unit
    if "spaceorigin" in fields.values:
        origin = _numbers(get("spaceorigin", "").strip("() ").replace(",", " "), 3, "the origin")
        affine[:3, 3] = origin * _units(get("spaceunits", ""), repairs)
    affine[:3] *= np.array(signs)[:, None]
    return _placed(affine)


def metaimage_header(fields: Fields) -> Header:
    """A MetaImage header from its fields; Rejected where they are no 3D volume in a known place."""
    get = fields.values.get
    shape = _shape(get("ndims"), get("dimsize"))
    channels = _whole(get("elementnumberofchannels", "1"))
    if channels < 1 or get("objecttype", "Image").lower() != "image":
        raise _bad("no image")
    if len(shape) != 3:
        raise _not_3d(shape)
    if channels != 1:
        raise Rejected(Reason.NOT_3D, f"{channels} numbers a voxel, expected 1")
    dtype = _dtype(_META_TYPES, get("elementtype", ""))
    is_big = _is_true(get("binarydatabyteordermsb") or get("elementbyteordermsb") or "false")
    encoding: Encoding = "packed" if _is_true(get("compresseddata", "false")) else "raw"
    if not _is_true(get("binarydata", "true")):
        encoding = "text"
    begin = _whole(get("headersize", "0"))
    end = 0 if fields.files else fields.end
    if begin < -1 or (begin == -1 and encoding != "raw") or 0 < begin < end or "elementdatafile" not in fields.values:
        raise _bad("data that begin where they cannot")
    if not get("elementdatafile"):
        raise _bad("an empty ElementDataFile")
    repairs: set[str] = set()
    affine = np.eye(4)
    matrix = get("transformmatrix") or get("rotation") or get("orientation")
    if matrix is None:
        repairs.add("orientation_assumed")
    else:
        affine[:3, :3] = _numbers(matrix, 9, "the matrix").reshape(3, 3).T
    steps = _numbers(get("elementspacing") or get("elementsize") or "", 3, "the size of a voxel")
    if steps.min() <= 0:
        raise Rejected(Reason.NO_GEOMETRY, "the header gives a size of voxels that is not positive")
    affine[:3, :3] *= steps
    affine[:3, 3] = _numbers(get("offset") or get("position") or get("origin") or "0 0 0", 3, "the offset")
    affine[:3] *= _units(get("distanceunits", ""), repairs)[:, None]
    return Header(
        shape,
        dtype.newbyteorder(">" if is_big else "<"),
        _placed(LPS_TO_RAS @ affine),
        encoding,
        fields.files,
        begin or end,
        repairs=frozenset(repairs),
    )


def _placed(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    if np.linalg.norm(affine[:3, :3], axis=0).min() == 0:
        raise Rejected(Reason.NO_GEOMETRY, "the header gives an axis of length 0")
    return affine


def _shape(dimension: str | None, sizes: str | None) -> tuple[int, ...]:
    shape = tuple(_whole(size) for size in (sizes or "").split())
    if not shape or _whole(dimension or "") != len(shape):
        raise _bad("another number of sizes than of axes")
    if min(shape) < 1:
        raise _bad(f"axes of sizes {list(shape)}")
    return shape


def _dtype(names: dict[str, str], name: str) -> np.dtype[np.generic]:
    for code, aliases in names.items():
        if name.lower() in aliases.split(","):
            return np.dtype(code)
    raise _bad("a type of numbers that is not known")


def _whole(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,9}", text.strip()):
        raise _bad("words where a whole number belongs")
    return int(text)


def _numbers(text: str, count: int, what: str) -> NDArray[np.float64]:
    try:
        numbers = np.array([float(word) for word in text.split()])
    except ValueError:
        numbers = np.empty(0)
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise Rejected(Reason.NO_GEOMETRY, f"the header does not give {what} in {count} finite numbers")
    return numbers


def _units(text: str, repairs: set[str]) -> NDArray[np.float64]:
    """Millimetres in the unit of each axis; text: words, quoted or not, none where nothing is said."""
    words = re.findall(r'"([^"]*)"', text) or text.split() or [""]
    factors = [_MM_PER_UNIT.get(word.strip().lower()) for word in words]
    if None in factors or len(factors) not in {1, 3}:
        raise Rejected(Reason.NO_GEOMETRY, "the header gives a unit of length that is not known")
    if set(factors) != {1.0}:
        repairs.add("unit_converted")
    return np.array(factors * (3 // len(factors)), float)


def _is_true(word: str) -> bool:
    return word[:1].lower() in {"t", "1", "y"}


def _not_3d(shape: tuple[int, ...]) -> Rejected:
    return Rejected(Reason.NOT_3D, f"{len(shape)} axes of sizes {list(shape)}, expected 3 in space")


def _bad(what: str) -> Rejected:
    return Rejected(Reason.UNREADABLE, f"the header has {what}")
