"""The metadata of one stored volume, word for word as FORMAT.md fixes it: OME-Zarr 0.5 on Zarr v3.

Everything follows from shape, spacing and affine, so a reader compares what it finds with what must be there.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mim_scale.store.geometry import Size3, Spacing3, level_geometry, size3
from mim_scale.store.volume import FORBIDDEN_HU

FORMAT_VERSION = 3
"""Version of FORMAT.md; a store of another version is refused."""

NUM_LEVELS = 3
INNER_CHUNK: Size3 = (64, 64, 64)
"""Smallest block that is decoded and checked, in voxels."""

_SHARD_LIMIT = 256
_ENDIAN = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC = {"name": "crc32c"}
_CHUNK_BYTES = 2 * INNER_CHUNK[0] * INNER_CHUNK[1] * INNER_CHUNK[2]
_BLOSC = {
    "name": "blosc",
    # One block a chunk: in the smaller ones that blosc would choose, zstd finds less and works longer.
    "configuration": {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "typesize": 2, "blocksize": _CHUNK_BYTES},
}


def shard_shape(shape: Size3) -> Size3:
    """Voxels of one file: 256 along each axis, less where the volume is smaller, always whole inner chunks."""
    return size3(min(_SHARD_LIMIT, -(-size // inner) * inner) for size, inner in zip(shape, INNER_CHUNK, strict=True))


def array_metadata(shape: Size3) -> dict[str, Any]:
    """The zarr.json of one level of this shape."""
    sharding = {
        "chunk_shape": list(INNER_CHUNK),
        # crc32c comes last: it covers the bytes as they lie on disk.
        "codecs": [_ENDIAN, _BLOSC, _CRC],
        "index_codecs": [_ENDIAN, _CRC],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": "int16",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard_shape(shape))}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": FORBIDDEN_HU,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": ["z", "y", "x"],
        "attributes": {},
    }


def group_metadata(shape: Size3, spacing_mm: Spacing3, affine: Sequence[float]) -> dict[str, Any]:
    """The zarr.json of a volume: OME multiscale block, and our own block with direction matrix and affine.

    Args:
        affine: 16 numbers, row by row: voxel index (x, y, z, 1) -> RAS millimetres.
    """
    matrix = np.asarray(affine, dtype=np.float64).reshape(4, 4)
    datasets = []
    for level, (_, factor) in enumerate(level_geometry(shape, spacing_mm, NUM_LEVELS)):
        scale = [spacing * by for spacing, by in zip(spacing_mm, factor, strict=True)]
        # The centre of the first coarse voxel lies between the centres of the fine ones that it averages.
        shift = [spacing * (by - 1) / 2 for spacing, by in zip(spacing_mm, factor, strict=True)]
        origin = [float(matrix[2 - axis, 3]) + shift[axis] for axis in range(3)]
        datasets.append(
            {
                "path": str(level),
                "coordinateTransformations": [
                    {"type": "scale", "scale": scale},
                    {"type": "translation", "translation": origin},
                ],
            }
        )
    axes = [{"name": name, "type": "space", "unit": "millimeter"} for name in ("z", "y", "x")]
    multiscale = {"name": "ct", "axes": axes, "datasets": datasets, "type": "mean"}
    own = {
        "format_version": FORMAT_VERSION,
        "unit": "HU",
        "axes_point_to": ["superior", "anterior", "right"],
        "shape": list(shape),
        "spacing_mm": list(spacing_mm),
        "affine": matrix.tolist(),
        "direction": direction(matrix).tolist(),
    }
    return {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {"ome": {"version": "0.5", "multiscales": [multiscale]}, "mim_scale": own},
    }


def metadata_bytes(values: dict[str, Any]) -> bytes:
    """A zarr.json as it lies on disk, byte for byte."""
    return (json.dumps(values, indent=1) + "\n").encode()


def direction(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """3x3: unit vectors in RAS of the x, y and z axes, as columns."""
    axes = affine[:3, :3]
    return np.asarray(axes / np.linalg.norm(axes, axis=0), dtype=np.float64)
