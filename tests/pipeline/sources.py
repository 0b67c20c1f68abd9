"""Source files of every accepted format, written from a small body phantom, and SimpleITK's reading as the oracle."""

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from data_pipeline.build.task import Task, TaskResult, build_volume
from data_pipeline.sources.inventory import find_sources
from data_pipeline.sources.source import Source
from mim_scale.config import BuildConfig
from mim_scale.store.geometry import Size3
from tests.synthetic import make_volume

SHAPE: Size3 = (18, 20, 22)
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def phantom(seed: int = 0, shape: Size3 = SHAPE) -> NDArray[np.int16]:
    """HU (z, y, x) with air, tissue and bone; no symmetry."""
    voxels = make_volume(shape, seed).voxels.copy()
    voxels[0, 0, 0], voxels[-1, -1, -1] = 1234, -500
    return voxels


def rotation(degrees: Sequence[float]) -> NDArray[np.float64]:
    """Rotation about x, then y, then z."""
    turn = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        a, b = [i for i in range(3) if i != axis]
        step = np.eye(3)
        step[a, a] = step[b, b] = np.cos(angle)
        step[a, b], step[b, a] = -np.sin(angle), np.sin(angle)
        turn = step @ turn
    return turn


def write_image(
    path: Path,
    voxels: NDArray[Any],
    axes: str = "LPS",
    spacing_mm: Sequence[float] = (0.8, 0.9, 2.5),
    degrees: Sequence[float] = (0, 0, 0),
) -> Path:
    """A NIfTI, NRRD or MetaImage file, by its suffix; voxels (z, y, x), spacing (x, y, z), axes as ITK names them."""
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(spacing_mm)
    image.SetOrigin((-30.5, 12.25, -400.0))
    image.SetDirection(rotation(degrees).ravel())
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.DICOMOrient(image, axes) if axes != "LPS" else image, str(path))
    return path


@dataclass(frozen=True)
class Series:
    """How a DICOM series is written: geometry in LPS, values stored as HU - intercept."""

    voxels: NDArray[np.int16]
    orientation: tuple[float, ...] = (1, 0, 0, 0, 1, 0)
    spacing_mm: tuple[float, float, float] = (2.5, 0.9, 0.8)
    """Between slices, rows, columns."""
    origin: tuple[float, float, float] = (-30.5, 12.25, -400.0)
    intercept: float = -1024
    slope: float = 1
    tags: Mapping[str, Any] | None = None
    """Set in every slice; None deletes."""
    slice_tags: Mapping[int, Mapping[str, Any]] | None = None
    """Set in single slices, by index."""
    uid: str | None = None


def slice_position(series: Series, index: int) -> NDArray[np.float64]:
    """LPS millimetres of the first pixel of a slice."""
    normal = np.cross(series.orientation[:3], series.orientation[3:])
    return np.array(series.origin) + normal * series.spacing_mm[0] * index


def write_series(folder: Path, series: Series, skip: Sequence[int] = ()) -> list[Path]:
    """One file a slice, with instance numbers and names that say nothing about the order."""
    folder.mkdir(parents=True, exist_ok=True)
    uid = series.uid or generate_uid()
    shuffled = np.random.default_rng(5).permutation(len(series.voxels))
    paths = []
    for index, hu in enumerate(series.voxels):
        if index in skip:
            continue
        file = _slice(series, index, hu, uid)
        file.InstanceNumber = int(shuffled[index]) + 1
        path = folder / f"IM{shuffled[index]:04d}"
        file.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def _slice(series: Series, index: int, hu: NDArray[np.int16], uid: str) -> pydicom.Dataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = pydicom.Dataset()
    file.file_meta = meta
    file.SOPClassUID = meta.MediaStorageSOPClassUID = CTImageStorage
    file.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = generate_uid()
    file.Modality, file.SeriesInstanceUID, file.StudyInstanceUID = "CT", uid, "1.2.3"
    file.PatientID, file.PatientName = "CANARY-ID", "CANARY^NAME"
    file.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    file.ImagePositionPatient = [float(number) for number in slice_position(series, index)]
    file.ImageOrientationPatient = list(series.orientation)
    file.PixelSpacing = [series.spacing_mm[1], series.spacing_mm[2]]
    file.Rows, file.Columns = hu.shape
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 16, 15, 1
    file.RescaleSlope, file.RescaleIntercept = series.slope, series.intercept
    stored = np.rint((hu.astype(np.float64) - series.intercept) / series.slope)
    file.PixelData = stored.astype("<i2").tobytes()
    for name, value in {**(series.tags or {}), **(series.slice_tags or {}).get(index, {})}.items():
        if value is None:
            delattr(file, name)
        else:
            setattr(file, name, value)
    return file


def with_tags(series: Series, **tags: Any) -> Series:
    """The same series with tags set in every slice."""
    return replace(series, tags=tags)


def oracle(paths: Sequence[Path]) -> tuple[NDArray[np.int16], NDArray[np.float64]]:
    """SimpleITK's reading, turned and clamped as the store says: voxels (z, y, x), affine to RAS."""
    image = sitk.ReadImage([str(path) for path in paths] if len(paths) > 1 else str(paths[0]))
    image = sitk.DICOMOrient(image, "RAS")
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    voxels = np.maximum(np.rint(sitk.GetArrayFromImage(image)), -1024).astype(np.int16)
    return voxels, LPS_TO_RAS @ affine


def only_source(root: Path) -> Source:
    """The one input below a folder."""
    (source,) = find_sources(root).sources
    return source


def config(source: Path, store: Path, **settings: Any) -> BuildConfig:
    """A build on two local processes."""
    values = {"executor": "local", "workers": 2} | settings
    return BuildConfig(source=str(source), store=str(store), **values)


def build_or_die(task: Task) -> TaskResult:
    """build_volume, but for sources named `dies`, which kill the worker, and `raises`, which raise."""
    if "dies" in task.source.name:
        os.kill(os.getpid(), signal.SIGKILL)
    if "raises" in task.source.name:
        raise ZeroDivisionError("on purpose")
    return build_volume(task)
