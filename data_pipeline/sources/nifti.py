"""NIfTI-1 and NIfTI-2 files, through nibabel."""

import gzip
import logging
import math
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from data_pipeline.reasons import Reason, Rejected, reading_failed
from data_pipeline.sources.source import Scan

_LARGEST_RATIO = 1100
"""Deflate cannot shrink more than 1032-fold: a header that promises more voxels than that lies."""

_HEADER_1 = (348).to_bytes(4, "little")
"""The first field of NIfTI-1, in either byte order."""
_PIECE = 1 << 20

_MM_PER_UNIT = {"meter": 1000.0, "micron": 0.001}

logging.getLogger("nibabel").setLevel(logging.CRITICAL)


def read_nifti(path: Path) -> Scan:
    """Read one volume file; slope and intercept are applied, trailing axes of length 1 are dropped.

    Raises:
        Rejected: unreadable, or not one 3D volume of plain numbers.
    """
    with _opened(path) as file:
        image, shape = _header(file)
        header = image.header
        if len(shape) != 3:
            raise Rejected(Reason.NOT_3D, f"{len(shape)} axes of sizes {list(shape)}, expected 3")
        dtype = header.get_data_dtype()
        if dtype.fields is not None or dtype.kind not in "iuf":
            raise Rejected(Reason.NOT_3D, "colour or complex numbers in each voxel, expected one real number")
        if np.prod(shape, dtype=float) > path.stat().st_size * _LARGEST_RATIO:
            raise Rejected(Reason.UNREADABLE, "the header promises more voxels than the file can hold")
        voxels = _voxels(file, image).reshape(shape)
    repairs = []
    if image.dataobj.slope not in {1.0}:
        repairs.append("rescaled")
    affine = np.array(image.affine, dtype=np.float64)
    if int(header["sform_code"]) <= 0 and int(header["qform_code"]) <= 0:
        repairs.append("orientation_assumed")
    unit = _mm_per_unit(image)
    if unit != 1.0:
        affine[:3] *= unit
        repairs.append("unit_converted")
    return Scan(voxels, affine, tuple(repairs))


def header_size(path: Path) -> tuple[int, float]:
    """Count of voxels, and mm3 of one, by the header alone.

    Raises:
        Rejected: unreadable.
    """
    with _opened(path) as file:
        image, shape = _header(file)
    return math.prod(shape), math.prod(float(step) * _mm_per_unit(image) for step in image.header.get_zooms()[:3])


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
    with ExitStack() as stack:
        try:
            file = stack.enter_context(opener(path, "rb"))
        except OSError as error:
            raise reading_failed(error, "the file cannot be opened") from None
        yield file


def _header(file: IO[bytes]) -> tuple[Any, tuple[int, ...]]:
    """The image, its voxels not yet read, and its shape."""
    try:
        first = file.read(4)
        file.seek(0)
        # Any other format that nibabel knows could hide behind the suffix; only NIfTI is meant here.
        kind = nib.Nifti1Image if _HEADER_1 in {first, first[::-1]} else nib.Nifti2Image
        image = kind.from_stream(file)
        shape = tuple(int(size) for size in image.shape)
    except Exception as error:
        raise reading_failed(error, "the header cannot be read") from None
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if any(size < 1 for size in shape):
        raise Rejected(Reason.UNREADABLE, f"the header gives axes of sizes {list(shape)}")
    return image, shape


def _mm_per_unit(image: Any) -> float:
    try:
        return _MM_PER_UNIT.get(image.header.get_xyzt_units()[0], 1.0)
    except KeyError:
        raise Rejected(Reason.NO_GEOMETRY, "the header gives a unit of length that NIfTI does not know") from None


def _voxels(file: IO[bytes], image: Any) -> NDArray[Any]:
    try:
        voxels: NDArray[Any] = np.asanyarray(image.dataobj)
        if isinstance(file, gzip.GzipFile):
            # Only the end of the stream holds its checksum, and nibabel stops after the last voxel.
            while file.read(_PIECE):
                pass
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise reading_failed(error, "the voxels cannot be decoded") from None
    return voxels
