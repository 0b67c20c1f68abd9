"""A few kilobytes that tell copies of a CT volume, however cut, turned, resampled or windowed. Pure.

A fingerprint is a set of local marks: places where the soft-tissue picture, seen at about 10 mm, is a blob or a hole,
each with 128 comparisons of its surroundings. Marks are few, spread over the volume, and the same ones in a crop. Each
has its own frame, one of the 48 ways to name and point three axes, so a volume that was flipped keeps its marks.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from mim_scale.store.geometry import Spacing3
from mim_scale.store.volume import Volume

VERSION = 1
MOST_MARKS = 256
BITS = 128
_WINDOW_HU = (-160, 240)
"""What any window for soft tissue keeps: beyond it, copies may have lost everything."""
CELL_MM = 4.0
_BLUR_MM = 5.0
"""Standard deviation of the picture that marks are looked for in, the voxels' own width included."""
_BLOB_MM = 5.0
_FRAME_MM = 8.0
_REACH_CELLS = 4
_BORDER_MM = 10.0
_LEAST_BLOB_HU = 2.0
_AIR_MARGIN_HU = 20
_ROOM_MM = 32.0
_MOST_PLACES = 6000
_NEIGHBOURS = 12

FRAMES = np.array(
    [
        np.diag(signs)[list(axes)]
        for axes in itertools.permutations(range(3))
        for signs in itertools.product((1, -1), repeat=3)
    ],
    np.int8,
)
"""48x3x3: rows are the axes of a frame, in terms of the volume's (z, y, x)."""

_MARK = np.dtype([("at", "<i2", 3), ("frame", "u1"), ("bits", "u1", BITS // 8)])


@dataclass(frozen=True)
class Marks:
    """A fingerprint, unpacked."""

    at_mm: NDArray[np.int16]
    """Nx3: from the centre of the first voxel, (z, y, x)."""
    frame: NDArray[np.uint8]
    """N: index into FRAMES."""
    bits: NDArray[np.uint64]
    """Nx2: 128 comparisons."""

    def __len__(self) -> int:
        return len(self.frame)


def volume_fingerprint(volume: Volume) -> bytes:
    """The fingerprint of a volume in HU; equal for equal voxels and spacing."""
    return fingerprint_of(volume.voxels, volume.spacing_mm)


def fingerprint_of(voxels: NDArray[Any], spacing_mm: Spacing3) -> bytes:
    """The fingerprint of voxels (z, y, x) in HU of any real type."""
    picture, start_mm = _picture(voxels, spacing_mm)
    at, strength = _blobs(picture)
    frame, clear = _frames(picture, at)
    chosen = _spread(at, strength * clear)
    at, frame = at[chosen], frame[chosen]
    marks = np.zeros(len(at), _MARK)
    marks["at"] = np.rint(at * CELL_MM + start_mm)
    marks["frame"] = frame
    marks["bits"] = np.packbits(_comparisons(picture, at, frame), axis=1)
    return bytes([VERSION]) + marks.tobytes()


def unpack(fingerprint: bytes) -> Marks:
    """What is in a fingerprint.

    Raises:
        ValueError: it is none, or one of another version.
    """
    if not fingerprint or fingerprint[0] != VERSION or (len(fingerprint) - 1) % _MARK.itemsize:
        raise ValueError("no volume fingerprint of this version")
    marks = np.frombuffer(fingerprint, _MARK, offset=1)
    return Marks(marks["at"].copy(), marks["frame"].copy(), np.ascontiguousarray(marks["bits"]).view("<u8"))


def _picture(voxels: NDArray[Any], spacing_mm: Spacing3) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Soft-tissue HU on a grid of CELL_MM, blurred to _BLUR_MM, and how far its first cell is from the first voxel."""
    # Whole blocks of voxels first: most of the work is then done on an eighth of the data or less.
    by = [max(1, int(3.0 / step)) if size >= 16 else 1 for step, size in zip(spacing_mm, voxels.shape, strict=True)]
    small = _block_means(voxels, by)
    steps = [step * k for step, k in zip(spacing_mm, by, strict=True)]
    small, first = _without_air(small, steps)
    picture = small
    # The axis that shrinks most goes first: the others then have less to do.
    for axis in sorted(range(3), key=lambda axis: steps[axis]):
        picture = _resampled(picture, axis, steps[axis])
    # The centre of the first block lies (k - 1) / 2 voxels from that of the first voxel.
    return picture, np.array([n * s + (s - s / k) / 2 for n, s, k in zip(first, steps, by, strict=True)])


def _resampled(small: NDArray[np.float32], axis: int, step: float) -> NDArray[np.float32]:
    """Blurred to _BLUR_MM along one axis of this step in mm, then read off every CELL_MM between its cells."""
    sigma = np.sqrt(max(_BLUR_MM**2 - step**2 / 12, 0.0)) / step
    blurred = ndimage.gaussian_filter1d(small, sigma, axis, mode="nearest", truncate=3.0)
    last = small.shape[axis] - 1
    places = np.arange(int(last * step // CELL_MM) + 1) * (CELL_MM / step)
    before = places.astype(np.int64)
    after = np.minimum(before + 1, last)
    share = (places - before).astype(np.float32).reshape([-1 if other == axis else 1 for other in range(3)])
    low = np.take(blurred, before, axis)
    read_off: NDArray[np.float32] = low + (np.take(blurred, after, axis) - low) * share
    return read_off


def _without_air(small: NDArray[np.float32], steps: list[float]) -> tuple[NDArray[np.float32], list[int]]:
    """The box around what is no air, with room for every blur, and its first block: air is flat and says nothing."""
    is_tissue = small > _WINDOW_HU[0] + _AIR_MARGIN_HU
    box, first = [], []
    for axis, step in enumerate(steps):
        places = np.flatnonzero(is_tissue.any(tuple(other for other in range(3) if other != axis)))
        room = int(np.ceil(_ROOM_MM / step))
        low = max(int(places[0]) - room, 0) if len(places) else 0
        box.append(slice(low, int(places[-1]) + room + 1 if len(places) else 1))
        first.append(low)
    return np.ascontiguousarray(small[tuple(box)]), first


def _block_means(voxels: NDArray[Any], by: list[int]) -> NDArray[np.float32]:
    """Means of whole blocks of voxels, each clipped to the window; a last, broken block is left out."""
    low, high = _WINDOW_HU
    shape = [size // k for size, k in zip(voxels.shape, by, strict=True)]
    count = by[0] * by[1] * by[2]
    # The narrowest type that holds the sum of a block: each pass over a slab is then as short as it can be.
    fits = voxels.dtype == np.int16 and count * max(-low, high) <= np.iinfo(np.int16).max
    kind: type[np.generic] = np.int16 if fits else np.int32 if voxels.dtype.kind in "iu" else np.float32
    means = np.empty(shape, np.float32)
    for z in range(shape[0]):
        slab = np.clip(voxels[z * by[0] : (z + 1) * by[0], : shape[1] * by[1], : shape[2] * by[2]], low, high)
        rows = slab.sum(0, dtype=kind)
        rows = sum((rows[k :: by[1]] for k in range(1, by[1])), rows[:: by[1]])
        means[z] = sum((rows[:, k :: by[2]] for k in range(1, by[2])), rows[:, :: by[2]])
    return means / np.float32(count)


def _blobs(picture: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Places (in cells, between cells) where the picture differs most from its surroundings, and by how much."""
    blob = picture - ndimage.gaussian_filter(picture, _BLOB_MM * 1.2 / CELL_MM, mode="nearest", truncate=3.0)
    is_peak = ((blob == _extremes(blob, np.maximum)) & (blob > _LEAST_BLOB_HU)) | (
        (blob == _extremes(blob, np.minimum)) & (blob < -_LEAST_BLOB_HU)
    )
    border = int(np.ceil(_BORDER_MM / CELL_MM))
    inner = np.zeros_like(is_peak)
    inner[tuple(slice(min(border, n // 3), n - min(border, n // 3)) for n in blob.shape)] = True
    index = np.argwhere(is_peak & inner)
    at = index.astype(np.float64)
    for axis in range(3):
        if blob.shape[axis] < 3:
            continue
        step = np.eye(3, dtype=int)[axis]
        i = np.clip(index, 1, np.array(blob.shape) - 2)
        before, here, after = (blob[tuple((i + k * step).T)] for k in (-1, 0, 1))
        bend = before - 2 * here + after
        shift = np.where(np.abs(bend) > 1e-6, (before - after) / (2 * np.where(bend == 0, 1, bend)), 0)
        at[:, axis] += np.clip(shift, -0.5, 0.5)
    return at, np.abs(blob[tuple(index.T)]).astype(np.float64)


def _extremes(blob: NDArray[np.float32], pick: np.ufunc) -> NDArray[np.float32]:
    """The highest or the lowest of each cell and its 26 neighbours."""
    found = np.pad(blob, 1, mode="edge")
    for axis in range(3):
        first, second, third = (
            tuple(slice(k, found.shape[other] - 2 + k) if other == axis else slice(None) for other in range(3))
            for k in range(3)
        )
        found = pick(pick(found[first], found[second]), found[third])
    return found


def _frames(picture: NDArray[np.float32], at: NDArray[np.float64]) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Of each place the frame whose axes follow the slope, steepest first, and how clear that choice is (0 to 1)."""
    sigma = _FRAME_MM / CELL_MM
    slopes = np.empty((len(at), 3))
    for axis in range(3):
        order = [int(axis == other) for other in range(3)]
        slope = ndimage.gaussian_filter(picture, sigma, order, mode="nearest", truncate=3.0)
        slopes[:, axis] = ndimage.map_coordinates(slope, at.T, order=1, mode="nearest")
    size = np.abs(slopes)
    axes = np.argsort(-size, axis=1, kind="stable")
    ranked = np.take_along_axis(size, axes, 1)
    gaps = np.stack([ranked[:, 0] - ranked[:, 1], ranked[:, 1] - ranked[:, 2], ranked[:, 2]], 1)
    clear = gaps.min(1) / (np.linalg.norm(slopes, axis=1) + 1e-9)
    signs = np.where(np.take_along_axis(slopes, axes, 1) < 0, -1, 1)
    wanted = np.zeros((len(at), 3, 3), np.int8)
    np.put_along_axis(wanted, axes[:, :, None], signs[:, :, None].astype(np.int8), axis=2)
    return _FRAME_INDEX[_frame_code(wanted)], np.minimum(clear / 0.15, 1.0)


def _frame_code(frames: NDArray[np.int8]) -> NDArray[np.int64]:
    weights = 3 ** np.arange(9).reshape(3, 3)
    code: NDArray[np.int64] = ((frames.astype(np.int64) + 1) * weights).sum((1, 2))
    return code


_FRAME_INDEX = np.zeros(3**9, np.uint8)
_FRAME_INDEX[_frame_code(FRAMES)] = np.arange(48)


def _spread(at: NDArray[np.float64], strength: NDArray[np.float64]) -> NDArray[np.int64]:
    """The places farthest from any stronger one: spread evenly, and in a crop those of the whole that it holds."""
    order = np.argsort(-strength, kind="stable")[:_MOST_PLACES]
    at = at[order]
    reach = np.full(len(at), np.inf)
    if len(at) > 1:
        # Among its nearest places nearly every one has a stronger one; the few that do not look at all of these.
        _, near = cKDTree(at).query(at, min(_NEIGHBOURS, len(at)))
        is_stronger = near < np.arange(len(at))[:, None]
        distances = ((at[near] - at[:, None]) ** 2).sum(2)
        reach = np.where(is_stronger, distances, np.inf).min(1)
        for i in np.flatnonzero(~is_stronger.any(1))[1:]:
            reach[i] = ((at[:i] - at[i]) ** 2).sum(1).min()
    return order[np.sort(np.argsort(-reach, kind="stable")[:MOST_MARKS])]


def _offsets() -> NDArray[np.float64]:
    line = np.arange(-_REACH_CELLS, _REACH_CELLS + 1, 2)
    return np.stack(np.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3).astype(np.float64)


def _pairs(count: int) -> NDArray[np.int64]:
    """Which samples are compared: fixed pairs, drawn once by a fixed recurrence."""
    pairs: list[tuple[int, int]] = []
    state = 12345
    while len(pairs) < BITS:
        state = (state * 1103515245 + 12345) % 2**31
        a = (state >> 8) % count
        state = (state * 1103515245 + 12345) % 2**31
        b = (state >> 8) % count
        if a != b and (a, b) not in pairs and (b, a) not in pairs:
            pairs.append((a, b))
    return np.array(pairs)


_OFFSETS = _offsets()
_PAIRS = _pairs(len(_OFFSETS))


def _comparisons(picture: NDArray[np.float32], at: NDArray[np.float64], frame: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """NxBITS: in each mark's own frame, whether one sample around it is brighter than another."""
    places = at[:, None, :] + _OFFSETS @ FRAMES[frame].astype(np.float64)
    samples = ndimage.map_coordinates(picture, np.moveaxis(places, 2, 0), order=1, mode="nearest")
    # The slope set the frame, so it says nothing more: without it marks along one edge would look alike.
    samples -= samples @ _OFFSETS @ _OFFSETS.T / (_OFFSETS**2).sum(0)[0]
    brighter: NDArray[np.bool_] = samples[:, _PAIRS[:, 0]] > samples[:, _PAIRS[:, 1]]
    return brighter
