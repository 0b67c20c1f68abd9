"""Pixels of DICOM files into Hounsfield units, one frame in memory at a time.

Uncompressed 16-bit pixels come straight from the file; everything else goes through pydicom's decoders.
"""

import io
import itertools
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGExtended12Bit,
    JPEGLSTransferSyntaxes,
)

from data_pipeline.reasons import Reason, Rejected
from data_pipeline.sources.dicom_header import DEFLATED, Header, numbers, text, transfer_syntax, value, whole

_AIR_HU = -1024
_LARGEST_PADDING_HU = -200
"""A padding value above this also occurs in tissue: replacing it would punch holes into the patient."""
_INT16 = np.iinfo(np.int16)
_UNDEFINED = 0xFFFFFFFF
_LONG_VRS = frozenset({b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"UN"})
_JPEG = "1.2.840.10008.1.2.4."
_LOSSY = frozenset(_JPEG + end for end in ("50", "51", "53", "55", "81", "91", "93", "112", "203"))
_RETIRED = frozenset(_JPEG + end for end in ("53", "55"))
"""Retired processes of JPEG that the decoder of extended JPEG reads as well, though pydicom does not say so."""
_NATIVE = frozenset({ImplicitVRLittleEndian, ExplicitVRLittleEndian})
OVERLAY_BIT = 0x60000102
_ITEM, _DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
_CODED_HEADER_BYTES = 4096
_FRAME_MARKERS = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})
"""Markers of JPEG and JPEG-LS that are followed by the size of the image."""
_ENDED = frozenset({*JPEGLSTransferSyntaxes, *(_JPEG + end for end in ("50", "51", "53", "55", "57", "70"))})
"""JPEG and JPEG-LS: decoders make up what a frame without its end lacks, or search for it for seconds. JPEG 2000 is not
among them: archives hold whole frames of it without their end, and its decoder refuses those that are cut."""
_END_OF_IMAGE = b"\xff\xd9"
_SPARE_BYTES = 16
"""By which pixel data may be longer than their image: writers pad them."""


@dataclass(frozen=True)
class Stored:
    """The pixels of one file as its header describes them; none of them is read yet."""

    path: Path
    syntax: UID
    start: int
    """Place of the pixel data element in the file, or DEFLATED."""
    size: tuple[int, int]
    """Rows, columns."""
    num_frames: int
    bits: tuple[int, int]
    """Allocated, stored."""
    is_signed: bool
    has_overlay: bool
    """Whether unused bits of the pixels hold an overlay."""
    is_lossy: bool


@dataclass(frozen=True)
class Rescale:
    """How the stored values of one slice become HU."""

    slope: float
    intercept: float
    padding: tuple[int, int] | None
    """Stored values that mark pixels outside the reconstruction, both ends included."""
    is_given: bool = True
    """Whether the header says slope and intercept, so that they are no defaults."""


def stored_of(path: Path, header: Any, start: int) -> Stored:
    """Where a file's pixels are.

    Raises:
        Rejected: they are encoded in a way that is not read.
    """
    syntax = transfer_syntax(header)
    try:
        decoder, plugin = _decoder(syntax)
    except NotImplementedError:
        decoder, plugin = None, "none"
    if decoder is None or (plugin and plugin not in decoder.available_plugins):
        raise Rejected(Reason.UNREADABLE, "the pixels are encoded in a way that is not read")
    allocated = whole(header, "BitsAllocated")
    bits = (allocated, whole(header, "BitsStored", allocated))
    if not 0 < bits[1] <= bits[0]:
        raise Rejected(Reason.UNREADABLE, f"{bits[1]} bits stored of {bits[0]} allocated")
    return Stored(
        path,
        syntax,
        start,
        (whole(header, "Rows"), whole(header, "Columns")),
        max(1, whole(header, "NumberOfFrames", 1)),
        bits,
        whole(header, "PixelRepresentation") == 1,
        OVERLAY_BIT in header and bool(header[OVERLAY_BIT].value),
        syntax in _LOSSY or text(header, "LossyImageCompression") == "01",
    )


def _decoder(syntax: UID) -> tuple[Any, str]:
    """The decoder of a transfer syntax, and the one library for it: lossy images differ from library to library."""
    decoder = get_decoder(JPEGExtended12Bit if syntax in _RETIRED else syntax)
    if not syntax.is_encapsulated:
        return decoder, ""
    return decoder, "pyjpegls" if syntax in JPEGLSTransferSyntaxes else "pylibjpeg"


def rescale_of(header: Header, is_signed: bool) -> Rescale:
    """Slope, intercept and padding; those that are missing are 1, 0 and none.

    Raises:
        Rejected: they are no numbers, or a table takes their place.
    """
    names = ("RescaleSlope", "RescaleIntercept")
    is_given = all(value(header, name) is not None for name in names)
    found = []
    for name, default in zip(names, (1.0, 0.0), strict=True):
        number = numbers(header, name, 1) if value(header, name) is not None else (default,)
        if number is None:
            raise Rejected(Reason.NON_FINITE, "the rescale slope or intercept gives no usable numbers")
        found.append(number[0])
    if found[0] <= 0:
        raise Rejected(Reason.HU_IMPLAUSIBLE, f"a slice has the rescale slope {found[0]:g}: its values become no HU")
    if value(header, "RescaleSlope") is None and value(header, "ModalityLUTSequence"):
        raise Rejected(Reason.UNREADABLE, "stored values become HU by a table, which is not read")
    return Rescale(found[0], found[1], _padding_range(header, is_signed), is_given)


def _padding_range(header: Header, is_signed: bool) -> tuple[int, int] | None:
    padding = value(header, "PixelPaddingValue")
    if not isinstance(padding, int):
        return None
    limit = value(header, "PixelPaddingRangeLimit")
    ends = (padding, limit if isinstance(limit, int) else padding)
    # Written as if the pixels had the other sign, the same 16 bits mean another number.
    low = -0x8000 if is_signed else 0
    wrapped = [(end - low) % 0x10000 + low for end in ends]
    return min(wrapped), max(wrapped)


def fault_of(stored: Stored) -> str | None:
    """What is wrong with a file's pixels, seen without decoding them; None where nothing is.

    Raises:
        OSError: the file cannot be read.
    """
    if stored.start == DEFLATED:
        return None
    with open(stored.path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        _, start, length = _element(file, stored)
        if stored.syntax.is_encapsulated:
            end = size if length == _UNDEFINED else start + length
            return "it is cut short" if end > size else _fragments_fault(file, end, stored)
    if length == _UNDEFINED:
        return "its pixels contradict its transfer syntax"
    expected = stored.num_frames * stored.size[0] * stored.size[1] * stored.bits[0] // 8
    if start + length > size or length < expected:
        return "it is cut short"
    if length > expected + _SPARE_BYTES:
        return "it holds more pixels than its header says"
    return None


def _fragments_fault(file: BinaryIO, end: int, stored: Stored) -> str | None:
    """Follow the fragments of compressed pixels to their end: decoders make up what is missing from a frame."""
    num_ends, last = 0, b""
    for index in itertools.count():
        head = file.read(8) if file.tell() < end else b""
        if head[:4] == _DELIMITER or not head:
            is_whole = index > 1 and (stored.syntax not in _ENDED or num_ends >= stored.num_frames)
            return None if is_whole else "it is cut short"
        first = file.tell()
        following = first + int.from_bytes(head[4:], "little")
        if head[:4] != _ITEM or len(head) < 8 or following > end:
            return "it is cut short"
        # The first item is the table of offsets, the second one starts the first frame.
        if index == 1 and _coded_size(file.read(_CODED_HEADER_BYTES)) not in {None, stored.size}:
            return "its compressed pixels have another size than its header says"
        if index > 0 and stored.syntax in _ENDED:
            # A frame ends with a fragment, before its padding; the end itself may lie in two.
            tail = last + file.read(following - file.seek(max(first, following - _SPARE_BYTES)))
            num_ends += _END_OF_IMAGE in tail
            last = tail[-1:]
        file.seek(following)
    return None


def _coded_size(coded: bytes) -> tuple[int, int] | None:
    """Rows and columns that a JPEG or JPEG 2000 stream gives itself; None where it does not say."""
    if coded.startswith(b"\xff\x4f\xff\x51") and len(coded) >= 24:
        right, bottom, left, top = struct.unpack(">4L", coded[8:24])
        return bottom - top, right - left
    place = 2
    while coded.startswith(b"\xff\xd8") and place + 9 <= len(coded) and coded[place] == 0xFF:
        if coded[place + 1] in _FRAME_MARKERS:
            rows, columns = struct.unpack(">HH", coded[place + 5 : place + 9])
            return (rows, columns) if rows else None
        place += 2 + int.from_bytes(coded[place + 2 : place + 4], "big")
    return None


def _element(file: BinaryIO, stored: Stored) -> tuple[str, int, int]:
    """VR of the pixel data, place of its value, and its length in bytes; the file is left at the value."""
    file.seek(stored.start)
    head = file.read(12)
    if head[4:6] in _LONG_VRS and head[6:8] == b"\0\0":
        order = "<" if stored.syntax.is_little_endian else ">"
        return head[4:6].decode(), file.tell(), struct.unpack(f"{order}L", head[8:])[0]
    file.seek(stored.start + 8)
    return "OW", file.tell(), struct.unpack("<L", head[4:8])[0]


def frames_of(stored: Stored, repairs: set[str]) -> Iterator[NDArray[np.integer[Any]]]:
    """Stored values of each frame in the file's order, (rows, columns).

    Raises:
        Exception: of any kind, where the pixels cannot be decoded.
    """
    rows, columns = stored.size
    with ExitStack() as stack:
        file: BinaryIO
        if stored.start == DEFLATED:
            file = io.BytesIO(pydicom.dcmread(stored.path, force=True).PixelData)
            vr, length = "OW", _UNDEFINED
        else:
            file = stack.enter_context(open(stored.path, "rb"))
            vr, _, length = _element(file, stored)
        if (stored.syntax in _NATIVE or stored.start == DEFLATED) and stored.bits[0] == 16:
            for _ in range(stored.num_frames):
                pixels = np.frombuffer(file.read(rows * columns * 2), "<i2" if stored.is_signed else "<u2")
                yield _within_bits(pixels.reshape(rows, columns), stored, repairs)
            return
        data = file.read(-1 if length == _UNDEFINED else length)
    yield from _decoded(data, stored, vr)


def _decoded(data: bytes, stored: Stored, vr: str) -> Iterator[NDArray[np.integer[Any]]]:
    decoder, plugin = _decoder(stored.syntax)
    options = {
        "rows": stored.size[0],
        "columns": stored.size[1],
        "number_of_frames": stored.num_frames,
        "samples_per_pixel": 1,
        "photometric_interpretation": "MONOCHROME2",
        "bits_allocated": stored.bits[0],
        "bits_stored": stored.bits[1],
        "pixel_representation": int(stored.is_signed),
        "pixel_keyword": "PixelData",
        "pixel_vr": vr,
    }
    for pixels, _ in decoder.iter_array(data, raw=True, decoding_plugin=plugin, **options):
        yield pixels


def _within_bits(pixels: NDArray[np.integer[Any]], stored: Stored, repairs: set[str]) -> NDArray[np.integer[Any]]:
    """The same values without what lies in bits that the header calls unused."""
    unused = 16 - stored.bits[1]
    if unused == 0:
        return pixels
    low = -(1 << stored.bits[1] - 1) if stored.is_signed else 0
    if low <= pixels.min() and pixels.max() < low + (1 << stored.bits[1]):
        return pixels
    used = pixels << unused >> unused
    if not stored.has_overlay:
        # An overlay that is not declared, or a header that lies about the bits: two readings, and no way to tell.
        raise Rejected(
            Reason.HU_IMPLAUSIBLE, f"stored values need more than the {stored.bits[1]} bits that the header gives them"
        )
    repairs.add("overlay_removed")
    return used


def to_hu(pixels: NDArray[np.integer[Any]], rescale: Rescale, repairs: set[str]) -> NDArray[np.signedinteger[Any]]:
    """Stored values into whole HU, padding into air: int16 where all fit, else int32.

    Raises:
        Rejected: the rescale gives no usable numbers.
    """
    if rescale.slope != 1:
        repairs.add("rescaled")
    low, high = int(pixels.min()), int(pixels.max())
    padded = None
    if rescale.padding is not None and rescale.padding[0] <= high and rescale.padding[1] >= low:
        padded = _padded(pixels, rescale, repairs)
    if padded is not None:
        kept = pixels[~padded]
        if not kept.size:
            return np.full(pixels.shape, _AIR_HU, np.int16)
        low, high = int(kept.min()), int(kept.max())
    ends = [low * rescale.slope + rescale.intercept, high * rescale.slope + rescale.intercept]
    if not max(map(abs, ends)) <= np.iinfo(np.int32).max:
        raise Rejected(Reason.NON_FINITE, "the rescale slope or intercept gives no usable numbers")
    fits = _INT16.min <= round(min(ends)) and round(max(ends)) <= _INT16.max
    hu: NDArray[np.signedinteger[Any]]
    if rescale.slope == 1 and rescale.intercept.is_integer() and fits:
        # Additions of 16 bits that overflow on the way end at the right number, since that one fits.
        offset = (int(rescale.intercept) + 0x8000) % 0x10000 - 0x8000
        stored = pixels.view(np.int16) if pixels.dtype.itemsize == 2 and pixels.dtype.isnative else pixels
        hu = stored.astype(np.int16, copy=False) + np.int16(offset)
    else:
        values = np.rint(pixels * np.float64(rescale.slope) + rescale.intercept)
        if padded is not None:
            values[padded] = _AIR_HU
        hu = values.astype(np.int16 if fits else np.int32)
    if padded is not None:
        hu[padded] = _AIR_HU
    return hu


def _padded(pixels: NDArray[np.integer[Any]], rescale: Rescale, repairs: set[str]) -> NDArray[np.bool_] | None:
    """Which pixels become air; None where there are none, or where they are left as they are."""
    low, high = rescale.padding or (0, 0)
    padded = pixels == low if low == high else (pixels >= low) & (pixels <= high)
    values = pixels[padded]
    if not values.size:
        return None
    hu = sorted(int(end) * rescale.slope + rescale.intercept for end in (values.min(), values.max()))
    if hu[1] > _LARGEST_PADDING_HU:
        repairs.add("padding_ambiguous")
        return None
    if np.rint(hu).tolist() == [_AIR_HU, _AIR_HU]:
        return None
    repairs.add("padding_mapped")
    return padded
