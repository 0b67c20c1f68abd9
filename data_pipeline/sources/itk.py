"""NRRD and MetaImage files, through SimpleITK, and the data files that their headers may point to."""

from pathlib import Path, PurePosixPath

import numpy as np
import SimpleITK as sitk

from data_pipeline.reasons import Reason, Rejected
from data_pipeline.sources.source import LPS_TO_RAS, Scan

_LARGEST_RATIO = 1100
"""Deflate cannot shrink more than 1032-fold: a header that promises more voxels than that lies."""

sitk.ProcessObject.SetGlobalWarningDisplay(False)


def read_itk(path: Path, file_bytes: int) -> Scan:
    """Read one volume file.

    Args:
        path: .nrrd .nhdr .mha or .mhd.
        file_bytes: size of the file and its detached data, to see whether the header can be true.

    Raises:
        Rejected: unreadable, or not one 3D volume of plain numbers.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        shape = header_shape(path)
        if reader.GetDimension() and len(shape) != 3:
            raise Rejected(Reason.NOT_3D, f"{len(shape)} axes of sizes {list(shape)}, expected 3")
        if np.prod(shape, dtype=float) > file_bytes * _LARGEST_RATIO:
            raise Rejected(Reason.UNREADABLE, "the header promises more voxels than the file can hold")
        image = reader.Execute()
    except RuntimeError:
        raise Rejected(Reason.UNREADABLE, "the file cannot be decoded: header or data are damaged") from None
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise Rejected(Reason.NOT_3D, f"{image.GetNumberOfComponentsPerPixel()} numbers a voxel, expected 1")
    affine = np.eye(4)
    direction = np.array(image.GetDirection()).reshape(3, 3)
    affine[:3, :3] = direction * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return Scan(sitk.GetArrayFromImage(image).transpose(2, 1, 0), LPS_TO_RAS @ affine)


def header_shape(path: Path) -> tuple[int, ...]:
    """Sizes of the axes by the header alone; RuntimeError where it cannot be read."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return tuple(int(size) for size in reader.GetSize())


def detached_files(root: Path, file: str) -> tuple[str, ...]:
    """The data files that a .nhdr or .mhd header names, relative to root, as far as they are there."""
    if not file.lower().endswith((".nhdr", ".mhd")):
        return ()
    try:
        with open(root / file, "rb") as opened:
            lines = opened.read(65536).decode("latin-1").splitlines()
    except OSError:
        return ()
    found = (str(PurePosixPath(file).parent / name) for name in _named(lines))
    return tuple(sorted({name for name in found if (root / name).is_file()}))


def _named(lines: list[str]) -> list[str]:
    for number, line in enumerate(lines):
        key, _, value = line.partition("=" if "=" in line else ":")
        if key.strip().lower() not in {"elementdatafile", "data file", "datafile"}:
            continue
        if value.strip().split()[:1] == ["LIST"]:
            return [name.strip() for name in lines[number + 1 :] if name.strip()]
        return [] if value.strip() in {"", "LOCAL"} else [value.strip()]
    return []
