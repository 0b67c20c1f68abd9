"""DICOM pixels: too few, too many, of other widths and signs, and compressed frames cut off or made of noise."""

import struct
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.encaps import generate_frames
from pydicom.uid import UID, JPEG2000Lossless, JPEGLSLossless, RLELossless

from mim_scale.store.volume import Volume
from tests.pipeline.corpus.case import Case, accepted, refused
from tests.pipeline.corpus.dicom_bytes import (
    Change,
    changed,
    files_of,
    rewritten,
    series_of,
    with_number,
    with_pixels,
    with_value,
)
from tests.pipeline.sources import Series

FAMILY = "DICOM pixels"
_OK = accepted("reoriented")


@cache
def _packing(syntax: UID) -> Change:
    def edit(file: pydicom.Dataset) -> None:
        file.compress(syntax, generate_instance_uid=False)

    return rewritten(edit)


def _packed(syntax: UID, change: Callable[[bytes], bytes] = bytes) -> Change:
    """Each frame compressed, and its stream changed."""

    def packed(data: bytes) -> bytes:
        file = _packing(syntax)(data)
        start = file.index(b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff")
        stream = change(next(generate_frames(file[start + 12 :], number_of_frames=1)))
        items = (struct.pack("<HHL", 0xFFFE, 0xE000, len(item)) + item for item in (b"", stream))
        return file[: start + 12] + b"".join(items) + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)

    return packed


def _wide(pixels: bytes) -> bytes:
    return np.frombuffer(pixels, "<i2").astype("<i4").tobytes()


def _narrow(pixels: bytes) -> bytes:
    return np.clip(np.frombuffer(pixels, "<i2") / 10, 0, 255).astype("u1").tobytes()


def _at_the_top(pixels: bytes) -> bytes:
    return (np.frombuffer(pixels, "<u2") << 4).tobytes()


def _series(change: Callable[[Series], Series]) -> Callable[[Path, Volume], None]:
    def write(root: Path, good: Volume) -> None:
        for index, data in enumerate(files_of(change(series_of(good)), root)):
            (root / f"IM{index:04d}").write_bytes(data)

    return write


def _truncated(root: Path, good: Volume) -> None:
    changed()(root, good)
    path = root / "IM0004"
    path.write_bytes(path.read_bytes()[:-200])


def _undefined(data: bytes) -> bytes:
    """Plain pixels in a form that only compressed ones have."""
    return data.replace(
        b"\xe0\x7f\x10\x00OW\0\0" + struct.pack("<L", 32 * 36 * 2), b"\xe0\x7f\x10\x00OW\0\0\xff\xff\xff\xff"
    )


def _plain() -> list[Case]:
    bad = refused("unreadable")
    eight = [with_number("BitsAllocated", 8), with_number("BitsStored", 8), with_number("PixelRepresentation", 0)]
    cases: list[tuple[str, Callable[[Path, Volume], Any], str]] = [
        ("one file cut by 200 bytes", _truncated, bad),
        ("every file cut to half of its pixels", changed(with_pixels(lambda data: data[: len(data) // 2])), bad),
        ("one byte too few", changed(with_pixels(lambda data: data[:-1])), bad),
        ("one byte of padding", changed(with_pixels(lambda data: data + b"\0")), _OK),
        ("a row too many", changed(with_pixels(lambda data: data + bytes(72))), bad),
        ("twice as many", changed(with_pixels(lambda data: data * 2)), bad),
        ("none", changed(with_pixels(lambda data: b"")), bad),
        ("plain pixels of undefined length", changed(_undefined), bad),
        (
            "32 bits allocated",
            changed(with_pixels(_wide), with_number("BitsAllocated", 32), with_number("BitsStored", 32)),
            _OK,
        ),
        ("8 bits", changed(with_pixels(_narrow), *eight), refused("hu_implausible")),
        (
            "12 bits at the top of 16",
            changed(with_pixels(_at_the_top), with_number("BitsStored", 12), with_number("PixelRepresentation", 0)),
            refused("hu_implausible"),
        ),
        (
            "12 bits",
            changed(with_number("BitsStored", 12), with_number("HighBit", 11), with_number("PixelRepresentation", 0)),
            _OK,
        ),
        (
            "signed values called unsigned",
            _series(lambda series: replace(series, intercept=0, tags={"PixelRepresentation": 0})),
            refused("hu_implausible"),
        ),
        ("MONOCHROME1 has no meaning for HU", changed(with_value("PhotometricInterpretation", b"MONOCHROME1 ")), _OK),
        (
            "planar configuration of grey pixels",
            _series(lambda series: replace(series, tags={"PlanarConfiguration": 1})),
            _OK,
        ),
        ("slope 0.5", _series(lambda series: replace(series, slope=0.5)), accepted("reoriented", "rescaled")),
        ("intercept 0", _series(lambda series: replace(series, intercept=0)), _OK),
        ("padding of -2000", _padding, accepted("padding_mapped", "reoriented")),
    ]
    return [Case(FAMILY, name, write, (outcome,)) for name, write, outcome in cases]


def _padding(root: Path, good: Volume) -> Volume:
    """A corner outside the scanner's circle, declared as the standard says."""
    series = series_of(good)
    voxels = series.voxels.copy()
    voxels[:, :3, :3] = -2000
    padded = replace(series, voxels=voxels, intercept=0, tags={"PixelPaddingValue": -2000})
    for index, data in enumerate(files_of(padded, root)):
        (root / f"IM{index:04d}").write_bytes(data)
    voxels[:, :3, :3] = -1024
    return Volume(np.ascontiguousarray(voxels[:, ::-1, ::-1]), good.spacing_mm, good.affine)


def _compressed() -> list[Case]:
    noise = np.random.default_rng(2).bytes(400)
    bad = (refused("unreadable"),)
    cases: list[Case] = []
    for name, syntax in (("JPEG 2000", JPEG2000Lossless), ("JPEG-LS", JPEGLSLossless), ("RLE", RLELossless)):
        streams: list[tuple[str, Callable[[bytes], bytes]]] = [
            ("cut to half", lambda data: data[: len(data) // 2]),
            ("cut of its last 20 bytes", lambda data: data[:-20]),
            ("noise", lambda data: noise),
            ("no bytes", lambda data: b""),
            ("zeros", lambda data: bytes(len(data))),
        ]
        cases.append(Case(FAMILY, f"{name}, whole", changed(_packed(syntax)), (_OK,)))
        cases += [Case(FAMILY, f"{name}, {what}", changed(_packed(syntax, change)), bad) for what, change in streams]
        larger = changed(_packed(syntax), with_number("Rows", 40))
        cases.append(Case(FAMILY, f"{name}, another size than the header's", larger, bad))
    return cases


CASES = [*_plain(), *_compressed()]
