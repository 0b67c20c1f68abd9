"""MetaImage headers: missing fields, byte orders, channels, data elsewhere, and sizes that lie."""

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mim_scale.store.volume import Volume
from tests.pipeline.corpus.case import SPACING, Case, accepted, refused, with_affine
from tests.pipeline.corpus.files import mha

FAMILY = "MetaImage"


def _file(
    change: Mapping[str, str | None] | None = None, pack: Callable[[bytes], bytes] | None = None, **settings: Any
) -> Callable[[Path, Volume], None]:
    def write(root: Path, good: Volume) -> None:
        data = None if pack is None else pack(good.voxels.tobytes())
        (root / "scan.mha").write_bytes(mha(good, change, data, **settings))

    return write


def _packed(size: Callable[[int], int | None]) -> Callable[[Path, Volume], None]:
    """Compressed data whose size the header tells as it is told to."""

    def write(root: Path, good: Volume) -> None:
        data = zlib.compress(good.voxels.tobytes())
        told = size(len(data))
        change = {"CompressedData": "True", "CompressedDataSize": None if told is None else str(told)}
        (root / "scan.mha").write_bytes(mha(good, change, data))

    return write


def _detached(
    name: str, files: Mapping[str, Callable[[bytes], bytes]], **change: str
) -> Callable[[Path, Volume], None]:
    def write(root: Path, good: Volume) -> None:
        (root / "scan.mhd").write_bytes(mha(good, {**change, "ElementDataFile": name}, b""))
        for file, part in files.items():
            (root / file).write_bytes(part(good.voxels.tobytes()))

    return write


def _listed(pattern: bool) -> Callable[[Path, Volume], None]:
    def write(root: Path, good: Volume) -> None:
        names = [f"slice{index:03d}.raw" for index in range(1, len(good.voxels) + 1)]
        field = f"slice%03d.raw 1 {len(names)} 1" if pattern else "LIST"
        header = mha(good, {"ElementDataFile": field}, b"")
        (root / "scan.mhd").write_bytes(header + (b"" if pattern else "\n".join(names).encode() + b"\n"))
        for name, plane in zip(names, good.voxels, strict=True):
            (root / name).write_bytes(plane.tobytes())

    return write


def _no_matrix(root: Path, good: Volume) -> Volume:
    """Without a matrix x runs to the left and y to the back."""
    (root / "scan.mha").write_bytes(mha(good, {"TransformMatrix": None, "Offset": "0 0 0"}))
    affine = np.diag([*SPACING, 1.0])
    affine[:2, 3] = [-(size - 1) * step for size, step in zip(good.shape[:0:-1], SPACING, strict=False)]
    return with_affine(Volume(good.voxels[:, ::-1, ::-1], good.spacing_mm, good.affine), affine)


def _swapped(data: bytes) -> bytes:
    return np.frombuffer(data, "<i2").byteswap().tobytes()


def _ascii(data: bytes) -> bytes:
    return " ".join(str(value) for value in np.frombuffer(data, "<i2")).encode() + b"\n"


def _good_files() -> list[Case]:
    rotated = {"AnatomicalOrientation": "LPI", "CenterOfRotation": "0 0 0"}
    cases: list[tuple[str, Callable[[Path, Volume], Any], str]] = [
        ("plain", _file(), accepted()),
        ("compressed", _packed(lambda size: size), accepted()),
        ("compressed, its size not told", _packed(lambda size: None), accepted()),
        ("big-endian", _file({"BinaryDataByteOrderMSB": "True"}, _swapped), accepted()),
        (
            "big-endian by the other field",
            _file({"BinaryDataByteOrderMSB": None, "ElementByteOrderMSB": "True"}, _swapped),
            accepted(),
        ),
        ("numbers as text", _file({"BinaryData": "False"}, _ascii), accepted()),
        ("lines that end as on Windows", _file(newline="\r\n"), accepted()),
        ("a comment with junk", _file({"Comment": "\u00e4 = = : CANARY^NAME"}), accepted()),
        ("words of orientation that lie beside a matrix", _file(rotated), accepted()),
        ("Position instead of Offset", _file({"Offset": None, "Position": "30.5 -12.25 -400"}), accepted()),
        (
            "Orientation instead of TransformMatrix",
            _file({"TransformMatrix": None, "Orientation": "-1 0 0 0 -1 0 0 0 1"}),
            accepted(),
        ),
        (
            "ElementSize instead of ElementSpacing",
            _file({"ElementSpacing": None, "ElementSize": "0.8 0.9 2.5"}),
            accepted(),
        ),
        ("data counted from the end of the file", _file({"HeaderSize": "-1"}, lambda data: b"junk" + data), accepted()),
        ("no matrix", _no_matrix, accepted("orientation_assumed", "reoriented")),
        ("detached data", _detached("scan.raw", {"scan.raw": lambda data: data}), accepted()),
        (
            "detached data, packed",
            _detached("scan.zraw", {"scan.zraw": zlib.compress}, CompressedData="True"),
            accepted(),
        ),
        ("a list of data files", _listed(False), accepted()),
        ("a pattern of data files", _listed(True), accepted()),
    ]
    return [Case(FAMILY, name, write, (outcome,)) for name, write, outcome in cases]


def _geometry() -> list[Case]:
    cases: list[tuple[str, Mapping[str, str | None], str]] = [
        ("no size of voxels", {"ElementSpacing": None}, "no_geometry"),
        ("spacing NaN", {"ElementSpacing": "nan 0.9 2.5"}, "no_geometry"),
        ("spacing 0", {"ElementSpacing": "0 0.9 2.5"}, "no_geometry"),
        ("spacing negative", {"ElementSpacing": "0.8 0.9 -2.5"}, "no_geometry"),
        ("spacing of 1000", {"ElementSpacing": "1000 1000 1000"}, "spacing_implausible"),
        ("two spacings for three axes", {"ElementSpacing": "0.8 0.9"}, "no_geometry"),
        ("spacing is words", {"ElementSpacing": "one two three"}, "no_geometry"),
        ("matrix sheared", {"TransformMatrix": "1 0 0 0.3 0.95 0 0 0 1"}, "sheared_affine"),
        ("matrix singular", {"TransformMatrix": "1 0 0 1 0 0 0 0 1"}, "sheared_affine"),
        ("matrix of zeros", {"TransformMatrix": "0 0 0 0 0 0 0 0 0"}, "no_geometry"),
        ("matrix NaN", {"TransformMatrix": "nan 0 0 0 1 0 0 0 1"}, "no_geometry"),
        ("matrix too short", {"TransformMatrix": "1 0 0"}, "no_geometry"),
        ("offset NaN", {"Offset": "nan 0 0"}, "no_geometry"),
    ]
    return [Case(FAMILY, name, _file(change), (refused(reason),)) for name, change, reason in cases]


def _lies() -> list[Case]:
    bad = "unreadable"
    cases: list[tuple[str, Mapping[str, str | None], str]] = [
        (
            "two axes",
            {"NDims": "2", "DimSize": "36 576", "TransformMatrix": None, "ElementSpacing": "1 1", "Offset": "0 0"},
            "not_3d",
        ),
        (
            "four axes",
            {
                "NDims": "4",
                "DimSize": "36 32 9 2",
                "TransformMatrix": None,
                "ElementSpacing": "1 1 1 1",
                "Offset": "0 0 0 0",
            },
            "not_3d",
        ),
        ("NDims 0", {"NDims": "0"}, bad),
        ("NDims 99", {"NDims": "99"}, bad),
        ("NDims absent", {"NDims": None}, bad),
        ("three channels", {"ElementNumberOfChannels": "3", "DimSize": "12 32 18"}, "not_3d"),
        ("no channel", {"ElementNumberOfChannels": "0"}, bad),
        ("DimSize absent", {"DimSize": None}, bad),
        ("two sizes for three axes", {"DimSize": "36 32"}, bad),
        ("a size is negative", {"DimSize": "36 -32 18"}, bad),
        ("a size is 0", {"DimSize": "36 32 0"}, bad),
        ("sizes of 30000", {"DimSize": "30000 30000 30000"}, bad),
        ("a size one too large", {"DimSize": "37 32 18"}, bad),
        ("a size one too small", {"DimSize": "35 32 18"}, bad),
        ("a slice too few in the header", {"DimSize": "36 32 17"}, bad),
        ("type twice as wide as the data", {"ElementType": "MET_INT"}, bad),
        ("type half as wide as the data", {"ElementType": "MET_UCHAR"}, bad),
        ("type unknown", {"ElementType": "MET_QUUX"}, bad),
        ("type absent", {"ElementType": None}, bad),
        ("an array type", {"ElementType": "MET_SHORT_ARRAY"}, bad),
        ("signed data called unsigned", {"ElementType": "MET_USHORT"}, "hu_implausible"),
        ("big-endian said, little-endian written", {"BinaryDataByteOrderMSB": "True"}, "hu_implausible"),
        ("raw data called compressed", {"CompressedData": "True"}, bad),
        ("raw data called text", {"BinaryData": "False"}, bad),
        ("data begin 1000 bytes late", {"HeaderSize": "1600"}, bad),
        ("data begin in the header", {"HeaderSize": "10"}, bad),
        ("ElementDataFile absent", {"ElementDataFile": None}, bad),
        ("ElementDataFile empty", {"ElementDataFile": ""}, bad),
    ]
    return [Case(FAMILY, name, _file(change), (refused(reason),)) for name, change, reason in cases]


def _data() -> list[Case]:
    bad = "unreadable"
    return [
        Case(FAMILY, "compressed, told half its size", _packed(lambda size: size // 2), (accepted(),)),
        Case(FAMILY, "compressed, told twice its size", _packed(lambda size: size * 2), (accepted(),)),
        Case(FAMILY, "compressed, told size 0", _packed(lambda size: 0), (accepted(),)),
        Case(FAMILY, "compressed, told a negative size", _packed(lambda size: -5), (accepted(),)),
        Case(FAMILY, "cut within the data", _file(pack=lambda data: data[:-2]), (refused(bad),)),
        Case(FAMILY, "cut within the header", _cut_header, (refused(bad),)),
        Case(FAMILY, "detached data missing", _detached("gone.raw", {}), (refused(bad),)),
        Case(FAMILY, "detached data too short", _detached("a.raw", {"a.raw": lambda data: data[:-9]}), (refused(bad),)),
        Case(FAMILY, "detached data too long", _detached("a.raw", {"a.raw": lambda data: data * 2}), (refused(bad),)),
        Case(FAMILY, "detached data at an absolute path", _detached("/etc/hostname", {}), (refused(bad),)),
        Case(FAMILY, "detached data outside the folder", _detached("../../outside.raw", {}), (refused(bad),)),
        Case(FAMILY, "detached data is a folder", _detached("zz_healthy", {}), (refused(bad),)),
        Case(FAMILY, "detached data is the header itself", _detached("scan.mhd", {}), (refused(bad),)),
    ]


def _cut_header(root: Path, good: Volume) -> None:
    (root / "scan.mha").write_bytes(mha(good)[:120])


CASES = [*_good_files(), *_geometry(), *_lies(), *_data()]
