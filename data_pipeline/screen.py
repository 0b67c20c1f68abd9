"""Is this volume a CT in Hounsfield units, and large enough? Pure; a no comes with its reason.

The values say it: tissue and air lie where they lie in every CT. Thresholds were set on 171 real volumes, of which none
is refused, and on the same shifted by 1024 either way or multiplied by ten, of which none passes.
"""

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.reasons import Reason, Rejected

_AIR_AT_MOST_HU = -200
"""Even a crop inside the body meets fat, gas or lung; label maps, 8-bit and normalised images do not get here."""
_DENSE_AT_LEAST_HU = 100
_AIR_HU = -1024

_SAMPLE = 1 << 20
"""About how many voxels shares are taken from."""
_BELOW_AIR_HU = -1200
"""Sharp kernels and metal undershoot to here; what lies lower is padding, or no HU."""
_BELOW_AIR_SHARES = (0.005, 0.05)
"""Of the voxels that are no padding: above the first, soft tissue must be where it belongs; above the second, no HU."""
_NUM_PADDING_VALUES = 2
_LEAST_SOFT_SHARE = 0.1
_EMPTY_BELOW_HU = -150
_OFFSET_TISSUE_SHARE = 0.02
_OFFSET_TISSUE_RATIO = 4
_BONE_HU = 800
_MOST_BONE = 0.4
"""Of 171 real volumes, the one with most has 3 %."""
_CLIPPED_SHARE = 0.005
_FLOOR_HU = -900
"""Many voxels at a lowest value up to here are air, or what lies outside the scanner's circle."""


def screen(voxels: NDArray[np.int16], min_slices: int, waived: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Pass a volume, or raise Rejected with what speaks against it.

    Args:
        voxels: int16 HU (z, y, x), padding already air.
        min_slices: fewest voxels along any axis.
        waived: reasons that the user lets pass; each that would have applied comes back as a flag `waived_<reason>`.

    Returns:
        Flags, sorted: `clipped_hu` where many voxels share the highest or the lowest value, as after a window.
    """
    flags = set()
    for check in (
        _check_constant,
        # Before the values: a thumbnail need not hold what every body holds.
        partial(_check_size, min_slices=min_slices),
        _check_range,
        _check_offset,
        _check_dense,
    ):
        try:
            check(voxels)
        except Rejected as rejected:
            if rejected.reason not in waived:
                raise
            flags.add(f"waived_{rejected.reason}")
    if _is_clipped(voxels):
        flags.add("clipped_hu")
    return tuple(sorted(flags))


WAIVABLE = frozenset({Reason.CONSTANT, Reason.HU_IMPLAUSIBLE, Reason.TOO_FEW_SLICES})
"""Reasons that are a judgement: a user who knows better may let a volume pass."""


def _check_dense(voxels: NDArray[np.int16]) -> None:
    """Raise Rejected where most is as dense as cortical bone."""
    share = float(np.mean(_sample(voxels) > _BONE_HU))
    if share > _MOST_BONE:
        raise Rejected(Reason.HU_IMPLAUSIBLE, f"{share:.0%} of the voxels lie above {_BONE_HU}: inverted, or no CT")


def _check_constant(voxels: NDArray[np.int16]) -> None:
    low = int(voxels.min())
    if low == int(voxels.max()):
        raise Rejected(Reason.CONSTANT, f"every voxel is {low}")


def _check_range(voxels: NDArray[np.int16]) -> None:
    low, high = int(voxels.min()), int(voxels.max())
    if low > _AIR_AT_MOST_HU or high < _DENSE_AT_LEAST_HU:
        expected = f"at most {_AIR_AT_MOST_HU} (air) to at least {_DENSE_AT_LEAST_HU} HU"
        raise Rejected(Reason.HU_IMPLAUSIBLE, f"values from {low} to {high}, expected {expected}{_guess(low, high)}")


def _check_size(voxels: NDArray[np.int16], min_slices: int) -> None:
    if min(voxels.shape) < min_slices:
        raise Rejected(
            Reason.TOO_FEW_SLICES, f"shape {list(voxels.shape)}, the build asks for {min_slices} voxels on every axis"
        )


def _is_clipped(voxels: NDArray[np.int16]) -> bool:
    """Whether many voxels share the highest or the lowest value, as after a window."""
    low, high = int(voxels.min()), int(voxels.max())
    sample = _sample(voxels)
    inside = sample[sample > low]
    return _share(inside, high, high) > _CLIPPED_SHARE or (
        low > _FLOOR_HU and _share(sample, low, low) > _CLIPPED_SHARE
    )


def check_below_air(values: NDArray[Any]) -> None:
    """Raise Rejected where much lies below air in many values: padding has one value, a shifted scale has many.

    Args:
        values: (z, y, x) as read, of any real type, some of them below -1024.
    """
    sample = _sample(values)
    strange = sample[sample < _BELOW_AIR_HU]
    _, counts = np.unique(strange, return_counts=True)
    num_padding = np.sort(counts)[-_NUM_PADDING_VALUES:].sum()
    share = float(strange.size - num_padding) / max(sample.size - num_padding, 1)
    some, much = _BELOW_AIR_SHARES
    if share > much or (share > some and _share(sample[sample > _AIR_HU], -200, 300) < _LEAST_SOFT_SHARE):
        raise Rejected(
            Reason.HU_IMPLAUSIBLE,
            f"{share:.0%} of the voxels lie below {_BELOW_AIR_HU} in many values, down to {float(values.min()):g}: "
            "an intercept was applied twice, or it is no CT",
        )


def _check_offset(voxels: NDArray[np.int16]) -> None:
    """Raise Rejected where tissue lies near +1000 and nothing near fat or air: stored values with their padding."""
    sample = _sample(voxels)
    inside = sample[sample > _AIR_HU]
    if inside.size and np.mean(inside < _EMPTY_BELOW_HU) < 0.001:
        tissue = _share(inside, 850, 1250)
        if tissue > _OFFSET_TISSUE_SHARE and tissue > _OFFSET_TISSUE_RATIO * _share(inside, 400, 800):
            raise Rejected(
                Reason.HU_IMPLAUSIBLE,
                f"{tissue:.0%} of the voxels lie around 1050 and none between {_AIR_HU} and {_EMPTY_BELOW_HU}: "
                "an intercept of -1024 was not applied",
            )


def _sample(values: NDArray[Any]) -> NDArray[Any]:
    """Voxels of an even grid, in a row."""
    step = max(1, int(np.ceil((values.size / _SAMPLE) ** (1 / 3))))
    return values[::step, ::step, ::step].ravel()


def _share(sample: NDArray[Any], low: int, high: int) -> float:
    return float(np.mean((sample >= low) & (sample <= high))) if sample.size else 0.0


def _guess(low: int, high: int) -> str:
    if low >= 0 and high > 1000:
        return ": an intercept of -1024 was not applied, or it is no CT"
    if low >= -1 and high <= 1:
        return ": normalised, or a mask"
    if low >= 0 and high <= 255:
        return ": a label map or an 8-bit picture"
    if low >= -50 and high <= 50:
        return ": normalised to its mean and deviation"
    return ""
