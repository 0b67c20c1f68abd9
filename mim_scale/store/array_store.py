"""Voxels to disk and back, every byte checked: the only module that knows the array library.

A box is read only from chunks that exist and whose checksum holds. Anything else is a DamagedError with volume, level
and chunk, never a fill value. The layout is FORMAT.md's; array_format.py writes it down for machines.
"""

import errno
import functools
import itertools
import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from mim_scale.commit import new_folder, publish_folder, remove
from mim_scale.errors import DamagedError, StoreError
from mim_scale.store.array_format import (
    FORMAT_VERSION,
    INNER_CHUNK,
    NUM_LEVELS,
    array_metadata,
    group_metadata,
    metadata_bytes,
    shard_shape,
)
from mim_scale.store.geometry import Box, Size3, blocks, level_geometry, num_voxels, size3, whole_box
from mim_scale.store.volume import FORBIDDEN_HU, Volume, check_volume

METADATA = "zarr.json"


def write_volume(folder: Path, volume: Volume, levels: list[NDArray[np.int16]] | None = None) -> int:
    """Write a volume and its coarser levels, published whole under its final name; what stood there is replaced.

    Args:
        levels: The volume's pyramid, where it is known already.

    Returns:
        Bytes on disk.

    Raises:
        StoreError: the volume cannot be stored (check_volume says why).
    """
    check_volume(volume)
    temporary = new_folder(folder)
    try:
        metadata = group_metadata(volume.shape, volume.spacing_mm, volume.affine.ravel().tolist())
        (temporary / METADATA).write_bytes(metadata_bytes(metadata))
        for level, voxels in enumerate(levels or pyramid(volume)):
            _write_level(temporary / str(level), voxels)
        publish_folder(temporary, folder)
    finally:
        remove(temporary)
    return folder_bytes(folder)


def pyramid(volume: Volume) -> list[NDArray[np.int16]]:
    """The voxels of every stored level, finest first."""
    levels = [volume.voxels]
    geometry = level_geometry(volume.shape, volume.spacing_mm, NUM_LEVELS)
    for (_, before), (_, after) in itertools.pairwise(geometry):
        factor = size3(b // a for a, b in zip(before, after, strict=True))
        levels.append(halve(levels[-1], factor))
    return levels


def halve(voxels: NDArray[np.int16], factor: Size3) -> NDArray[np.int16]:
    """Means of blocks of `factor` voxels (1 or 2 per axis), rounded half up; a last half block repeats its edge."""
    # A slab at a time: the sums stay in the processor's cache.
    slabs = [_halve_slab(voxels[start : start + _SLAB], factor) for start in range(0, len(voxels), _SLAB)]
    return np.concatenate(slabs)


_SLAB = 8
"""Slices summed at once; even, so that no pair is cut."""


def _halve_slab(voxels: NDArray[np.int16], factor: Size3) -> NDArray[np.int16]:
    total = voxels.astype(np.int32)
    for axis, by in enumerate(factor):
        if by == 1:
            continue
        if total.shape[axis] % 2:
            total = np.concatenate([total, np.take(total, [-1], axis)], axis)
        even, odd = (_every_second(axis, first) for first in (0, 1))
        total = total[even] + total[odd]
    count = num_voxels(factor)
    # The shift divides by 1, 2, 4 or 8 and rounds down, also below zero.
    return ((total + count // 2) >> (count.bit_length() - 1)).astype(np.int16)


def _every_second(axis: int, first: int) -> tuple[slice, ...]:
    return tuple(slice(first, None, 2) if other == axis else slice(None) for other in range(3))


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(os.path.getsize(os.path.join(root, name)) for root, _, names in os.walk(folder) for name in names)


class VolumeReader:
    """Boxes of one stored volume. Opens files at the first read; safe to share between threads.

    Args:
        folder: The volume's folder, volumes/<key>.zarr.
        key: Its key, for messages.
        shape: Its shape at level 0, by the manifest.
    """

    def __init__(self, folder: Path, key: str, shape: Size3) -> None:
        self._folder = folder
        self._key = key
        self._shape = shape
        self._lock = threading.Lock()
        self._arrays: dict[int, Any] = {}
        self._level_shapes: tuple[Size3, ...] | None = None

    @property
    def level_shapes(self) -> tuple[Size3, ...]:
        """Shape of every level, finest first.

        Raises:
            DamagedError: the volume's metadata is missing, unreadable or contradicts itself or the manifest.
        """
        if self._level_shapes is None:
            self._level_shapes = self._read_level_shapes()
        return self._level_shapes

    def read_box(self, level: int, box: Box) -> NDArray[np.int16]:
        """The voxels of a box, int16 HU (z, y, x).

        Args:
            box: In voxels of that level, inside the volume.

        Raises:
            DamagedError: a chunk that the box touches is missing or fails its checksum; names volume, level and chunk.
        """
        if not box.is_inside(self.level_shapes[level]):
            raise ValueError(f"box {box} is not inside level {level} of shape {self.level_shapes[level]}")
        array = self._array(level)
        try:
            voxels: NDArray[np.int16] = array[box.slices].read().result()
        except (ValueError, OSError) as error:
            raise self._damage(level, box, error) from None
        if (voxels == FORBIDDEN_HU).any():
            raise self._damage(level, box, ValueError("holds voxels that were never written"))
        return voxels

    def metadata(self) -> dict[str, Any]:
        """The volume's own zarr.json.

        Raises:
            DamagedError: it is missing or unreadable.
        """
        return self._read_json(self._folder / METADATA, "metadata")

    def _read_level_shapes(self) -> tuple[Size3, ...]:
        found = self.metadata()
        try:
            own = found["attributes"]["mim_scale"]
            matrix = [float(number) for row in own["affine"] for number in row]
            z, y, x = (float(spacing) for spacing in own["spacing_mm"])
            expected = group_metadata(self._shape, (z, y, x), matrix)
            version = own["format_version"]
        except (KeyError, TypeError, ValueError):
            raise self._damaged("metadata is incomplete") from None
        if version != FORMAT_VERSION:
            raise StoreError(f"volume {self._key}: format version {version}, this program reads {FORMAT_VERSION}")
        if found != expected:
            raise self._damaged("metadata contradicts itself or the manifest")
        return tuple(shape for shape, _ in level_geometry(self._shape, (z, y, x), NUM_LEVELS))

    def _array(self, level: int) -> Any:
        shape = self.level_shapes[level]
        with self._lock:
            if level not in self._arrays:
                folder = self._folder / str(level)
                metadata = self._read_json(folder / METADATA, f"level {level}: metadata")
                if metadata != array_metadata(shape):
                    raise self._damaged(f"level {level}: metadata is not what FORMAT.md fixes for shape {list(shape)}")
                try:
                    self._arrays[level] = _open(folder)
                except (ValueError, OSError) as error:
                    raise self._damaged(f"level {level}: cannot be opened: {_reason(error)}") from None
            return self._arrays[level]

    def _read_json(self, path: Path, what: str) -> dict[str, Any]:
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise self._damaged(f"{what} is missing") from None
        except (ValueError, OSError):
            raise self._damaged(f"{what} is unreadable") from None
        if not isinstance(values, dict):
            raise self._damaged(f"{what} is unreadable")
        return values

    def _damage(self, level: int, box: Box, error: Exception) -> DamagedError:
        """Find the chunks that cannot be read, by reading each alone."""
        found: list[tuple[Size3, str]] = []
        for index, part in blocks(box, INNER_CHUNK):
            try:
                if (self._array(level)[part.slices].read().result() == FORBIDDEN_HU).any():
                    found.append((index, "holds voxels that were never written"))
            except (ValueError, OSError) as chunk_error:
                found.append((index, _reason(chunk_error)))
        if not found:
            return self._damaged(f"level {level}: {_reason(error)}, but not at a second look: check the disk")
        index, reason = found[0]
        shards = shard_shape(self.level_shapes[level])
        shard = "/".join(str(i * inner // size) for i, inner, size in zip(index, INNER_CHUNK, shards, strict=True))
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        return self._damaged(f"level {level}, chunk {index}{more} (file {level}/c/{shard}): {reason}")

    def _damaged(self, what: str) -> DamagedError:
        return DamagedError(f"volume {self._key}: {what}; run `mim-scale data verify`, and build this volume again")


@functools.cache
def _context() -> Any:
    """Shared by all readers of a process: no cache, since random boxes seldom meet a chunk twice."""
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": False})


def _open(folder: Path) -> Any:
    spec = {
        "driver": "zarr3",
        # The library takes no path with "..".
        "kvstore": {"driver": "file", "path": f"{os.path.abspath(folder)}/"},
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }
    return ts.open(spec, context=_context(), open=True).result()


def _write_level(folder: Path, voxels: NDArray[np.int16]) -> None:
    shape = size3(voxels.shape)
    folder.mkdir()
    (folder / METADATA).write_bytes(metadata_bytes(array_metadata(shape)))
    array = _open(folder)
    for _, shard in blocks(whole_box(shape), shard_shape(shape)):
        # One transaction a shard: the file is encoded and written once.
        try:
            with ts.Transaction() as transaction:
                part = array.with_transaction(transaction)[shard.slices]
                # Nobody changes these voxels before they are on disk: no copy of them is needed.
                part.write(voxels[shard.slices], can_reference_source_data_indefinitely=True).result()
        except (ValueError, OSError) as error:
            raise StoreError(
                f"{folder.parent.parent}: a volume cannot be written ({_cause(error)}); make room there, build again"
            ) from None


def _cause(error: Exception) -> str:
    """Why a file could not be written, in the system's words where the array library passes them on."""
    known = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return next((words for words in map(os.strerror, known) if words in str(error)), _reason(error))


def _reason(error: Exception) -> str:
    """What the array library says, without code and machine paths, in one line."""
    text = " ".join(str(error).split())
    if text.startswith("NOT_FOUND"):
        return "is missing"
    if "Error decoding shard index" in text:
        return "the index of its file fails its checksum"
    if "Digest mismatch" in text:
        return "fails its checksum"
    if "blosc" in text.lower():
        return "fails to decode"
    text = re.sub(r'(in )?local file "[^"]*":? ?', "", text)
    return re.sub(r"\s*\[(source|tensorstore).*$", "", text)[:200]
