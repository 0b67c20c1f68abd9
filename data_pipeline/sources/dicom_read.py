"""The slices of one DICOM series, or the frames of one file, into one scan: geometry first, pixels slice by slice."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.deidentify import Identity, acquisition_of_dicom
from data_pipeline.reasons import Reason, Rejected, reading_failed
from data_pipeline.sources.dicom_frames import check_one_stack, frame_headers, is_multi_frame
from data_pipeline.sources.dicom_geometry import Slice, stack_slices
from data_pipeline.sources.dicom_header import (
    geometry_of,
    has_size,
    image_types,
    numbers,
    problem_of,
    read_header,
    tags,
    text,
)
from data_pipeline.sources.dicom_pixels import (
    OVERLAY_BIT,
    Rescale,
    Stored,
    fault_of,
    frames_of,
    rescale_of,
    stored_of,
    to_hu,
)
from data_pipeline.sources.source import LPS_TO_RAS, Scan

_PHASES = {
    "acquisitions": ("AcquisitionNumber", "FrameAcquisitionNumber"),
    "temporal positions": ("TemporalPositionIdentifier", "TemporalPositionIndex"),
    "cardiac phases": ("NominalPercentageOfCardiacPhase", "NominalCardiacTriggerDelayTime", "TriggerTime"),
    "respiratory phases": ("NominalPercentageOfRespiratoryPhase",),
    "tube voltages": ("KVP",),
    "kernels": ("ConvolutionKernel",),
    "image types": ("ImageType", "FrameType"),
    "times": ("AcquisitionTime", "FrameAcquisitionDateTime"),
}
"""What may tell slices at one position apart, and where it is written."""
_SLICE = [
    *tags("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "SliceThickness"),
    *tags("BitsAllocated", "BitsStored", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *tags("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "LossyImageCompression", "NumberOfFrames"),
    *tags("ImageType", "InstanceNumber", "SeriesInstanceUID", "SOPClassUID", "Modality"),
    OVERLAY_BIT,
]
_OVERLAP = 1.01
"""How much thicker than the step between them slices must be to overlap."""


@dataclass(frozen=True)
class _Plane:
    """One slice, its pixels not yet read."""

    stored: Stored
    geometry: Slice
    rescale: Rescale
    thickness_mm: float
    number: str
    is_derived: bool


@dataclass
class _Series:
    """What the headers of a source say, and what was wrong on the way."""

    header: Any = None
    """Of the first slice, or frame, that could be read."""
    planes: list[_Plane] = field(default_factory=list)
    faults: list[tuple[str, list[_Plane]]] = field(default_factory=list)
    """One for each file that cannot be decoded: what is wrong, and its slices as far as the header tells them."""
    repairs: set[str] = field(default_factory=set)
    num_copies: int = 0


def read_series(paths: list[Path]) -> Scan:
    """Read one series of single-frame files, or one file of many frames.

    Raises:
        Rejected: the slices are no regular volume, or one of them cannot be decoded.
    """
    series = _Series()
    for path in paths:
        _look_at(path, series)
    _drop_copies(series)
    order, affine = _stacked(series)
    if len({plane.rescale.is_given for plane in series.planes}) > 1:
        raise Rejected(Reason.HU_IMPLAUSIBLE, "only some of the slices say how their values become HU")
    voxels = _read_pixels(series, order)
    step = float(np.linalg.norm(affine[:3, 2]))
    if max(plane.thickness_mm for plane in series.planes) > _OVERLAP * step:
        series.repairs.add("overlapping_slices")
    if any(plane.is_derived for plane in series.planes):
        series.repairs.add("derived_image_type")
    if any(plane.stored.is_lossy for plane in series.planes):
        series.repairs.add("lossy_source")
    return Scan(
        voxels.transpose(2, 1, 0),
        LPS_TO_RAS @ affine,
        tuple(sorted(series.repairs)),
        _identity(series.header),
        acquisition_of_dicom(series.header),
    )


def _identity(header: Any) -> Identity:
    patient, issuer = text(header, "PatientID"), text(header, "IssuerOfPatientID")
    return Identity(
        f"{issuer}\n{patient}" if patient else "", text(header, "StudyInstanceUID"), text(header, "SeriesInstanceUID")
    )


def _look_at(path: Path, series: _Series) -> None:
    """Read a file's header and see whether its pixels can be whole."""
    try:
        with open(path, "rb") as file:
            # All of the first header, for who and how; of the others what places and scales them.
            header, start = read_header(file, _SLICE if series.header is not None else None)
            if series.header is not None and is_multi_frame(header):
                file.seek(0)
                header, start = read_header(file)
        if start is None or not has_size(header):
            series.faults.append(("it ends before its pixels", []))
            return
        planes = _planes(path, header, start)
        fault = fault_of(planes[0].stored)
    except (Rejected, MemoryError):
        raise
    except Exception as error:
        failed = reading_failed(error, "the header of a slice cannot be read")
        if failed.reason == Reason.IO_ERROR:
            raise failed from None
        series.faults.append((f"its header cannot be read, {type(error).__name__}", []))
        return
    if fault:
        series.faults.append((fault, planes))
        return
    series.planes += planes
    if series.header is None:
        series.header = frame_headers(header)[0]


def _planes(path: Path, header: Any, start: int) -> list[_Plane]:
    stored = stored_of(path, header, start)
    frames = frame_headers(header)
    check_one_stack(frames, stored.num_frames)
    if len(frames) > 1:
        problem = next(filter(None, map(problem_of, frames)), None)
        if problem:
            raise Rejected(*problem)
    return [
        _Plane(
            stored,
            geometry_of(frame),
            rescale_of(frame, stored.is_signed),
            (numbers(frame, "SliceThickness", 1) or (0.0,))[0],
            text(frame, "InstanceNumber"),
            "DERIVED" in image_types(frame),
        )
        for frame in frames
    ]


def _drop_copies(series: _Series) -> None:
    """Drop files that are byte for byte another file of the series."""
    at: dict[Any, list[_Plane]] = defaultdict(list)
    for plane in series.planes:
        at[plane.geometry.position].append(plane)
    if len(at) == len(series.planes):
        return
    seen: set[str] = set()
    kept = []
    for plane in series.planes:
        if len(at[plane.geometry.position]) > 1 and plane.stored.num_frames == 1:
            digest = hashlib.sha256(plane.stored.path.read_bytes()).hexdigest()
            if digest in seen:
                series.repairs.add("copies_dropped")
                series.num_copies += 1
                continue
            seen.add(digest)
        kept.append(plane)
    series.planes = kept


def _stacked(series: _Series) -> tuple[list[int], NDArray[np.float64]]:
    """Order and affine of the slices; raises Rejected with all that is wrong."""
    if not series.planes:
        raise Rejected(Reason.UNREADABLE, "; ".join(_notes(series)))
    order, affine, wrong = _try_stack(series.planes)
    if wrong is None and not series.faults:
        _check_one_series(series, order)
        return order, affine
    details = [*_notes(series), *([wrong.detail] if wrong else [])]
    if wrong and wrong.reason == Reason.REPEATED_POSITIONS:
        details[-1] += _phases(series.planes)
    if series.faults:
        # What is wrong only because files cannot be decoded is not the reason.
        placed = [plane for _, planes in series.faults for plane in planes]
        wrong = _try_stack([*series.planes, *placed])[2] if wrong else None
    raise Rejected(wrong.reason if wrong else Reason.UNREADABLE, "; ".join(details))


def _try_stack(planes: Sequence[_Plane]) -> tuple[list[int], NDArray[np.float64], Rejected | None]:
    try:
        return *stack_slices([plane.geometry for plane in planes]), None
    except Rejected as rejected:
        return [], np.eye(4), rejected


def _notes(series: _Series) -> list[str]:
    """What to say about a series besides its geometry."""
    notes = []
    faults = Counter(fault for fault, _ in series.faults)
    if faults:
        count = faults.total()
        shown = ", ".join(faults)
        notes.append(f"{count} {_plural('file', count)} cannot be decoded ({shown})")
    if series.num_copies:
        notes.append(f"{series.num_copies} byte-identical {_plural('copy', series.num_copies)} dropped")
    return notes


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else {"copy": "copies"}.get(noun, f"{noun}s")


def _phases(planes: Sequence[_Plane]) -> str:
    """What slices at one position differ by, such as ": 2 acquisitions, 10 cardiac phases"."""
    frames: list[Any] = []
    for path in dict.fromkeys(plane.stored.path for plane in planes):
        with open(path, "rb") as file:
            frames += frame_headers(read_header(file)[0])
    shown = []
    for label, names in _PHASES.items():
        count = len({next(filter(None, (text(frame, name) for name in names)), "") for frame in frames})
        if count > 1:
            shown.append(f"{count} {label}")
    return f": {', '.join(shown)}" if shown else ""


def _check_one_series(series: _Series, order: list[int]) -> None:
    """Without a series UID nothing but their numbers says that slices belong together: make sure that they do.

    Two anonymised series in one folder can interleave to what looks like one volume.
    """
    if text(series.header, "SeriesInstanceUID") or series.planes[0].stored.num_frames > 1:
        return
    found = [series.planes[index].number for index in order]
    if len(set(found)) < len(found):
        detail = "no series UID, and instance numbers that are missing or repeat: more than one series, perhaps"
        raise Rejected(Reason.MIXED_SERIES, detail)
    try:
        places = np.argsort([int(number) for number in found], kind="stable")
    except ValueError:
        raise Rejected(Reason.MIXED_SERIES, "no series UID, and instance numbers that are no numbers") from None
    steps = np.diff(places)
    jumps = int((steps != np.median(steps)).sum())
    # A few jumps are runs of several series; many are numbers that were dealt out at random, once for all.
    if 0 < jumps <= len(found) // 4:
        raise Rejected(Reason.MIXED_SERIES, f"no series UID, and slices of {jumps + 1} runs of instance numbers")


def _read_pixels(series: _Series, order: list[int]) -> NDArray[np.signedinteger[Any]]:
    """All slices in HU, (slice, row, column): int16, or int32 where a value asks for it."""
    planes = series.planes
    voxels: NDArray[np.signedinteger[Any]] = np.empty((len(planes), *planes[0].geometry.size), np.int16)
    place_of = {id(planes[index]): place for place, index in enumerate(order)}
    files: dict[Path, list[_Plane]] = defaultdict(list)
    for plane in planes:
        files[plane.stored.path].append(plane)
    for members in files.values():
        try:
            frames = frames_of(members[0].stored, series.repairs)
            for plane, pixels in zip(members, frames, strict=True):
                hu = to_hu(pixels, plane.rescale, series.repairs)
                if hu.dtype != voxels.dtype and voxels.dtype == np.int16:
                    voxels = voxels.astype(np.int32)
                voxels[place_of[id(plane)]] = hu
        except (Rejected, MemoryError):
            raise
        except Exception as error:
            failed = reading_failed(error, "the pixels of a slice cannot be decoded")
            if failed.reason == Reason.IO_ERROR:
                raise failed from None
            series.faults.append((f"its pixels fail, {type(error).__name__}", members))
    if series.faults:
        lost = {id(plane) for _, members in series.faults for plane in members}
        series.planes = [plane for plane in planes if id(plane) not in lost]
        _stacked(series)
    return voxels
