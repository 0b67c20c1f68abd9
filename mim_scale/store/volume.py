"""A CT volume as the store holds it: int16 Hounsfield units, one orientation, real spacing, and the patient's frame.

Axis 0 (z) runs towards Superior, axis 1 (y) towards Anterior, axis 2 (x) towards Right. A tilted acquisition keeps its
tilt in the affine; it is never resampled away.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mim_scale.errors import StoreError
from mim_scale.store.geometry import Size3, Spacing3, size3

AIR_HU = -1024
"""What padding, inside scanners' files or around small volumes, becomes."""

FORBIDDEN_HU = -32768
"""The arrays' fill value: no stored voxel may have it, so that a voxel never written cannot pass for one."""

_AFFINE_DECIMALS = 5


@dataclass(frozen=True)
class Volume:
    """One CT volume."""

    voxels: NDArray[np.int16]
    """HU, (z, y, x)."""
    spacing_mm: Spacing3
    """(z, y, x)."""
    affine: NDArray[np.float64]
    """4x4: voxel index (x, y, z, 1) -> RAS millimetres."""

    @property
    def shape(self) -> Size3:
        """Voxels along (z, y, x)."""
        return size3(self.voxels.shape)


def check_volume(volume: Volume) -> None:
    """Refuse what the store cannot hold.

    Raises:
        StoreError: not a 3D int16 array, no voxels, a spacing that is not positive or that the
            affine contradicts, a voxel of the forbidden value.
    """
    voxels = volume.voxels
    if voxels.dtype != np.int16 or voxels.ndim != 3 or 0 in voxels.shape:
        raise StoreError(f"a volume is a 3D int16 array with voxels, got {voxels.dtype} of shape {voxels.shape}")
    if not all(np.isfinite(spacing) and spacing > 0 for spacing in volume.spacing_mm):
        raise StoreError(f"a volume's spacing is positive millimetres, got {volume.spacing_mm}")
    if volume.affine.shape != (4, 4) or not np.isfinite(volume.affine).all():
        raise StoreError("a volume's affine is a finite 4x4 matrix")
    steps = np.linalg.norm(volume.affine[:3, :3], axis=0)[::-1]
    if not np.allclose(steps, volume.spacing_mm, rtol=1e-3):
        raise StoreError(
            f"a volume's affine steps by {steps.tolist()} mm (z, y, x), its spacing is {volume.spacing_mm}"
        )
    if voxels.min() == FORBIDDEN_HU:
        raise StoreError(f"a volume holds {FORBIDDEN_HU}, which marks voxels never written: map it to {AIR_HU}")


def content_hash(volume: Volume, voxels: str | None = None) -> str:
    """SHA-256, as hex, over shape, spacing, affine (rounded to 1e-5) and voxel_hash; the same on any machine.

    Args:
        voxels: The volume's voxel_hash, where it is known already: the voxels are then not read again.
    """
    digest = hashlib.sha256(b"mim-scale volume 2\n")
    digest.update(np.asarray(volume.shape, "<i8").tobytes())
    numbers = np.concatenate([np.asarray(volume.spacing_mm), volume.affine.ravel()])
    # Adding 0 turns -0.0 into 0.0, which is equal but has other bytes.
    digest.update((np.round(numbers, _AFFINE_DECIMALS) + 0.0).astype("<f8").tobytes())
    digest.update(bytes.fromhex(voxel_hash(volume) if voxels is None else voxels))
    return digest.hexdigest()


def voxel_hash(volume: Volume) -> str:
    """SHA-256, as hex, over shape and voxels alone: equal for copies that tell another spacing or place."""
    digest = hashlib.sha256(b"mim-scale voxels 1\n")
    digest.update(np.asarray(volume.shape, "<i8").tobytes())
    digest.update(np.ascontiguousarray(volume.voxels, "<i2").data)
    return digest.hexdigest()


def hu_histogram(voxels: NDArray[np.int16], edges: Sequence[int]) -> tuple[int, ...]:
    """Voxels in each bin between edges of equal distance; values outside count in the first or the last bin.

    Args:
        edges: At most 257, less than 32768 apart from first to last.
    """
    first, width = np.int16(edges[0]), np.int16(edges[1] - edges[0])
    num_bins = len(edges) - 1
    # Two neighbours are counted as one pair of bytes: half as many steps.
    pairs = np.zeros(1 << 16, np.int64)
    counts = np.zeros(1 << 8, np.int64)
    # A slice at a time: what is computed stays in the processor's cache.
    for plane in voxels.reshape(len(voxels), -1):
        bins = ((np.clip(plane, first, edges[-1] - 1) - first) // width).astype(np.uint8)
        even = len(bins) // 2 * 2
        pairs += np.bincount(bins[:even].view(np.uint16), minlength=len(pairs))
        counts[bins[even:]] += 1
    square = pairs.reshape(1 << 8, 1 << 8)
    counts += square.sum(0) + square.sum(1)
    return tuple(int(count) for count in counts[:num_bins])


def volume_key(content: str) -> str:
    """A volume's name in its store: the first 16 hex digits of its content hash."""
    return content[:16]
