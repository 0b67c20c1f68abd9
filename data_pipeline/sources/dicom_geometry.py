"""Where a stack of DICOM slices lies, from image position and orientation alone. Pure: numbers in, affine or reason.

Slice thickness, slice location, instance number and the tilt tag are not trusted: scanners and exports fill them with
other things.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.reasons import Reason, Rejected

_SAME_DIRECTION = 1e-3
"""Largest difference of direction cosines within one stack."""
_SAME_POSITION_MM = 1e-3
_ROUNDING_MM = 0.101
"""Positions are often written with one decimal: two of them can be off by this together."""
_ROUNDING_SHARE = 0.3
"""Of a step, at most: a slice missing from a fine stack moves its neighbours by half a step from the even grid."""
_UNEVEN_SHARE = 0.05
"""Of a step: how far a slice may lie from its place on the even grid."""
_DRIFT_PIXELS = 0.5
"""How far, over the whole stack, slices may slide sideways before the volume is sheared."""


@dataclass(frozen=True)
class Slice:
    """Geometry of one file: all in millimetres, patient coordinates LPS."""

    position: tuple[float, float, float]
    orientation: tuple[float, float, float, float, float, float]
    """Direction cosines along a row (towards higher columns), then along a column."""
    spacing: tuple[float, float]
    """Between rows, between columns."""
    size: tuple[int, int]
    """Rows, columns."""


def stack_slices(slices: list[Slice]) -> tuple[list[int], NDArray[np.float64]]:
    """Order the slices of one regular volume.

    Returns:
        The order, foot of the normal first, and the affine: (column, row, place in the order, 1) -> LPS millimetres.
        Neither depends on the order in which the slices are given.

    Raises:
        Rejected: the slices are no regular grid; the detail lists everything that was found.
    """
    axes, (row_mm, column_mm) = _common(slices)
    if len(slices) < 2:
        raise Rejected(Reason.TOO_FEW_SLICES, "a single slice")
    along = np.array([slice_.position for slice_ in slices]) @ axes[:, 2]
    order = [int(index) for index in np.argsort(along, kind="stable")]
    sorted_along = along[order]
    corners = np.array([slices[index].position for index in order])
    findings = _findings(sorted_along, corners, axes[:, 2], min(row_mm, column_mm))
    if findings:
        raise Rejected(findings[0][0], "; ".join(detail for _, detail in findings))
    affine = np.eye(4)
    affine[:3, :3] = axes * (column_mm, row_mm, (sorted_along[-1] - sorted_along[0]) / (len(slices) - 1))
    affine[:3, 3] = corners[0]
    return order, affine


def _common(slices: list[Slice]) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """Axes and spacing that all slices share: unit vectors along a row, a column and the normal, as columns."""
    orientations = np.array([slice_.orientation for slice_ in slices])
    spacings = np.array([slice_.spacing for slice_ in slices])
    # Medians: whatever the order of the slices, the same to the last bit.
    orientation, spacing = np.median(orientations, axis=0), np.median(spacings, axis=0)
    row, column = orientation[:3], orientation[3:]
    if np.abs(orientations - orientation).max() > _SAME_DIRECTION:
        raise Rejected(Reason.MIXED_ORIENTATION, "slices of different orientation in one series")
    lengths = (float(np.linalg.norm(row)), float(np.linalg.norm(column)))
    if abs(row @ column) > 1e-2 or any(abs(length - 1) > 1e-2 for length in lengths):
        raise Rejected(Reason.NO_GEOMETRY, "the image orientation is no pair of perpendicular unit vectors")
    if spacings.min() <= 0:
        raise Rejected(Reason.NO_GEOMETRY, "the pixel spacing is not positive")
    sizes = {slice_.size for slice_ in slices}
    if len(sizes) > 1:
        examples = " and ".join(f"{rows} x {columns}" for rows, columns in sorted(sizes)[:2])
        raise Rejected(Reason.MIXED_SIZES, f"slices of {len(sizes)} sizes, such as {examples}")
    if not np.allclose(spacings, spacing, rtol=1e-3):
        raise Rejected(Reason.MIXED_SIZES, "slices of different pixel spacing")
    row = row / lengths[0]
    column = column - row * (row @ column)
    column /= np.linalg.norm(column)
    return np.stack([row, column, np.cross(row, column)], axis=1), (float(spacing[0]), float(spacing[1]))


def _tolerance(step: float) -> float:
    """How far a slice may lie from its place, in mm."""
    return max(_UNEVEN_SHARE * step, min(_ROUNDING_MM, _ROUNDING_SHARE * step))


def _findings(
    along: NDArray[np.float64], corners: NDArray[np.float64], normal: NDArray[np.float64], pixel_mm: float
) -> list[tuple[Reason, str]]:
    """Everything that keeps sorted slices from being a regular grid, gravest first."""
    steps = np.diff(along)
    repeated = int((steps < _SAME_POSITION_MM).sum())
    if repeated:
        return [(Reason.REPEATED_POSITIONS, f"{repeated} of {len(along)} slices lie where another one lies")]
    findings = []
    step = float(np.median(steps))
    even = along[0] + np.arange(len(along)) * (along[-1] - along[0]) / (len(along) - 1)
    if np.abs(along - even).max() > _tolerance(step):
        smallest = float(steps.min())
        whole = np.rint(steps / smallest)
        if np.abs(steps - whole * smallest).max() <= _tolerance(smallest) and whole.max() > 1:
            missing = int((whole - 1).sum())
            findings.append(
                (Reason.MISSING_SLICES, f"{missing} of {len(along) + missing} slices missing by their positions")
            )
        else:
            detail = f"steps between slices from {smallest:.3f} to {float(steps.max()):.3f} mm"
            findings.append((Reason.UNEVEN_SPACING, detail))
    offsets = corners - corners[0]
    drift = offsets - np.outer(offsets @ normal, normal)
    furthest = int(np.argmax(np.linalg.norm(drift, axis=1)))
    slide = float(np.linalg.norm(drift[furthest]))
    if slide > _DRIFT_PIXELS * pixel_mm:
        angle = float(np.degrees(np.arctan2(slide, abs(offsets[furthest] @ normal))))
        findings.append((Reason.GANTRY_TILT, f"slices slide sideways by {angle:.1f} degrees"))
    return findings
