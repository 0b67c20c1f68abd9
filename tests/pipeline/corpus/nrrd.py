"""NRRD headers: encodings, spaces, units, detached and listed data, and fields that lie."""

import gzip
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mim_scale.store.volume import Volume
from tests.pipeline.corpus.case import ORIGIN, SPACING, Case, accepted, refused, with_affine, with_voxels
from tests.pipeline.corpus.files import nrrd

FAMILY = "NRRD"
_BARE = {"space": None, "space directions": None, "space origin": None}
_PLAIN = _BARE | {"spacings": "0.8 0.9 2.5"}


def _file(
    change: Mapping[str, str | None] | None = None, pack: Callable[[bytes], bytes] | None = None, **settings: Any
) -> Callable[[Path, Volume], None]:
    def write(root: Path, good: Volume) -> None:
        data = None if pack is None else pack(good.voxels.tobytes())
        (root / "scan.nrrd").write_bytes(nrrd(good, change, data, **settings))

    return write


def _stored(dtype: str, add: float = 0.0) -> Callable[[Path, Volume], Volume]:
    def write(root: Path, good: Volume) -> Volume:
        values = good.voxels.astype(dtype) + np.dtype(dtype).type(add)
        (root / "scan.nrrd").write_bytes(nrrd(Volume(values, good.spacing_mm, good.affine)))
        return with_voxels(good, values)

    return write


def _world(space: str, signs: tuple[int, int, int]) -> Callable[[Path, Volume], None]:
    """The same grid, told in another world."""
    directions = " ".join(
        f"({','.join(f'{sign * step:g}' if i == axis else '0' for i in range(3))})"
        for axis, (sign, step) in enumerate(zip(signs, SPACING, strict=True))
    )
    origin = f"({','.join(f'{sign * place:g}' for sign, place in zip(signs, ORIGIN, strict=True))})"
    change = {"space": space, "space directions": directions, "space origin": origin}
    return _file(change)


def _no_origin(root: Path, good: Volume) -> Volume:
    (root / "scan.nrrd").write_bytes(nrrd(good, {"space origin": None}))
    return with_affine(good, np.diag([*SPACING, 1.0]))


def _assumed(change: Mapping[str, str | None]) -> Callable[[Path, Volume], Volume]:
    """A header without a world: x to the left, y to the back, origin 0."""

    def write(root: Path, good: Volume) -> Volume:
        (root / "scan.nrrd").write_bytes(nrrd(good, change))
        affine = np.diag([*SPACING, 1.0])
        affine[:2, 3] = [-(size - 1) * step for size, step in zip(good.shape[:0:-1], SPACING, strict=False)]
        return with_affine(Volume(good.voxels[:, ::-1, ::-1], good.spacing_mm, good.affine), affine)

    return write


def _unit(name: str, factor: float) -> Callable[[Path, Volume], None]:
    steps = [" ".join(f"{SPACING[i] * factor:g}" if i == axis else "0" for i in range(3)) for axis in range(3)]
    change = {
        "space units": " ".join([f'"{name}"'] * 3),
        "space directions": " ".join(f"({step.replace(' ', ',')})" for step in steps),
        "space origin": f"({','.join(f'{place * factor:g}' for place in ORIGIN)})",
    }
    return _file(change)


def _detached(
    name: str, files: Mapping[str, Callable[[bytes], bytes]], **change: str
) -> Callable[[Path, Volume], None]:
    """A .nhdr that names data files; files maps each file's name to its part of the data."""

    def write(root: Path, good: Volume) -> None:
        (root / "scan.nhdr").write_bytes(nrrd(good, {**change, "data file": name}, b"").rstrip() + b"\n")
        for file, part in files.items():
            (root / file).write_bytes(part(good.voxels.tobytes()))

    return write


def _listed(pattern: bool) -> Callable[[Path, Volume], None]:
    def write(root: Path, good: Volume) -> None:
        names = [f"slice{index:03d}.raw" for index in range(1, len(good.voxels) + 1)]
        field = f"slice%03d.raw 1 {len(names)} 1" if pattern else "LIST"
        header = nrrd(good, {"data file": field}, b"").rstrip() + b"\n"
        (root / "scan.nhdr").write_bytes(header + (b"" if pattern else "\n".join(names).encode() + b"\n"))
        for name, plane in zip(names, good.voxels, strict=True):
            (root / name).write_bytes(plane.tobytes())

    return write


def _ascii(data: bytes) -> bytes:
    return " ".join(str(value) for value in np.frombuffer(data, "<i2")).encode() + b"\n"


def _good_files() -> list[Case]:
    junk = ["# a comment", "#", "# \xff\xfe\x80 {}[]", "key:=value", "canary:=CANARY^NAME", "a key:=:=:="]
    swapped = {"endian": "big"}
    cases: list[tuple[str, Callable[[Path, Volume], Any], str]] = [
        ("raw", _file(), accepted()),
        ("gzip", _file({"encoding": "gzip"}, gzip.compress), accepted()),
        ("gz, another name of gzip", _file({"encoding": "gz"}, gzip.compress), accepted()),
        ("numbers as text", _file({"encoding": "text", "endian": None}, _ascii), accepted()),
        ("numbers as hexadecimal", _file({"encoding": "hex"}, lambda data: data.hex().encode()), refused("unreadable")),
        ("big-endian", _file(swapped, lambda data: np.frombuffer(data, "<i2").byteswap().tobytes()), accepted()),
        ("comments and key-value pairs with junk", _file(extra=junk), accepted()),
        ("20,000 comments", _file(extra=["# words"] * 20_000), refused("unreadable")),
        ("lines that end as on Windows", _file(newline="\r\n"), accepted()),
        ("first version of the format", _file(magic="NRRD0004"), accepted()),
        ("no kinds", _file({"kinds": None}), accepted()),
        ("a measurement frame", _file({"measurement frame": "(1,0,0) (0,1,0) (0,0,1)"}), accepted()),
        ("bytes skipped", _file({"byte skip": "7"}, lambda data: b"1234567" + data), accepted()),
        ("lines skipped", _file({"line skip": "2"}, lambda data: b"one\ntwo\n" + data), accepted()),
        ("data counted from the end of the file", _file({"byte skip": "-1"}, lambda data: b"junk" + data), accepted()),
        ("no origin", _no_origin, accepted()),
        ("float", _stored("float32"), accepted()),
        ("float with fractions", _stored("float32", 0.25), accepted("rounded")),
        ("32 bit", _stored("int32"), accepted()),
        ("no space, spacings only", _assumed(_PLAIN), accepted("orientation_assumed", "reoriented")),
        ("a space that names no directions", _world("scanner-xyz", (-1, -1, 1)), accepted("orientation_assumed")),
        ("space left-posterior-superior", _world("left-posterior-superior", (-1, -1, 1)), accepted()),
        ("space LPS", _world("LPS", (-1, -1, 1)), accepted()),
        ("space left-anterior-superior", _world("left-anterior-superior", (-1, 1, 1)), accepted()),
        ("centimetres", _unit("cm", 0.1), accepted("unit_converted")),
        ("metres", _unit("m", 0.001), accepted("unit_converted")),
        ("micrometres", _unit("um", 1000), accepted("unit_converted")),
        ("millimetres, said so", _unit("mm", 1), accepted()),
        ("detached data", _detached("scan.raw", {"scan.raw": lambda data: data}), accepted()),
        (
            "detached data, packed",
            _detached("scan.raw.gz", {"scan.raw.gz": gzip.compress}, encoding="gzip"),
            accepted(),
        ),
        ("a list of data files", _listed(False), accepted()),
        ("a pattern of data files", _listed(True), accepted()),
    ]
    return [Case(FAMILY, name, write, (outcome,)) for name, write, outcome in cases]


def _geometry() -> list[Case]:
    shear = "(0.8,0,0) (0.5,0.9,0) (0,0,2.5)"
    cases: list[tuple[str, Mapping[str, str | None], str]] = [
        ("no space and no sizes of voxels", _BARE, "no_geometry"),
        ("space and no directions", {"space directions": None}, "no_geometry"),
        ("directions NaN", {"space directions": "(nan,0,0) (0,0.9,0) (0,0,2.5)"}, "no_geometry"),
        ("directions none", {"space directions": "none none none"}, "no_geometry"),
        ("a direction of length 0", {"space directions": "(0,0,0) (0,0.9,0) (0,0,2.5)"}, "no_geometry"),
        ("directions sheared", {"space directions": shear}, "sheared_affine"),
        ("two directions equal", {"space directions": "(0.8,0,0) (0.8,0,0) (0,0,2.5)"}, "sheared_affine"),
        ("origin NaN", {"space origin": "(nan,0,0)"}, "no_geometry"),
        ("spacings NaN", _PLAIN | {"spacings": "nan nan nan"}, "no_geometry"),
        ("spacings 0", _PLAIN | {"spacings": "0 0 0"}, "no_geometry"),
        ("spacings of 1000", _PLAIN | {"spacings": "1000 1000 1000"}, "spacing_implausible"),
        ("space of time too", {"space": "right-anterior-superior-time"}, "unreadable"),
        ("space unknown", {"space": "upside-down"}, "unreadable"),
        ("a unit of length unknown", {"space units": '"furlong" "furlong" "furlong"'}, "no_geometry"),
    ]
    return [Case(FAMILY, name, _file(change), (refused(reason),)) for name, change, reason in cases]


def _lies() -> list[Case]:
    bad = "unreadable"
    flat = _BARE | {"kinds": None}
    cases: list[tuple[str, Mapping[str, str | None], str]] = [
        ("endian absent", {"endian": None}, bad),
        ("endian unknown", {"endian": "middle"}, bad),
        ("encoding absent", {"encoding": None}, bad),
        ("encoding unknown", {"encoding": "zip"}, bad),
        ("raw data called bzip2", {"encoding": "bzip2"}, bad),
        ("raw data called text", {"encoding": "text"}, bad),
        ("type absent", {"type": None}, bad),
        ("type unknown", {"type": "quux"}, bad),
        ("type block", {"type": "block", "block size": "2"}, bad),
        ("type twice as wide as the data", {"type": "int"}, bad),
        ("type half as wide as the data", {"type": "uchar"}, bad),
        ("signed data called unsigned", {"type": "unsigned short"}, "hu_implausible"),
        ("big-endian said, little-endian written", {"endian": "big"}, "hu_implausible"),
        ("dimension 2", flat | {"dimension": "2", "sizes": "36 576"}, "not_3d"),
        ("dimension 4", flat | {"dimension": "4", "sizes": "2 18 32 18"}, "not_3d"),
        ("dimension 0", {"dimension": "0"}, bad),
        ("dimension 99", {"dimension": "99"}, bad),
        ("dimension absent", {"dimension": None}, bad),
        (
            "colour",
            flat | {"dimension": "4", "sizes": "3 12 32 18", "kinds": "RGB-color domain domain domain"},
            "not_3d",
        ),
        ("sizes absent", {"sizes": None}, bad),
        ("two sizes for three axes", {"sizes": "36 32"}, bad),
        ("a size is negative", {"sizes": "-36 32 18"}, bad),
        ("a size is 0", {"sizes": "36 32 0"}, bad),
        ("sizes of 30000", {"sizes": "30000 30000 30000"}, bad),
        ("sizes beyond 64 bits", {"sizes": "99999999999999999999 32 18"}, bad),
        ("a size one too large", {"sizes": "37 32 18"}, bad),
        ("a size one too small", {"sizes": "35 32 18"}, bad),
        ("a slice too few in the header", {"sizes": "36 32 17"}, bad),
        ("byte skip of 1000 without them", {"byte skip": "1000"}, bad),
        ("byte skip of -5", {"byte skip": "-5"}, bad),
        ("line skip of 100", {"line skip": "100000"}, bad),
        ("a field of 1 MB", {"content": "x" * (1 << 20)}, bad),
        ("a field twice", {"Sizes": "32 36 18"}, bad),
    ]
    return [
        *(Case(FAMILY, name, _file(change), (refused(reason),)) for name, change, reason in cases),
        Case(FAMILY, "magic of a later version", _file(magic="NRRD0099"), (refused(bad),)),
        Case(FAMILY, "magic unknown", _file(magic="NRRX"), (refused(bad),)),
        Case(FAMILY, "cut within the data", _file(pack=lambda data: data[:-2]), (refused(bad),)),
        Case(FAMILY, "cut within the header", _cut_header, (refused(bad),)),
        Case(FAMILY, "detached data missing", _detached("gone.raw", {}), (refused(bad),)),
        Case(FAMILY, "detached data too short", _detached("a.raw", {"a.raw": lambda data: data[:-9]}), (refused(bad),)),
        Case(FAMILY, "detached data at an absolute path", _detached("/etc/hostname", {}), (refused(bad),)),
        Case(FAMILY, "detached data outside the folder", _detached("../../outside.raw", {}), (refused(bad),)),
        Case(FAMILY, "detached data is a folder", _detached("zz_healthy", {}), (refused(bad),)),
        Case(FAMILY, "detached data is the header itself", _detached("scan.nhdr", {}), (refused(bad),)),
    ]


def _cut_header(root: Path, good: Volume) -> None:
    (root / "scan.nrrd").write_bytes(nrrd(good)[:120])


CASES = [*_good_files(), *_geometry(), *_lies()]
