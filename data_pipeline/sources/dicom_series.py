"""DICOM headers: which files belong together, and which can be refused without looking at a pixel."""

import hashlib
import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.reasons import Reason, Rejected, reading_failed
from data_pipeline.sources.dicom_frames import check_one_stack, frame_headers, is_multi_frame
from data_pipeline.sources.dicom_header import (
    has_size,
    is_cut,
    numbers,
    problem_of,
    read_header,
    tags,
    text,
    whole,
)
from data_pipeline.sources.source import Source

_IDENTITY = ("StudyInstanceUID", "PatientID", "SeriesInstanceUID")
_DESCRIPTION = (
    *("SeriesNumber", "SeriesDescription", "SeriesDate", "SeriesTime", "StudyDate", "StudyTime", "StudyID"),
    *("AccessionNumber", "PatientName", "PatientBirthDate", "PatientSex", "FrameOfReferenceUID", "ProtocolName"),
    *("Manufacturer", "ManufacturerModelName", "StationName", "DeviceSerialNumber", "KVP", "ConvolutionKernel"),
    *("ReconstructionDiameter", "PixelSpacing", "ImageOrientationPatient", "Rows", "Columns"),
)
"""What all slices of one series have in common, to tell series apart whose UID was removed."""
_HEADER = tags(
    *(*_IDENTITY, *_DESCRIPTION, "ImagePositionPatient", "ImageType", "Modality", "NumberOfFrames", "RescaleType"),
    *("SOPClassUID", "SamplesPerPixel", "PhotometricInterpretation"),
)
_FUNCTIONAL_GROUPS = [*_HEADER, *tags("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")]

_CUT, _NO_PIXELS = "the file ends within its header", "no image in the file"


@dataclass(frozen=True, slots=True)
class DicomFacts:
    """What one header says, in plain values small enough to be kept for millions of files; they name nobody."""

    group: str = ""
    """Equal for files of one series: a digest of who, which study and which series."""
    has_uid: bool = True
    """Whether the series has a UID: without one its files are looked for in one folder only."""
    num_frames: int = 1
    pixels: int = 0
    """Rows x columns."""
    low: tuple[float, float, float] | None = None
    """Position; of many frames, the lowest along each axis."""
    high: tuple[float, float, float] | None = None
    pixel_mm2: float = 0.0
    damage: str = ""
    """Of a slice of a series whose file ends before the pixels: how."""
    problem: tuple[str, str] | None = None
    """Why it can be refused by its header: reason and detail. IO_ERROR may pass: such facts must not be kept."""

    def values(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> "DicomFacts":
        """From what `values` gave, also after a way through JSON."""
        tuples = ("low", "high", "problem")
        return cls(**values | {name: values[name] and tuple(values[name]) for name in tuples})


def is_dicom(path: Path) -> bool:
    """Whether a file has the DICOM preamble, starts like a data set that lost it, or is such a file inside gzip."""
    with open(path, "rb") as file:
        first = file.read(1024)
    if first[:2] == b"\x1f\x8b":
        try:
            first = zlib.decompressobj(wbits=31).decompress(first, 132)
        except zlib.error:
            return False
    if first[128:132] == b"DICM":
        return True
    group = first[:2]
    # Group 2 or 8 in either byte order, followed by an element number below 0x0100 as real headers start.
    little = group in {b"\x02\x00", b"\x08\x00"} and first[3:4] == b"\x00"
    return little or first[:3] in {b"\x00\x02\x00", b"\x00\x08\x00"}


def header_facts(path: Path) -> DicomFacts:
    """Read one header. Never raises: what cannot be read says so in its problem."""
    try:
        with open(path, "rb") as file:
            if file.read(2) == b"\x1f\x8b":
                return DicomFacts(problem=(Reason.UNREADABLE, "a DICOM file inside gzip: unpack it"))
            file.seek(0)
            header, start = read_header(file, _HEADER)
            damage = ""
            if start is None:
                damage = _CUT if is_cut(file, header) else _NO_PIXELS
            if is_multi_frame(header):
                file.seek(0)
                header, _ = read_header(file, _FUNCTIONAL_GROUPS)
        return _facts(header, damage)
    except Rejected as rejected:
        return DicomFacts(problem=(rejected.reason, rejected.detail))
    except Exception as error:
        failed = reading_failed(error, "the DICOM header cannot be read")
        return DicomFacts(problem=(failed.reason, failed.detail))


def _facts(header: Any, damage: str) -> DicomFacts:
    frames = frame_headers(header)
    first, last = frames[0], frames[-1]
    num_frames = max(1, whole(header, "NumberOfFrames", 1))
    problem = problem_of(first) or problem_of(last)
    try:
        check_one_stack(frames, num_frames)
    except Rejected as rejected:
        problem = problem or (rejected.reason, rejected.detail)
    identity = [text(header, name) for name in _IDENTITY]
    has_uid = bool(identity[-1])
    described = [] if has_uid else [text(header, name) for name in _DESCRIPTION]
    spacing = numbers(first, "PixelSpacing", 2)
    places = [place for frame in frames if (place := numbers(frame, "ImagePositionPatient", 3))]
    return DicomFacts(
        group=hashlib.sha256("\n".join([*identity, *described]).encode("utf-8", "replace")).hexdigest()[:32],
        has_uid=has_uid,
        num_frames=num_frames,
        pixels=whole(header, "Rows") * whole(header, "Columns"),
        low=_corner(places, min),
        high=_corner(places, max),
        pixel_mm2=spacing[0] * spacing[1] if spacing else 0.0,
        damage="" if problem else damage or ("" if has_size(header) else _NO_PIXELS),
        problem=problem,
    )


def sources_of(facts: Mapping[str, DicomFacts]) -> list[Source]:
    """Put files of one series and one kind together, from the facts of every file.

    Series without a UID are told apart by folder and by what else describes them, never merged across folders. A file
    of many frames is a source of its own.
    """
    series: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for file, fact in facts.items():
        is_own = not fact.group or (fact.num_frames > 1 and not fact.problem)
        folder = "" if fact.has_uid else str(PurePosixPath(file).parent)
        kind = str(fact.problem[0]) if fact.problem else ""
        series[(fact.group, folder, kind, file if is_own else "")].append(file)
    return [_source(tuple(sorted(files)), [facts[file] for file in sorted(files)]) for files in series.values()]


def group_series(root: Path, files: list[str]) -> list[Source]:
    """Read each header once; files of one series and one kind become one source."""
    return sources_of({file: header_facts(root / file) for file in files})


def _source(files: tuple[str, ...], facts: list[DicomFacts]) -> Source:
    problem = next(((Reason(fact.problem[0]), fact.problem[1]) for fact in facts if fact.problem), None)
    if problem is None and all(fact.damage for fact in facts):
        reason = Reason.UNREADABLE if any(fact.damage == _CUT for fact in facts) else Reason.NO_PIXELS
        problem = reason, facts[0].damage
    voxels = sum(fact.pixels * fact.num_frames for fact in facts)
    return Source(files[0], "dicom", files, voxels, problem, _voxel_mm3(facts))


def _corner(
    places: list[tuple[float, ...]], pick: Callable[[tuple[float, ...]], float]
) -> tuple[float, float, float] | None:
    if not places:
        return None
    x, y, z = (pick(numbers_) for numbers_ in zip(*places, strict=True))
    return x, y, z


def _voxel_mm3(facts: list[DicomFacts]) -> float:
    """An estimate from the outermost positions; 0 where it cannot be made."""
    placed = [fact for fact in facts if fact.low and fact.high]
    low, high = (
        _corner([fact.low for fact in placed if fact.low], min),
        _corner([f.high for f in placed if f.high], max),
    )
    count = sum(fact.num_frames for fact in placed)
    if low is None or high is None or count < 2:
        return 0.0
    return placed[0].pixel_mm2 * math.dist(low, high) / (count - 1)
