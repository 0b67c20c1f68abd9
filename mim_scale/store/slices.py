"""Slices of a stored volume as people look at them: head or front up, the patient's right on the left, sizes in mm."""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mim_scale.store.array_store import VolumeReader
from mim_scale.store.geometry import Box, size3
from mim_scale.store.manifest import Row

PLANES = ("axial", "coronal", "sagittal")
"""Planes by the axis that they are perpendicular to: z, y, x."""

Kind = TypeVar("Kind", bound=np.generic)

WINDOWS = {"soft": (-160, 240), "lung": (-1350, 150), "bone": (-450, 1050), "wide": (-1000, 1000)}
"""Hounsfield units that are drawn black and white."""


def read_slice(reader: VolumeReader, level: int, axis: int, index: int) -> NDArray[np.int16]:
    """One slice of a level, HU, turned upright: head up, or front up in axial ones; right, or front, on the left.

    Args:
        axis: That the slice is perpendicular to.
        index: Of the slice along it, in voxels of that level.

    Raises:
        DamagedError: a chunk that the slice touches is missing or fails its checksum.
    """
    shape = reader.level_shapes[level]
    start = size3(index if other == axis else 0 for other in range(3))
    size = size3(1 if other == axis else length for other, length in enumerate(shape))
    return upright(reader.read_box(level, Box(start, size)).squeeze(axis))


def upright(image: NDArray[Kind]) -> NDArray[Kind]:
    """A slice whose axes run as the volume's do, turned upright; the same for every plane."""
    return image[::-1, ::-1]


def size_mm(row: Row, axis: int) -> tuple[float, float]:
    """(height, width) of the slices perpendicular to an axis."""
    height, width = (
        length * spacing
        for other, (length, spacing) in enumerate(zip(row.shape, row.spacing_mm, strict=True))
        if other != axis
    )
    return height, width


def windowed(hu: NDArray[np.integer], window: tuple[float, float]) -> NDArray[np.uint8]:
    """Grey values 0 to 255 of Hounsfield units."""
    low, high = window
    share = (hu.astype(np.float32) - low) / (high - low)
    return np.asarray(np.clip(share * 255, 0, 255).astype(np.uint8))
