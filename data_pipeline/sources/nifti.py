"""NIfTI-1 and NIfTI-2 files, through nibabel."""

import logging
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import nibabel.openers
import numpy as np

from data_pipeline.reasons import Reason, Rejected
from data_pipeline.sources.source import Scan

_LARGEST_RATIO = 1100
"""Deflate cannot shrink more than 1032-fold: a header that promises more voxels than that lies."""

_MM_PER_UNIT = {"meter": 1000.0, "micron": 0.001}

logging.getLogger("nibabel").setLevel(logging.CRITICAL)


def read_nifti(path: Path) -> Scan:
    """Read one volume file; slope and intercept are applied, trailing axes of length 1 are dropped.

    Raises:
        Rejected: unreadable, or not one 3D volume of plain numbers.
    """
    image, shape = _open(path)
    header = image.header
    if len(shape) != 3:
        raise Rejected(Reason.NOT_3D, f"{len(shape)} axes of sizes {list(shape)}, expected 3")
    dtype = header.get_data_dtype()
    if dtype.fields is not None or dtype.kind not in "iuf":
        raise Rejected(Reason.NOT_3D, "colour or complex numbers in each voxel, expected one real number")
    if np.prod(shape, dtype=float) > path.stat().st_size * _LARGEST_RATIO:
        raise Rejected(Reason.UNREADABLE, "the header promises more voxels than the file can hold")
    try:
        voxels = np.asanyarray(image.dataobj).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error, MemoryError) as error:
        raise Rejected(Reason.UNREADABLE, f"the voxels cannot be decoded ({type(error).__name__})") from None
    repairs = []
    if image.dataobj.slope not in {1.0}:
        repairs.append("rescaled")
    affine = np.array(image.affine, dtype=np.float64)
    if int(header["sform_code"]) <= 0 and int(header["qform_code"]) <= 0:
        repairs.append("orientation_assumed")
    unit = _MM_PER_UNIT.get(header.get_xyzt_units()[0], 1.0)
    if unit != 1.0:
        affine[:3] *= unit
        repairs.append("unit_converted")
    return Scan(voxels, affine, tuple(repairs))


def header_shape(path: Path) -> tuple[int, ...]:
    """Sizes of the axes by the header alone.

    Raises:
        Rejected: unreadable.
    """
    return _open(path)[1]


def _open(path: Path) -> tuple[Any, tuple[int, ...]]:
    try:
        # Any other format that nibabel knows could hide behind the suffix; only NIfTI is meant here.
        image = nib.Nifti1Image.from_filename(path) if _is_version_1(path) else nib.Nifti2Image.from_filename(path)
        shape = tuple(int(size) for size in image.shape)
    except Exception as error:
        raise Rejected(Reason.UNREADABLE, f"the header cannot be read ({type(error).__name__})") from None
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if any(size < 1 for size in shape):
        raise Rejected(Reason.UNREADABLE, f"the header gives axes of sizes {list(shape)}")
    return image, shape


def _is_version_1(path: Path) -> bool:
    with nib.openers.ImageOpener(str(path), "rb") as file:
        first = file.read(4)
    return int.from_bytes(first, "little") == 348 or int.from_bytes(first, "big") == 348
