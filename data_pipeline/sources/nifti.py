"""NIfTI-1 and NIfTI-2 files: headers by nibabel, voxels straight into one array, extensions never looked at."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from data_pipeline.reasons import Reason, Rejected, reading_failed
from data_pipeline.sources.inflate import GZIP, LARGEST_RATIO, Unpacked
from data_pipeline.sources.source import Scan

_HEADER_1 = (348).to_bytes(4, "little")
"""The first field of NIfTI-1, in either byte order."""
_HEADER_BYTES = (348, 540)
"""Of NIfTI-1 and of NIfTI-2."""
_LARGEST_OFFSET = 1 << 28
"""Room for extensions between header and voxels."""
_MOST_REST = 512
"""Bytes after the last voxel, as some writers fill up a block; more of them, and the sizes lie."""
_SAME_FORM = 0.01
_INT16 = np.iinfo(np.int16)

_MM_PER_UNIT = {"meter": 1000.0, "micron": 0.001}

logging.getLogger("nibabel").setLevel(logging.CRITICAL)


def read_nifti(path: Path) -> Scan:
    """Read one volume file; slope and intercept are applied, trailing axes of length 1 are dropped.

    Raises:
        Rejected: unreadable, or not one 3D volume of plain numbers.
    """
    with _opened(path) as data:
        header, shape = _header(data)
        if len(shape) != 3:
            raise Rejected(Reason.NOT_3D, f"{len(shape)} axes of sizes {list(shape)}, expected 3")
        dtype = header.get_data_dtype()
        if dtype.fields is not None or dtype.kind not in "iuf":
            raise Rejected(Reason.NOT_3D, "colour or complex numbers in each voxel, expected one real number")
        if math.prod(shape) > path.stat().st_size * LARGEST_RATIO:
            raise Rejected(Reason.UNREADABLE, "the header promises more voxels than the file can hold")
        voxels = _voxels(data, header, shape)
    repairs: set[str] = set()
    voxels = _scaled(voxels, header, repairs)
    affine = _affine(header, repairs)
    return Scan(voxels, affine, tuple(sorted(repairs)))


def header_size(path: Path) -> tuple[int, float]:
    """Count of voxels, and mm3 of one, by the header alone.

    Raises:
        Rejected: unreadable.
    """
    with _opened(path) as data:
        header, shape = _header(data)
    return math.prod(shape), math.prod(float(step) * _mm_per_unit(header) for step in header.get_zooms()[:3])


@contextmanager
def _opened(path: Path) -> Iterator[Unpacked]:
    try:
        with open(path, "rb") as file:
            yield Unpacked(file)
    except OSError as error:
        raise reading_failed(error, "the file cannot be read") from None


def _header(data: Unpacked) -> tuple[Any, tuple[int, ...]]:
    """The header and the shape; leaves the data behind the header."""
    first = data.read(4)
    if data.is_packed and first.startswith(GZIP):
        raise Rejected(Reason.UNREADABLE, "it is compressed twice: unpack it once")
    # Any other format that nibabel knows could hide behind the suffix; only NIfTI is meant here.
    is_first = _HEADER_1 in {first, first[::-1]}
    size = _HEADER_BYTES[0 if is_first else 1]
    block = first + data.read(size - 4)
    if len(block) < size:
        raise Rejected(Reason.UNREADABLE, "the file ends within its header")
    try:
        kind = nib.Nifti1Header if is_first else nib.Nifti2Header
        header = kind(block)
        # nibabel mends what it finds odd, such as voxels of 0 mm, which it takes for 1 mm.
        pixdim = np.array(kind(block, check=False)["pixdim"][1:4], float)
        shape = tuple(int(length) for length in header.get_data_shape())
    except Exception as error:
        raise reading_failed(error, "the header cannot be read") from None
    if not bytes(header["magic"]).startswith(b"n+"):
        raise Rejected(Reason.UNREADABLE, "the header of a .hdr and .img pair: convert it to one .nii file")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if any(length < 1 for length in shape):
        raise Rejected(Reason.UNREADABLE, f"the header gives axes of sizes {list(shape)}")
    if int(header["sform_code"]) <= 0 and (pixdim <= 0).any():
        raise Rejected(Reason.SPACING_IMPLAUSIBLE, f"the header gives voxels of {float(pixdim.min()):g} mm")
    return header, shape


def _voxels(data: Unpacked, header: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    """The stored numbers, axes (i, j, k), the first of them innermost; read to the end, where the checksum is."""
    start = float(header["vox_offset"]) - header.sizeof_hdr
    if not 0 <= start <= _LARGEST_OFFSET:
        raise Rejected(Reason.UNREADABLE, "the header says that the voxels begin where they cannot")
    data.skip(int(start))
    dtype = header.get_data_dtype()
    stored = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
    count = data.readinto(stored.data)
    if count < stored.size:
        raise Rejected(Reason.UNREADABLE, f"cut off: {count} bytes of voxels, the header promises {stored.size}")
    if len(data.read(_MOST_REST + 1)) > _MOST_REST:
        raise Rejected(Reason.UNREADABLE, f"the file holds more than the {stored.size} bytes that its header promises")
    voxels: NDArray[Any] = stored.view(dtype).reshape(shape, order="F")
    return voxels


def _scaled(voxels: NDArray[Any], header: Any, repairs: set[str]) -> NDArray[Any]:
    """Slope and intercept applied; in whole numbers where that is exact, else in float64."""
    try:
        slope, intercept = header.get_slope_inter()
        if np.isinf(header["scl_slope"]):
            raise ValueError("nibabel takes an infinite slope for none")
    except Exception as error:
        raise reading_failed(error, "slope or intercept cannot be used") from None
    if slope is None or (slope, intercept) == (1.0, 0.0):
        return voxels
    repairs.add("rescaled")
    kind: type[np.generic] = np.float64
    if voxels.dtype.kind in "iu" and voxels.dtype.itemsize <= 2 and slope.is_integer() and intercept.is_integer():
        slope, intercept = int(slope), int(intercept)
        ends = [int(end) * slope + intercept for end in (voxels.min(), voxels.max())]
        if _INT16.min <= min(ends) and max(ends) <= _INT16.max:
            return _scaled_in_place(voxels, slope, intercept)
        if abs(slope) * 2**16 + abs(intercept) < 2**31:
            kind = np.int32
    scaled = np.empty(voxels.shape, kind, order="F")
    for slab, result in zip(voxels.T, scaled.T, strict=True):
        np.multiply(slab, slope, out=result, dtype=kind)
        np.add(result, intercept, out=result)
    return scaled


def _scaled_in_place(voxels: NDArray[Any], slope: int, intercept: int) -> NDArray[np.int16]:
    """Voxels of one or two bytes whose scaled values fit into int16, in the memory of the stored ones if they can."""
    kind = np.int16 if voxels.dtype.kind == "i" else np.uint16
    # Whatever overflows on the way ends at the right number: sums and products of 16 bits are exact but for multiples
    # of 2^16, and the result fits.
    bits = voxels.astype(kind, copy=False).view(np.uint16)
    np.multiply(bits, np.uint16(slope % 2**16), out=bits)
    np.add(bits, np.uint16(intercept % 2**16), out=bits)
    return bits.view(np.int16)


def _affine(header: Any, repairs: set[str]) -> NDArray[np.float64]:
    try:
        affine = np.array(header.get_best_affine(), dtype=np.float64)
    except Exception:
        raise Rejected(Reason.NO_GEOMETRY, "the header's orientation is no rotation") from None
    if int(header["sform_code"]) > 0:
        if _contradicts(header, affine[:3, :3]):
            repairs.add("sform_preferred")
    elif int(header["qform_code"]) <= 0:
        repairs.add("orientation_assumed")
    unit = _mm_per_unit(header)
    if unit != 1.0:
        affine[:3] *= unit
        repairs.add("unit_converted")
    return affine


def _contradicts(header: Any, sform: NDArray[np.float64]) -> bool:
    """Whether sizes or directions of the voxels are told otherwise elsewhere in the header."""
    steps, zooms = np.linalg.norm(sform, axis=0), np.array(header.get_zooms()[:3], float)
    if not np.allclose(steps, zooms, rtol=_SAME_FORM):
        return True
    if int(header["qform_code"]) <= 0:
        return False
    try:
        qform = header.get_qform()[:3, :3]
    except Exception:
        return True
    return not np.allclose(sform, qform, atol=_SAME_FORM * float(steps.max()))


def _mm_per_unit(header: Any) -> float:
    try:
        return _MM_PER_UNIT.get(header.get_xyzt_units()[0], 1.0)
    except KeyError:
        raise Rejected(Reason.NO_GEOMETRY, "the header gives a unit of length that NIfTI does not know") from None
