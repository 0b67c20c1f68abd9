"""Is this volume a CT in Hounsfield units, and large enough? Pure; a no comes with its reason."""

import numpy as np
from numpy.typing import NDArray

from data_pipeline.reasons import Reason, Rejected

_AIR_AT_MOST_HU = -200
"""Even a crop inside the body meets fat, gas or lung; label maps, 8-bit and normalised images do not get here."""
_DENSE_AT_LEAST_HU = 100


def screen(voxels: NDArray[np.int16], min_slices: int) -> None:
    """Pass a volume, int16 HU (z, y, x), or raise Rejected with what speaks against it."""
    low, high = int(voxels.min()), int(voxels.max())
    if low == high:
        raise Rejected(Reason.CONSTANT, f"every voxel is {low}")
    if low > _AIR_AT_MOST_HU or high < _DENSE_AT_LEAST_HU:
        expected = f"at most {_AIR_AT_MOST_HU} (air) to at least {_DENSE_AT_LEAST_HU} HU"
        raise Rejected(Reason.HU_IMPLAUSIBLE, f"values from {low} to {high}, expected {expected}{_guess(low, high)}")
    if min(voxels.shape) < min_slices:
        raise Rejected(
            Reason.TOO_FEW_SLICES, f"shape {list(voxels.shape)}, the build asks for {min_slices} voxels on every axis"
        )


def _guess(low: int, high: int) -> str:
    if low == 0 and high > 2000:
        return ": an intercept of -1024 was not applied, or it is no CT"
    if low >= -1 and high <= 1:
        return ": normalised, or a mask"
    if low >= 0 and high <= 255:
        return ": a label map or an 8-bit picture"
    return ""
