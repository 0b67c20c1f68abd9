"""A DICOM series of real CT voxels, its bytes changed element by element, as no library would write them."""

import io
import struct
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path

import numpy as np
import pydicom
from pydicom.datadict import tag_for_keyword

from mim_scale.store.volume import Volume
from tests.pipeline.corpus.case import ORIGIN, SPACING
from tests.pipeline.sources import Series, write_series

Change = Callable[[bytes], bytes]
_LONG = (b"OB", b"OW", b"UN", b"SQ", b"UT")


def series_of(good: Volume) -> Series:
    """The good volume as an axial series: columns to the left, rows to the back."""
    _, rows, columns = good.shape
    x, y = (ORIGIN[axis] + SPACING[axis] * (size - 1) for axis, size in enumerate((columns, rows)))
    return Series(
        np.ascontiguousarray(good.voxels[:, ::-1, ::-1]),
        spacing_mm=(SPACING[2], SPACING[1], SPACING[0]),
        origin=(-x, -y, ORIGIN[2]),
        uid="1.2.826.0.1.3680043.8.498.77",
    )


_KEPT: dict[str, list[bytes]] = {}


def files_of(series: Series, folder: Path) -> list[bytes]:
    """The files of a series, from the feet up; written once by a process."""
    key = f"{series.slope} {series.intercept} {series.tags} {series.voxels.dtype} {hash(series.voxels.tobytes())}"
    if key not in _KEPT:
        _KEPT[key] = [path.read_bytes() for path in write_series(folder / "written", series)]
        for path in (folder / "written").iterdir():
            path.unlink()
        (folder / "written").rmdir()
    return _KEPT[key]


def changed(*changes: Change, only: Collection[int] | None = None) -> Callable[[Path, Volume], None]:
    """Writes the good series with changes made to every file, or to those of some slices."""

    def write(root: Path, good: Volume) -> None:
        for index, data in enumerate(files_of(series_of(good), root)):
            result = data
            if only is None or index in only:
                for change in changes:
                    result = change(result)
            (root / f"IM{index:04d}").write_bytes(result)

    return write


@cache
def _tag(keyword: str) -> bytes:
    number = tag_for_keyword(keyword) or 0
    return struct.pack("<HH", number >> 16, number & 0xFFFF)


def place_of(data: bytes, keyword: str) -> tuple[int, int, int]:
    """Where an element begins, where its value begins, and where it ends."""
    start = data.index(_tag(keyword), 132)
    if data[start + 4 : start + 6] in _LONG:
        length = struct.unpack_from("<L", data, start + 8)[0]
        return start, start + 12, start + 12 + length
    length = struct.unpack_from("<H", data, start + 6)[0]
    return start, start + 8, start + 8 + length


def without(*keywords: str) -> Change:
    """Elements taken out."""

    def change(data: bytes) -> bytes:
        for keyword in keywords:
            start, _, end = place_of(data, keyword)
            data = data[:start] + data[end:]
        return data

    return change


def with_value(keyword: str, value: bytes, vr: bytes | None = None) -> Change:
    """An element's value replaced as it stands, with another VR where one is given; of odd length where it is odd."""

    def change(data: bytes) -> bytes:
        start, _, end = place_of(data, keyword)
        return data[:start] + element(keyword, value, vr or data[start + 4 : start + 6]) + data[end:]

    return change


def element(keyword: str, value: bytes, vr: bytes) -> bytes:
    """One element in explicit little endian."""
    if vr in _LONG:
        return _tag(keyword) + vr + b"\0\0" + struct.pack("<L", len(value)) + value
    return _tag(keyword) + vr + struct.pack("<H", len(value)) + value


def with_number(keyword: str, value: int) -> Change:
    """A 16-bit number replaced."""
    return with_value(keyword, struct.pack("<H", value))


def inserted(before: str, data: bytes) -> Change:
    """Bytes put in front of an element."""

    def change(file: bytes) -> bytes:
        start, _, _ = place_of(file, before)
        return file[:start] + data + file[start:]

    return change


def with_pixels(edit: Change) -> Change:
    """The pixels' bytes replaced, and their length with them."""

    def change(data: bytes) -> bytes:
        start, value, end = place_of(data, "PixelData")
        return data[:start] + element("PixelData", edit(data[value:end]), b"OW") + data[end:]

    return change


def rewritten(edit: Callable[[pydicom.Dataset], None], is_implicit: bool = False, is_little: bool = True) -> Change:
    """Read by the DICOM library, changed, and written again."""

    # Compressing is slow, and cases that differ only in what they do to the stream do the same before.
    @cache
    def change(data: bytes) -> bytes:
        file = pydicom.dcmread(io.BytesIO(data))
        edit(file)
        target = io.BytesIO()
        pydicom.dcmwrite(target, file, implicit_vr=is_implicit, little_endian=is_little, enforce_file_format=True)
        return target.getvalue()

    return change
