"""The slices of one DICOM series into one scan: geometry first, then pixels, one slice in memory at a time."""

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from data_pipeline.reasons import Reason, Rejected, reading_failed
from data_pipeline.sources.dicom_geometry import Slice, positions_along_normal, stack_slices
from data_pipeline.sources.dicom_series import image_types, read_header
from data_pipeline.sources.source import LPS_TO_RAS, Scan

_AIR_HU = -1024
_LARGEST_PADDING_HU = -200
"""A padding value above this also occurs in tissue: replacing it would punch holes into the patient."""

_LOSSY_SYNTAXES = frozenset(f"1.2.840.10008.1.2.4.{end}" for end in ("50", "51", "53", "55", "81", "91", "93", "203"))


@dataclass(frozen=True)
class _File:
    path: Path
    geometry: Slice


def read_series(paths: list[Path]) -> Scan:
    """Read one series of single-frame files.

    Raises:
        Rejected: the slices are no regular volume, or one of them cannot be decoded.
    """
    headers = [(path, _header(path)) for path in paths]
    repairs: set[str] = set()
    files = _without_copies([_File(path, _geometry(header)) for path, header in headers], repairs)
    order, affine = stack_slices([file.geometry for file in files])
    rows, columns = files[0].geometry.size
    voxels = np.empty((len(files), rows, columns), np.int32)
    for place, index in enumerate(order):
        voxels[place] = _decode(files[index].path, (rows, columns), repairs)
    first = headers[0][1]
    if "DERIVED" in image_types(first):
        repairs.add("derived_image_type")
    patient = str(first.get("PatientID") or "").strip()
    issuer = str(first.get("IssuerOfPatientID") or "").strip()
    return Scan(
        voxels.transpose(2, 1, 0),
        LPS_TO_RAS @ affine,
        tuple(sorted(repairs)),
        f"{issuer}\n{patient}" if patient else None,
    )


def _header(path: Path) -> Any:
    try:
        return read_header(path)
    except Exception as error:
        raise reading_failed(error, "the header of a slice cannot be read") from None


def _geometry(header: Any) -> Slice:
    try:
        position = tuple(float(number) for number in header.ImagePositionPatient)
        orientation = tuple(float(number) for number in header.ImageOrientationPatient)
        spacing = tuple(float(number) for number in header.PixelSpacing)
        size = (int(header.Rows), int(header.Columns))
    except (AttributeError, TypeError, ValueError):
        raise Rejected(Reason.NO_GEOMETRY, "a slice lacks image position, image orientation or pixel spacing") from None
    if (len(position), len(orientation), len(spacing)) != (3, 6, 2) or not np.isfinite(
        (*position, *orientation, *spacing)
    ).all():
        raise Rejected(
            Reason.NO_GEOMETRY, "a slice's image position, orientation or spacing has a wrong count of numbers"
        )
    return Slice(position, orientation, spacing, size)  # type: ignore[arg-type]  # the counts are checked above


def _without_copies(files: list[_File], repairs: set[str]) -> list[_File]:
    """Drop files that are byte for byte another file of the series."""
    along = positions_along_normal([file.geometry for file in files])
    places, counts = np.unique(np.round(along, 3), return_counts=True)
    if counts.max() == 1:
        return files
    crowded = set(places[counts > 1].tolist())
    seen: set[str] = set()
    kept = []
    for file, place in zip(files, np.round(along, 3).tolist(), strict=True):
        if place in crowded:
            digest = hashlib.sha256(file.path.read_bytes()).hexdigest()
            if digest in seen:
                repairs.add("copies_dropped")
                continue
            seen.add(digest)
        kept.append(file)
    return kept


def _decode(path: Path, size: tuple[int, int], repairs: set[str]) -> NDArray[np.int32]:
    """One slice in HU, rounded to whole units."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = pydicom.dcmread(path, force=True)
            file.file_meta.TransferSyntaxUID = syntax = _transfer_syntax(file)
            pixels = file.pixel_array
        slope, intercept = float(_or(file.get("RescaleSlope"), 1)), float(_or(file.get("RescaleIntercept"), 0))
        padding = _padding_range(file)
    except Exception as error:
        raise reading_failed(error, "the pixels of a slice cannot be decoded") from None
    if pixels.shape != size:
        raise Rejected(Reason.UNREADABLE, f"a slice decodes to {pixels.shape}, its header says {size}")
    values = pixels.astype(np.float64) * slope + intercept
    if not np.isfinite(values).all() or np.abs(values).max() > np.iinfo(np.int32).max:
        raise Rejected(Reason.NON_FINITE, "the rescale slope or intercept gives no usable numbers")
    if slope != 1:
        repairs.add("rescaled")
    if syntax in _LOSSY_SYNTAXES or str(file.get("LossyImageCompression") or "") == "01":
        repairs.add("lossy_source")
    hu: NDArray[np.int32] = np.rint(values).astype(np.int32)
    if padding is not None:
        _map_padding(hu, (pixels >= padding[0]) & (pixels <= padding[1]), repairs)
    return hu


def _or(value: Any, default: float) -> Any:
    return default if value is None else value


def _transfer_syntax(file: Any) -> UID:
    """How the pixels are encoded; a data set that lost its file meta can only be uncompressed."""
    named = file.file_meta.get("TransferSyntaxUID")
    if named:
        return UID(named)
    is_implicit, is_little = file.original_encoding
    if is_implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRLittleEndian if is_little else ExplicitVRBigEndian


def _padding_range(file: Any) -> tuple[int, int] | None:
    """Stored values that mark pixels outside the reconstruction, both ends included."""
    value = file.get("PixelPaddingValue")
    if not isinstance(value, int):
        return None
    limit = file.get("PixelPaddingRangeLimit")
    other = limit if isinstance(limit, int) else value
    return min(value, other), max(value, other)


def _map_padding(hu: NDArray[np.int32], padded: NDArray[np.bool_], repairs: set[str]) -> None:
    if not padded.any():
        return
    if hu[padded].max() > _LARGEST_PADDING_HU:
        repairs.add("padding_ambiguous")
    elif (hu[padded] != _AIR_HU).any():
        hu[padded] = _AIR_HU
        repairs.add("padding_mapped")
