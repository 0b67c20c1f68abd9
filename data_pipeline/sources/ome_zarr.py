"""OME-Zarr 0.4 and 0.5, our own volumes among them: level 0, every chunk of it present, in millimetres.

A chunk that is not there would read as the fill value: it is damage here, never air.
"""

import math
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.reasons import Reason, Rejected, reading_failed
from data_pipeline.sources.ome_metadata import Image, files_below, read_metadata
from data_pipeline.sources.source import Scan

_LARGEST_RATIO = 1100
"""Bytes promised to bytes on disk: no CT shrinks like that, only metadata that lie."""
_SMALL = 1 << 26
"""Bytes that may be asked for whatever the files hold: a chunk of nothing but air is tiny."""
_PLAIN_CODECS = frozenset(
    {"blosc", "zstd", "zlib", "gzip", "bz2", "lz4", "lzma", "shuffle", "delta", "fixedscaleoffset"}
)
_CODECS_3 = frozenset({"bytes", "transpose", "blosc", "gzip", "zstd", "crc32c", "sharding_indexed"}) | {
    f"numcodecs.{name}" for name in _PLAIN_CODECS
}
"""Others are unknown here, and some of them (pickle) would run what the file says."""


def read_ome_zarr(folder: Path) -> Scan:
    """Read level 0; axes of length 1 that are not spatial are dropped.

    Without an orientation the axes are taken as most writers of CT have them: x to the patient's left, y to posterior,
    z to superior; `orientation_assumed` says so.

    Raises:
        Rejected: unreadable, a chunk missing, or not one 3D volume of plain numbers.
    """
    image = read_metadata(folder)
    dtype = _dtype(image.array)
    _check_size(folder, image, dtype)
    voxels = _voxels(image, dtype)
    others = tuple(axis for axis in range(voxels.ndim) if axis not in image.spatial)
    shape = tuple(image.shape[axis] for axis in image.spatial)
    return Scan(voxels.transpose(*image.spatial, *others).reshape(shape), image.affine, image.repairs)


def _dtype(array: dict[str, Any]) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = np.dtype(array["dtype"] if array["zarr_format"] == 2 else array["data_type"])
    except (KeyError, TypeError, ValueError):
        raise Rejected(Reason.UNREADABLE, "the metadata of level 0 give no known type of number") from None
    if dtype.kind not in "iuf" or dtype.itemsize > 8 or dtype.subdtype is not None:
        raise Rejected(Reason.NOT_3D, f"voxels of type {dtype.name}, expected one real number in each")
    _check_codecs(array)
    return dtype


def _check_codecs(array: dict[str, Any]) -> None:
    if array["zarr_format"] == 2:
        filters = array.get("filters") or []
        chain = [array.get("compressor"), *(filters if isinstance(filters, list) else [filters])]
        names = [codec.get("id") if isinstance(codec, dict) else codec for codec in chain if codec is not None]
        known = _PLAIN_CODECS
    else:
        names, known = _names_3(array.get("codecs")), _CODECS_3
    # What an extension does to the bytes is not known either.
    if array.get("storage_transformers") or not all(isinstance(name, str) and name in known for name in names):
        raise Rejected(Reason.UNREADABLE, "level 0 is compressed in a way that is not known here")


def _names_3(codecs: Any) -> list[Any]:
    """Names of a chain of codecs, those within shards too."""
    if not isinstance(codecs, list):
        return [None]
    names = []
    for codec in codecs:
        names.append(codec.get("name") if isinstance(codec, dict) else codec)
        inner = codec.get("configuration") if isinstance(codec, dict) else None
        if isinstance(inner, dict):
            names += [name for key in ("codecs", "index_codecs") if key in inner for name in _names_3(inner[key])]
    return names


def _check_size(folder: Path, image: Image, dtype: np.dtype[Any]) -> None:
    """Refuse what promises more than its files can hold, before memory is asked for it."""
    try:
        stored = 0
        for name in files_below(folder, image.level):
            found = os.stat(folder / name)
            if not stat.S_ISREG(found.st_mode):
                raise Rejected(Reason.UNREADABLE, "a chunk is a pipe, a socket or a device, no file")
            stored += found.st_size
        largest = max(math.prod(chunk) for chunk in [image.shape, *_chunk_shapes(image.array)])
    except OSError as error:
        raise reading_failed(error, "level 0 cannot be read") from None
    except (KeyError, TypeError, ValueError):
        raise Rejected(Reason.UNREADABLE, "the metadata of level 0 give no chunks") from None
    if largest * dtype.itemsize > max(_SMALL, stored * _LARGEST_RATIO):
        raise Rejected(Reason.UNREADABLE, "the metadata promise more voxels than the files can hold")


def _chunk_shapes(array: dict[str, Any]) -> list[list[int]]:
    if array["zarr_format"] == 2:
        shapes = [array["chunks"]]
    else:
        shapes = [array["chunk_grid"]["configuration"]["chunk_shape"]]
        shapes += [codec["configuration"]["chunk_shape"] for codec in array["codecs"] if _is_sharding(codec)]
    for shape in shapes:
        if len(shape) != len(array["shape"]) or not all(type(size) is int and size > 0 for size in shape):
            raise ValueError("chunks")
    return shapes


def _is_sharding(codec: Any) -> bool:
    return isinstance(codec, dict) and codec.get("name") == "sharding_indexed"


def _voxels(image: Image, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Read with a fill value of ours: where it shows, a second one tells a voxel of that value from a missing chunk."""
    low, high = (np.iinfo(dtype).min, np.iinfo(dtype).max) if dtype.kind in "iu" else (-1.5, -2.5)
    voxels = _filled(image, low)
    suspects = voxels == low
    if suspects.any():
        missing = int((suspects & (_filled(image, high) == high)).sum())
        if missing:
            detail = f"chunks of level 0 are missing: {missing} of {voxels.size} voxels are not there"
            raise Rejected(Reason.UNREADABLE, detail)
    return voxels


def _filled(image: Image, fill: float) -> NDArray[Any]:
    from zarr import Array
    from zarr.storage import LocalStore, StorePath

    try:
        array = Array.from_dict(StorePath(LocalStore(image.level, read_only=True)), image.array | {"fill_value": fill})
        return np.asarray(array[...])
    except Exception as error:
        raise reading_failed(error, "the voxels of level 0 cannot be decoded") from None
