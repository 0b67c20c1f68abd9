"""A volume in six small pictures: its middle slices in three planes, in a soft-tissue and a lung window."""

import base64
import io

import numpy as np
from PIL import Image

from mim_scale.store.array_store import VolumeReader
from mim_scale.store.manifest import Row
from mim_scale.store.slices import PLANES, WINDOWS, read_slice, size_mm, windowed

SHOWN_WINDOWS = ("soft", "lung")
_LONGEST = 132
"""Pixels of the longest side of a picture."""
_GAP = 3
_QUALITY = 82


def thumbnail(reader: VolumeReader, row: Row) -> str:
    """The pictures side by side as one JPEG, in a data URI: planes from left to right, windows from top to bottom.

    Drawn at the proportions that the spacing gives, from the coarsest level alone.

    Raises:
        DamagedError: a chunk that a slice touches is missing or fails its checksum.
    """
    level = len(reader.level_shapes) - 1
    scale = _LONGEST / max(max(size_mm(row, axis)) for axis in range(3))
    columns = []
    for axis in range(len(PLANES)):
        hu = read_slice(reader, level, axis, reader.level_shapes[level][axis] // 2)
        height, width = (max(2, round(length * scale)) for length in size_mm(row, axis))
        grey = [Image.fromarray(windowed(hu, WINDOWS[name])) for name in SHOWN_WINDOWS]
        columns.append([np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)) for image in grey])
    return _jpeg(_montage(columns))


def _montage(columns: list[list[np.ndarray]]) -> np.ndarray:
    tallest = max(picture.shape[0] for column in columns for picture in column)
    width = sum(column[0].shape[1] for column in columns) + _GAP * (len(columns) - 1)
    canvas = np.zeros((len(SHOWN_WINDOWS) * (tallest + _GAP) - _GAP, width), np.uint8)
    left = 0
    for column in columns:
        for i, picture in enumerate(column):
            top = i * (tallest + _GAP) + (tallest - picture.shape[0]) // 2
            canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
        left += column[0].shape[1] + _GAP
    return canvas


def _jpeg(picture: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
