"""One DICOM header: read without its pixels, and asked what it says. Nothing in it is believed to be well formed."""

import functools
import logging
import math
import os
import warnings
from typing import Any, BinaryIO, Protocol

import pydicom
import pydicom.config
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from data_pipeline.reasons import Reason, Rejected
from data_pipeline.sources.dicom_elements import pick_elements
from data_pipeline.sources.dicom_geometry import Slice

# Archives are full of values that the standard forbids and everybody can read; what matters here is checked by us.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
# Their messages name files and quote values; what matters of them ends as a reason.
warnings.filterwarnings("ignore", module=r"pydicom\.")
for _library in ("pydicom", "openjpeg", "libjpeg"):
    logging.getLogger(_library).addHandler(logging.NullHandler())
    logging.getLogger(_library).propagate = False

DEFLATED = 0
"""Instead of a place in the file: the pixels can be found only after inflating all of it."""

_PIXEL_DATA = (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10")
_PIXEL_DATA_TAG = 0x7FE00010
_DICOMDIR = "1.2.840.10008.1.3.10"
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_CT = "1.2.840.10008.5.1.4.1.1.2"
_LOCALIZERS = frozenset({"LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW", "SCANOGRAM"})
_SCREENS = frozenset({"SCREEN SAVE", "SCREENSAVE", "DOSE_INFO", "PATIENT_INFO"})
_MAPS = frozenset(
    {"PERFUSION", "RCBF", "RCBV", "CBF", "CBV", "MTT", "TTP", "TMAX", "PBV", "PERMEABILITY", "PARAMETRIC", "FUSION"}
    | {"MIP", "MINIP", "VRT", "SSD", "PROJECTION", "MAX_IP", "MIN_IP", "VOLUME_RENDER", "SURFACE_RENDER", "CURVED_MPR"}
    | {"MAT_SPECIFIC", "MAT_FRACTIONAL", "EFF_ATOMIC_NUM", "ELECTRON_DENSITY", "IODINE"}
)
"""Words of ImageType that mark computed values or projections."""
_HU_TYPES = frozenset({"", "HU", "US", "HU_MOD"})
_MODALITIES = frozenset(
    {"MR", "US", "PT", "NM", "CR", "DX", "MG", "XA", "RF", "OT", "SR", "SEG", "RTSTRUCT", "RTPLAN", "RTDOSE", "RTIMAGE"}
    | {"RTRECORD", "PR", "KO", "REG", "SC", "ES", "XC", "SM", "GM", "DOC", "ECG", "HD", "AU", "IO", "PX", "OPT", "M3D"}
)
"""Those that a message may name: the attribute of a careless file can hold anything."""
_FURTHEST_MM = 1e5
_GREY = frozenset({"", "MONOCHROME1", "MONOCHROME2"})


_LARGE_BYTES = 1 << 16
"""Of one read, from which on it is worth to ask how much of the file is left."""


class _Bounded:
    """A file of which no more is asked for than is left: memory for the 4 GB that a header claims is never taken."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if size > _LARGE_BYTES:
            place = self._file.tell()
            left = self._file.seek(0, os.SEEK_END) - place
            self._file.seek(place)
            size = min(size, max(0, left))
        return self._file.read(size)


class Header(Protocol):
    """A data set, or one frame's view of it."""

    def get(self, name: str, default: Any = None, /) -> Any: ...


def tags(*names: str) -> list[int]:
    """Numbers of attributes, which pydicom takes faster than their names."""
    return [number for name in names if (number := tag_for_keyword(name)) is not None]


def read_header(file: BinaryIO, only: list[int] | None = None) -> tuple[Any, int | None]:
    """A data set without its pixels, and the place of the element that holds them.

    The place is DEFLATED, or None where the file ends before it. Any exception means that the file cannot be read.
    """
    if only is not None:
        quick = pick_elements(file, only)
        if quick is not None:
            return quick
        file.seek(0)
    bounded: Any = _Bounded(file)
    header = pydicom.dcmread(bounded, stop_before_pixels=True, force=True, specific_tags=only)
    if header.file_meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        file.seek(0)
        header = pydicom.dcmread(bounded, force=True, specific_tags=only and [*only, _PIXEL_DATA_TAG])
        return header, DEFLATED if _PIXEL_DATA_TAG in header else None
    start = file.tell()
    return header, start if file.read(4) in _PIXEL_DATA else None


def is_cut(file: BinaryIO, header: Any) -> bool:
    """Whether a file that was just read, and has no pixels, ends within an element of its header."""
    elements = [header.get_item(tag) for tag in header.keys()]  # noqa: SIM118  # iterating would decode them
    # Only elements that were not decoded yet know the length that the file gives them.
    lacking = any(len(element.value or b"") < getattr(element, "length", 0) < 0xFFFFFFFF for element in elements)
    return lacking or file.tell() > os.fstat(file.fileno()).st_size


def value(header: Header, name: str) -> Any:
    """An attribute's value; None where it is missing, empty or cannot be understood."""
    try:
        found = _plain_value(header, name) if isinstance(header, pydicom.Dataset) else None
        if found is None:
            found = header.get(name)
    except Exception:
        return None
    return None if isinstance(found, str) and not found.strip() else found


def _plain_value(header: pydicom.Dataset, name: str) -> Any:
    """The value of an undecoded element whose bytes can mean one thing only; None for any other.

    pydicom makes objects that remember how a value was written; for millions of headers that takes longer than reading.
    """
    tag, usual = _described(name)
    raw = header.get_item(tag) if tag in header else None
    if not isinstance(raw, RawDataElement) or not raw.value:
        return None
    vr = raw.VR or usual
    if vr == "US" and len(raw.value) == 2:
        return int.from_bytes(raw.value, "little" if raw.is_little_endian else "big")
    if vr == "DS":
        try:
            found = tuple(map(float, raw.value.decode("ascii").rstrip(" \0").split("\\")))
        except ValueError:
            return None
        return found[0] if len(found) == 1 else found
    # An escape begins letters of another alphabet, in bytes that look like ASCII (ISO 2022).
    if vr in _WORDS and raw.value.isascii() and b"\\" not in raw.value and b"\x1b" not in raw.value:
        return raw.value.decode("ascii").strip(" \0")
    return None


_WORDS = frozenset({"UI", "CS", "LO", "SH", "DA", "TM"})


@functools.cache
def _described(name: str) -> tuple[int, str]:
    """Tag and VR of an attribute, by the standard."""
    tag = tag_for_keyword(name) or 0
    return tag, dictionary_VR(tag) if tag else ""


def text(header: Header, name: str) -> str:
    """An attribute as text, without blanks around it; empty where there is none."""
    found = value(header, name)
    return "" if found is None else str(found).replace("\0", "").strip()


def whole(header: Header, name: str, default: int = 0) -> int:
    """An attribute as a whole number; the default where it is none."""
    try:
        return int(value(header, name))
    except (TypeError, ValueError, OverflowError):
        return default


def numbers(header: Header, name: str, count: int) -> tuple[float, ...] | None:
    """An attribute as finite numbers; None where they are not as many."""
    found = value(header, name)
    try:
        values = tuple(float(number) for number in ([found] if count == 1 else found))
    except (TypeError, ValueError):
        return None
    return values if len(values) == count and all(map(math.isfinite, values)) else None


def sop_class(header: Any) -> str:
    """The SOP class, from the file meta where the data set has lost it."""
    meta = getattr(header, "file_meta", None) or {}
    return text(header, "SOPClassUID") or str(meta.get("MediaStorageSOPClassUID") or "")


def image_types(header: Header) -> set[str]:
    """The words of ImageType, and of a frame's own type, in capitals."""
    words: set[str] = set()
    for name in ("ImageType", "FrameType", "VolumeBasedCalculationTechnique"):
        found = value(header, name) or []
        for item in [found] if isinstance(found, str) else list(found):
            words |= {str(item).upper().strip(), *str(item).upper().split()}
    return words


def has_size(header: Header) -> bool:
    """Whether the header says how large its image is."""
    return whole(header, "Rows") > 0 and whole(header, "Columns") > 0


def is_ct_slice(header: Any) -> bool:
    """Whether the SOP class is one of CT's, or lost."""
    return sop_class(header) in {"", _CT, f"{_CT}.1", f"{_CT}.2"}


def problem_of(header: Any) -> tuple[Reason, str] | None:
    """Why an image can be refused by its header; None where nothing speaks against it."""
    types = image_types(header)
    modality = text(header, "Modality").upper()
    has_image = has_size(header)
    of_maps = types & _MAPS
    is_capture = f"{sop_class(header)}.".startswith(_SECONDARY_CAPTURE + ".") or bool(types & _SCREENS)
    is_grey = whole(header, "SamplesPerPixel", 1) == 1 and text(header, "PhotometricInterpretation").upper() in _GREY
    rescale_type = text(header, "RescaleType").upper()
    refusals = (
        (sop_class(header) == _DICOMDIR, Reason.NO_PIXELS, "a DICOMDIR: an index of other files, no image"),
        (not has_image and not modality, Reason.NO_PIXELS, "no image in the file"),
        (is_capture, Reason.SECONDARY_CAPTURE, "a secondary capture, not a reconstruction"),
        (modality != "CT", Reason.NOT_CT, f"{_named(modality)}, expected CT"),
        (not has_image and not is_ct_slice(header), Reason.NO_PIXELS, "no image in the file"),
        (bool(types & _LOCALIZERS), Reason.LOCALIZER, "a localizer by its image type"),
        (bool(of_maps), Reason.DERIVED_MAP, f"image type {' '.join(sorted(of_maps))}: not HU of tissue"),
        (rescale_type not in _HU_TYPES, Reason.DERIVED_MAP, "the rescale type is not HU"),
        (not is_grey, Reason.SECONDARY_CAPTURE, "a colour image"),
    )
    return next(((reason, detail) for applies, reason, detail in refusals if applies), None)


def geometry_of(header: Header) -> Slice:
    """Where a slice lies.

    Raises:
        Rejected: the header does not say it.
    """
    position = numbers(header, "ImagePositionPatient", 3)
    orientation = numbers(header, "ImageOrientationPatient", 6)
    spacing = numbers(header, "PixelSpacing", 2)
    if position is None or orientation is None or spacing is None:
        found = (position, orientation, spacing)
        names = ("image position", "image orientation", "pixel spacing")
        lacking = " or ".join(name for name, numbers_ in zip(names, found, strict=True) if numbers_ is None)
        raise Rejected(Reason.NO_GEOMETRY, f"a slice has no usable {lacking}")
    if max(map(abs, (*position, *spacing))) > _FURTHEST_MM:
        raise Rejected(Reason.NO_GEOMETRY, "a slice lies or reaches further away than any scanner is long")
    size = (whole(header, "Rows"), whole(header, "Columns"))
    return Slice(position, orientation, spacing, size)  # type: ignore[arg-type]  # the counts are checked above


def transfer_syntax(header: Any) -> UID:
    """How the pixels are encoded; a data set that lost its file meta can only be uncompressed."""
    named = header.file_meta.get("TransferSyntaxUID")
    if named:
        return UID(named)
    is_implicit, is_little = header.original_encoding
    if is_implicit:
        return UID("1.2.840.10008.1.2")
    return UID("1.2.840.10008.1.2.1" if is_little else "1.2.840.10008.1.2.2")


def _named(modality: str) -> str:
    if not modality:
        return "no modality"
    return f"modality {modality}" if modality in _MODALITIES else "an unknown modality"
