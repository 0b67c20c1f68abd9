"""Every byte of a stored volume as it lies on disk: metadata, indexes, checksums of chunks; nothing is decoded."""

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from mim_scale.store.array_format import (
    INNER_CHUNK,
    NUM_LEVELS,
    array_metadata,
    group_metadata,
    metadata_bytes,
    shard_shape,
)
from mim_scale.store.array_store import METADATA
from mim_scale.store.geometry import Size3, blocks, level_geometry, num_voxels, size3, whole_box
from mim_scale.store.manifest import Row

_CRC_BYTES = 4
_ABSENT = 2**64 - 1
"""Offset and size of a chunk that is not in its shard."""

_local = threading.local()


@dataclass(frozen=True)
class Fault:
    """One thing of a volume that is not as it was written."""

    level: int
    """-1 where it is not one level."""
    file: str
    """Relative to the volume's folder; empty where it is the folder."""
    what: str
    """A few words; names the chunk, (z, y, x) in the grid of chunks, where it is one."""


def raw_faults(folder: Path, row: Row) -> Iterator[Fault]:
    """Everything that is wrong with a volume's bytes, each of which is looked at.

    Args:
        folder: volumes/<key>.zarr.
        row: Its row of the manifest.
    """
    if not folder.is_dir():
        yield Fault(-1, "", "its folder is missing")
        return
    expected = {METADATA: (-1, metadata_bytes(group_metadata(row.shape, row.spacing_mm, row.affine)))}
    shards: dict[str, tuple[int, Size3, Size3]] = {}
    for level, (shape, _) in enumerate(level_geometry(row.shape, row.spacing_mm, NUM_LEVELS)):
        expected[f"{level}/{METADATA}"] = (level, metadata_bytes(array_metadata(shape)))
        for index, _ in blocks(whole_box(shape), shard_shape(shape)):
            shards[f"{level}/c/{index[0]}/{index[1]}/{index[2]}"] = (level, shape, index)
    for name, (level, text) in expected.items():
        yield from _metadata_faults(folder, name, level, text)
    for name, (level, shape, index) in shards.items():
        yield from _shard_faults(folder / name, name, level, shape, index)
    for name in sorted(_files(folder) - expected.keys() - shards.keys()):
        yield Fault(-1, name, "does not belong to it")


def _files(folder: Path) -> set[str]:
    """All that lies below a folder and is no folder, relative to it."""
    return {
        os.path.relpath(os.path.join(root, name), folder)
        for root, folders, names in os.walk(folder)
        for name in [*names, *(name for name in folders if os.path.islink(os.path.join(root, name)))]
    }


def _metadata_faults(folder: Path, name: str, level: int, expected: bytes) -> Iterator[Fault]:
    where = "metadata" if level < 0 else f"level {level}: metadata"
    try:
        found = (folder / name).read_bytes()
    except FileNotFoundError:
        yield Fault(level, name, f"{where} is missing")
    except OSError as error:
        yield Fault(level, name, f"{where} cannot be read ({error.strerror})")
    else:
        if found != expected:
            yield Fault(level, name, f"{where} is not what FORMAT.md fixes for this volume")


def _shard_faults(path: Path, name: str, level: int, shape: Size3, shard: Size3) -> Iterator[Fault]:
    """The faults of one shard: its index, how chunks fill the file, and the checksum of each chunk."""
    try:
        with open(path, "rb", buffering=0) as file:
            for chunk, what in _file_faults(file.fileno(), shape, shard):
                yield Fault(level, name, f"level {level}{f', chunk {chunk}' if chunk else ''} (file {name}): {what}")
    except FileNotFoundError:
        yield Fault(level, name, f"level {level} (file {name}): is missing")
    except OSError as error:
        yield Fault(level, name, f"level {level} (file {name}): cannot be read ({error.strerror})")


def _file_faults(file: int, shape: Size3, shard: Size3) -> Iterator[tuple[Size3 | None, str]]:
    """(the chunk's place in the level's grid, None where it is the file; what is wrong)."""
    size = os.fstat(file).st_size
    grid = size3(length // inner for length, inner in zip(shard_shape(shape), INNER_CHUNK, strict=True))
    index_size = 16 * num_voxels(grid) + _CRC_BYTES
    index = _read(file, index_size, size - index_size) if size >= index_size else None
    if index is None:
        yield None, f"is truncated to {size} bytes"
        return
    if not _holds(index):
        yield None, "its index fails its checksum"
        return
    first = [place * count for place, count in zip(shard, grid, strict=True)]
    end = 0
    # A copy: the next chunk that is read takes the place of these bytes.
    entries = index[:-_CRC_BYTES].view("<u8").reshape(-1, 2).copy()
    # In the order in which they lie, so that each must begin where the last one ended.
    for number in np.argsort(entries[:, 0], kind="stable"):
        chunk = size3(a + int(b) for a, b in zip(first, np.unravel_index(number, grid), strict=True))
        offset, length = (int(value) for value in entries[number])
        must_be = all(place * inner < limit for place, inner, limit in zip(chunk, INNER_CHUNK, shape, strict=True))
        if offset == length == _ABSENT:
            if must_be:
                yield chunk, "is missing"
            continue
        if not must_be:
            yield chunk, "lies outside the volume"
        if offset != end:
            yield chunk, f"begins at byte {offset}, expected {end}: chunks overlap, or bytes belong to none"
        end = offset + length
        if end > size - index_size or length < _CRC_BYTES:
            yield chunk, "reaches beyond the file"
            return
        if (found := _read(file, length, offset)) is None or not _holds(found):
            yield chunk, "fails its checksum"
    if end != size - index_size:
        yield None, f"{size - index_size - end} of its bytes belong to no chunk"


def _read(file: int, length: int, offset: int) -> NDArray[np.uint8] | None:
    """So many bytes; None where the file ends before. They are overwritten by this thread's next call."""
    held: NDArray[np.uint8] | None = getattr(_local, "buffer", None)
    if held is None or len(held) < length:
        # One buffer a thread, as large as the largest chunk: it stays in the processor's cache.
        _local.buffer = held = np.empty(max(length, 1 << 19), np.uint8)
    data, done = held[:length], 0
    while done < length:
        count = os.preadv(file, [data[done:].data], offset + done)
        if not count:
            return None
        done += count
    return data


def _holds(data: NDArray[np.uint8]) -> bool:
    """Whether bytes that end with their crc32c agree with it."""
    stated = int.from_bytes(data[-_CRC_BYTES:].tobytes(), "little")
    return int(google_crc32c.value(data[:-_CRC_BYTES])) == stated
