"""From a scan as read to a volume as stored: whole HU, one orientation, air where the scanner had nothing. Pure.

Axes are permuted and flipped, never interpolated, unless a spacing is asked for.
"""

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse

from data_pipeline.reasons import Reason, Rejected
from data_pipeline.screen import check_below_air
from data_pipeline.sources.source import Scan
from mim_scale.store.geometry import Spacing3
from mim_scale.store.volume import AIR_HU, Volume

_LARGEST_HU = 32767
_LARGEST_SHEAR = 1e-3
"""Cosine between two axes of the grid; a right angle has 0."""
_SPACING_RANGE_MM = (0.05, 20.0)
_SAME_SPACING = 1e-4
_SLAB_ACROSS = 8


def canonical(scan: Scan, spacing_mm: Spacing3 | None = None) -> tuple[Volume, tuple[str, ...]]:
    """Bring a scan to the store's conventions.

    Args:
        scan: voxels in HU, and where they lie.
        spacing_mm: resample to this spacing (z, y, x); None keeps the scan's own.

    Returns:
        The volume, and codes of what was changed, sorted.

    Raises:
        Rejected: no regular 3D grid, or values that are no HU.
    """
    check_grid(scan)
    repairs = set(scan.repairs)
    voxels, affine = _reorient(scan.voxels, scan.affine, repairs)
    hu = _whole_hu(voxels, repairs)
    x_mm, y_mm, z_mm = (float(step) for step in np.linalg.norm(affine[:3, :3], axis=0))
    volume = Volume(hu, (z_mm, y_mm, x_mm), affine)
    if spacing_mm is not None and not np.allclose(volume.spacing_mm, spacing_mm, rtol=_SAME_SPACING):
        volume = resample(volume, spacing_mm)
        repairs.add("resampled")
    return volume, tuple(sorted(repairs))


def check_grid(scan: Scan) -> None:
    """Raise Rejected where the voxels are no 3D array or the affine no plausible right-angled grid."""
    if scan.voxels.ndim != 3 or 0 in scan.voxels.shape:
        raise Rejected(Reason.NOT_3D, f"an array of shape {scan.voxels.shape}, expected 3 axes with voxels")
    matrix = scan.affine[:3, :3]
    if not np.isfinite(scan.affine).all():
        raise Rejected(Reason.NO_GEOMETRY, "the affine holds numbers that are not finite")
    steps = np.linalg.norm(matrix, axis=0)
    low, high = _SPACING_RANGE_MM
    if steps.min() < low or steps.max() > high:
        shown = ", ".join(f"{step:.4g}" for step in steps)
        raise Rejected(
            Reason.SPACING_IMPLAUSIBLE, f"voxels of {shown} mm, expected {low} to {high} mm along every axis"
        )
    cosines = (matrix / steps).T @ (matrix / steps) - np.eye(3)
    if np.abs(cosines).max() > _LARGEST_SHEAR:
        degrees = np.degrees(np.arcsin(min(np.abs(cosines).max(), 1.0)))
        raise Rejected(Reason.SHEARED_AFFINE, f"two axes of the grid are {degrees:.2f} degrees off a right angle")


def _reorient(
    voxels: NDArray[np.generic], affine: NDArray[np.float64], repairs: set[str]
) -> tuple[NDArray[np.generic], NDArray[np.float64]]:
    """Voxels as (z, y, x), and the affine from (x, y, z, 1), each axis as near to R, A, S as whole turns bring it."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    # Of the six ways to name the axes, the one nearest to R, A, S: independent of the order of axes in the file.
    axes = max(itertools.permutations(range(3)), key=lambda p: sum(abs(directions[i, p[i]]) for i in range(3)))
    turned = np.array(affine)
    turned[:, :3] = affine[:, list(axes)]
    array = voxels.transpose(axes)
    for axis in range(3):
        if turned[axis, axis] < 0:
            turned[:3, 3] += turned[:3, axis] * (array.shape[axis] - 1)
            turned[:3, axis] *= -1
            array = np.flip(array, axis)
    if axes != (0, 1, 2) or not np.array_equal(turned, affine):
        repairs.add("reoriented")
    return array.transpose(2, 1, 0), turned


def _whole_hu(voxels: NDArray[np.generic], repairs: set[str]) -> NDArray[np.int16]:
    """int16 HU in C order; below air becomes air.

    One pass over the source, a slab at a time, so that rounding, range and clamping find it in the processor's cache.
    """
    if voxels.dtype.kind not in "iuf":
        raise Rejected(Reason.NOT_3D, f"voxels of type {voxels.dtype}, expected real numbers")
    if voxels.dtype == np.int16 and voxels.dtype.isnative and voxels.flags.c_contiguous and voxels.min() >= AIR_HU:
        return voxels.astype(np.int16, copy=False)
    hu = np.empty(voxels.shape, np.int16)
    low = np.inf
    for place in _slabs(voxels):
        slab, result = voxels[place], hu[place]
        whole = np.rint(slab) if voxels.dtype.kind == "f" else slab
        slab_low, slab_high = float(whole.min()), float(whole.max())
        # A NaN makes both of them NaN, which no comparison holds for.
        if not (slab_low > -np.inf and slab_high <= _LARGEST_HU):
            raise _no_hu(voxels)
        if voxels.dtype.kind == "f" and "rounded" not in repairs and not np.array_equal(whole, slab):
            repairs.add("rounded")
        low = min(low, slab_low)
        if slab_low < AIR_HU:
            # Unsigned types cannot be here: their minimum is 0.
            np.maximum(whole, AIR_HU, out=result, casting="unsafe")
        else:
            result[...] = whole
    if low < AIR_HU:
        check_below_air(voxels)
        repairs.add("padding_mapped")
    return hu


def _slabs(voxels: NDArray[np.generic]) -> Iterator[tuple[slice, ...]]:
    """Slices along the axis that is outermost in memory, so that each line of memory is read once."""
    outermost = int(np.argmax(np.abs(voxels.strides)))
    # Where that is another axis than the result's, writes go across its lines: a few at once fill what they touch.
    step = 1 if outermost == 0 else _SLAB_ACROSS
    for start in range(0, voxels.shape[outermost], step):
        yield (slice(None),) * outermost + (slice(start, start + step),)


def _no_hu(voxels: NDArray[np.generic]) -> Rejected:
    """What is wrong with voxels that do not fit."""
    num_strange = int(sum(np.count_nonzero(~np.isfinite(slab)) for slab in voxels))
    if num_strange:
        return Rejected(Reason.NON_FINITE, f"{num_strange} voxels are NaN or infinite")
    return Rejected(Reason.HU_IMPLAUSIBLE, f"values up to {float(voxels.max()):g}: no HU")


def resample(volume: Volume, spacing_mm: Spacing3) -> Volume:
    """Trilinear, after a Gaussian where an axis gets coarser so that nothing aliases; the grid's first corner stays."""
    factors = np.array(spacing_mm) / np.array(volume.spacing_mm)
    along_z, along_y, along_x = (_axis_weights(*pair) for pair in zip(volume.shape, factors, strict=True))
    # Plane by plane: what an axis is turned for stays in the processor's cache; no float copy of the volume is made.
    planes = np.empty((volume.shape[0], along_y.shape[0], along_x.shape[0]), np.float32)
    for plane, voxels in zip(planes, volume.voxels, strict=True):
        narrow = along_y @ voxels.astype(np.float32)
        plane[...] = (along_x @ np.ascontiguousarray(narrow.T)).T
    values = (along_z @ planes.reshape(len(planes), -1)).reshape(-1, *planes.shape[1:])
    offset = factors / 2 - 0.5
    affine = np.array(volume.affine)
    affine[:3, 3] += volume.affine[:3, :3] @ offset[::-1]
    affine[:3, :3] *= factors[::-1]
    np.clip(np.rint(values, out=values), AIR_HU, _LARGEST_HU, out=values)
    return Volume(values.astype(np.int16), spacing_mm, affine)


def _axis_weights(size: int, factor: float) -> sparse.csr_array:
    """[new size, size] float32: what each new voxel of an axis takes of each old one; the edge repeats outside."""
    new_size = max(1, round(size / factor))
    # The centre of new voxel j lies at (j + 1/2) * factor - 1/2 in old voxels.
    centres = np.clip((np.arange(new_size) + 0.5) * factor - 0.5, 0, size - 1)
    low = np.minimum(np.floor(centres).astype(np.intp), max(size - 2, 0))
    share = centres - low
    linear = np.zeros((new_size, size))
    rows = np.arange(new_size)
    linear[rows, low] += 1 - share
    linear[rows, np.minimum(low + 1, size - 1)] += share
    if factor > 1:
        linear = linear @ ndimage.gaussian_filter1d(np.eye(size), (factor - 1) / 2, axis=0, mode="nearest")
    return sparse.csr_array(linear.astype(np.float32))
