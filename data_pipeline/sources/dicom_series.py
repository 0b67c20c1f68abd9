"""DICOM headers: which files belong together, and which can be refused without looking at a pixel."""

import hashlib
import math
import warnings
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

import pydicom
import pydicom.config

from data_pipeline.reasons import Reason, reading_failed
from data_pipeline.sources.source import Source

# Archives are full of values that the standard forbids and everybody can read; what matters here is checked by us.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

_TAGS = [
    "ImagePositionPatient",
    "ImageType",
    "Modality",
    "NumberOfFrames",
    "PatientID",
    "PixelSpacing",
    "RescaleType",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "SeriesDescription",
    "SeriesInstanceUID",
    "SeriesNumber",
    "SOPClassUID",
    "StudyInstanceUID",
]
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_MAPS = frozenset(
    {"PERFUSION", "RCBF", "RCBV", "CBF", "CBV", "MTT", "TTP", "TMAX", "PBV", "PERMEABILITY", "PARAMETRIC", "FUSION"}
    | {"MIP", "MINIP", "VRT", "SSD", "PROJECTION"}
)
"""Words of ImageType that mark computed values or projections."""
_Place = tuple[tuple[float, float, float], float]
_HU_TYPES = frozenset({"", "HU", "US", "HU_MOD"})


def is_dicom(path: Path) -> bool:
    """Whether a file has the DICOM preamble, or starts like a data set that lost it."""
    with open(path, "rb") as file:
        first = file.read(132)
    if first[128:132] == b"DICM":
        return True
    group = first[:2]
    # Group 2 or 8 in either byte order, followed by an element number below 0x0100 as real headers start.
    little = group in {b"\x02\x00", b"\x08\x00"} and first[3:4] == b"\x00"
    return little or first[:3] in {b"\x00\x02\x00", b"\x00\x08\x00"}


def read_header(path: Path, tags: list[str] | None = None) -> Any:
    """A data set without its pixels; any exception means that it cannot be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=tags)


def group_series(root: Path, files: list[str]) -> list[Source]:
    """Read each header once; files of one series and one kind become one source.

    Series without an identity are told apart by folder and by what else describes them, never merged across folders.
    """
    series: dict[tuple[str, ...], list[str]] = defaultdict(list)
    pixels: dict[str, int] = {}
    places: dict[str, _Place | None] = {}
    problems: dict[tuple[str, ...], tuple[Reason, str]] = {}
    sources = []
    for file in files:
        try:
            header = read_header(root / file, _TAGS)
            problem = _problem(header)
            identity = (*_identity(header, file), problem[0] if problem else "")
            pixels[file] = int(header.get("Rows") or 0) * int(header.get("Columns") or 0)
            places[file] = _place(header)
        except Exception as error:
            failed = reading_failed(error, "the DICOM header cannot be read")
            sources.append(Source(file, "dicom", (file,), problem=(failed.reason, failed.detail)))
            continue
        series[identity].append(file)
        if problem:
            problems[identity] = problem
    for identity, members in series.items():
        voxels = sum(pixels[file] for file in members)
        size = _voxel_mm3([places[file] for file in members])
        sources.append(Source(min(members), "dicom", tuple(sorted(members)), voxels, problems.get(identity), size))
    return sources


def _place(header: Any) -> _Place | None:
    """Position of a slice and the area of its pixels; None where the header has no usable ones."""
    try:
        x, y, z = (float(number) for number in header.ImagePositionPatient)
        rows_mm, columns_mm = (float(number) for number in header.PixelSpacing)
    except (AttributeError, TypeError, ValueError):
        return None
    return (x, y, z), rows_mm * columns_mm


def _voxel_mm3(places: list[_Place | None]) -> float:
    """An estimate from the first and the last slice; 0 where it cannot be made."""
    known = [place for place in places if place is not None]
    if len(known) < 2:
        return 0.0
    length = math.dist(
        *(tuple(pick(axis) for axis in zip(*(at for at, _ in known), strict=True)) for pick in (min, max))
    )
    return known[0][1] * length / (len(known) - 1)


def _identity(header: Any, file: str) -> tuple[str, ...]:
    texts = [str(header.get(name) or "") for name in ("StudyInstanceUID", "PatientID", "SeriesInstanceUID")]
    if not texts[-1]:
        described = [str(header.get(name) or "") for name in ("SeriesNumber", "SeriesDescription", "Rows", "Columns")]
        texts += [str(PurePosixPath(file).parent), *described]
    return tuple(texts)


def sop_class(header: Any) -> str:
    """The SOP class, from the file meta where the data set has lost it."""
    meta = getattr(header, "file_meta", None) or {}
    return str(header.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or "")


def image_types(header: Any) -> set[str]:
    """The words of ImageType, in capitals."""
    value = header.get("ImageType") or []
    values = [value] if isinstance(value, str) else list(value)
    return {word for text in values for word in (str(text).upper(), *str(text).upper().split())}


def _problem(header: Any) -> tuple[Reason, str] | None:
    """Why an image can be refused by its header; None where nothing speaks against it."""
    types = image_types(header)
    has_image = bool(header.get("Rows") and header.get("Columns"))
    refusals = (
        (not has_image and not _modality(header), Reason.NO_PIXELS, "no image in the file"),
        (_is_secondary_capture(header), Reason.SECONDARY_CAPTURE, "a secondary capture, not a reconstruction"),
        (_modality(header) != "CT", Reason.NOT_CT, f"modality {_word(_modality(header))}, expected CT"),
        (not has_image, Reason.NO_PIXELS, "no image in the file"),
        (bool(types & {"LOCALIZER", "SCOUT"}), Reason.LOCALIZER, "a localizer by its image type"),
        (bool(types & _MAPS), Reason.DERIVED_MAP, f"image type {' '.join(sorted(types & _MAPS))}: not HU of tissue"),
        (_rescale_type(header) not in _HU_TYPES, Reason.DERIVED_MAP, "the rescale type is not HU"),
        (int(header.get("SamplesPerPixel") or 1) != 1, Reason.SECONDARY_CAPTURE, "a colour image"),
        (
            int(header.get("NumberOfFrames") or 1) > 1,
            Reason.MULTI_FRAME,
            "many frames in one file, which is not read yet",
        ),
    )
    return next(((reason, detail) for applies, reason, detail in refusals if applies), None)


def _modality(header: Any) -> str:
    return str(header.get("Modality") or "").upper().strip()


def _rescale_type(header: Any) -> str:
    return str(header.get("RescaleType") or "").upper().strip()


def _is_secondary_capture(header: Any) -> bool:
    """Whether the class is Secondary Capture or one of its multi-frame kinds."""
    return f"{sop_class(header)}.".startswith(_SECONDARY_CAPTURE + ".")


def _word(text: str) -> str:
    """A value from a header, short enough and plain enough to show; a digest where it is not."""
    plain = text.strip()
    if len(plain) <= 40 and plain.replace(" ", "").replace("-", "").isalnum():
        return plain
    return f"#{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:8]}" if plain else "unknown"
