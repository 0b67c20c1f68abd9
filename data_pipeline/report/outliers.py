"""Which volumes of a store are unlike the others, by how much, and in what: robust z-scores. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

THRESHOLD = 3.5
"""Volumes whose score is larger are outliers (Iglewicz and Hoaglin, 1993)."""
LEAST_VOLUMES = 8
"""Fewer say nothing about what is usual."""
_MAD_TO_SIGMA = 1.4826
"""Median absolute deviation of a normal distribution to its standard deviation."""


@dataclass(frozen=True)
class Measure:
    """A number of a volume that can be unusual."""

    name: str
    unit: str
    least_scale: float
    """Of deviations, so that where nearly all volumes agree not every other one is called an outlier."""
    is_ratio: bool = False
    """Deviations are ratios: half and double are equally far away."""


MEASURES = (
    *(Measure(f"spacing {axis}", "mm", 0.1, is_ratio=True) for axis in "zyx"),
    # In mm: a matrix of 512 beside ones of 128 is nothing strange.
    *(Measure(f"extent {axis}", "mm", 0.1, is_ratio=True) for axis in "zyx"),
    Measure("mean HU", "HU", 20.0),
    Measure("HU histogram distance", "HU", 20.0),
)


@dataclass(frozen=True)
class Outlier:
    """What is unusual about a volume."""

    index: int
    """Of the volume in the columns."""
    score: float
    """The largest of its scores."""
    why: tuple[str, ...]
    """One line for each unusual number, the most unusual one first."""


def scores(values: NDArray[np.float64], measure: Measure) -> NDArray[np.float64]:
    """Distance of each value from the median, in robust standard deviations."""
    values = np.log(values) if measure.is_ratio else values
    away = np.abs(values - np.median(values))
    return np.asarray(away / max(_MAD_TO_SIGMA * float(np.median(away)), measure.least_scale))


def find_outliers(columns: Mapping[str, NDArray[np.float64]]) -> list[Outlier]:
    """Volumes with an unusual number, most unusual first; none where there are fewer than LEAST_VOLUMES.

    Args:
        columns: Of each measure, by its name, one value a volume.
    """
    count = len(columns[MEASURES[0].name])
    if count < LEAST_VOLUMES:
        return []
    by_measure = np.stack([scores(columns[measure.name], measure) for measure in MEASURES])
    largest = by_measure.max(axis=0)
    medians = {measure.name: float(np.median(columns[measure.name])) for measure in MEASURES}
    found = []
    for index in sorted(np.flatnonzero(largest > THRESHOLD).tolist(), key=lambda i: (-largest[i], i)):
        unusual = sorted(np.flatnonzero(by_measure[:, index] > THRESHOLD), key=lambda m: -by_measure[m, index])
        why = tuple(_words(MEASURES[m], columns, medians, index, by_measure[m, index]) for m in unusual)
        found.append(Outlier(index, float(largest[index]), why))
    return found


def histogram_distances(shares: NDArray[np.float32], total: NDArray[np.int64], bin_width: float) -> NDArray[np.float64]:
    """How far each volume's histogram is from that of all voxels together, in HU: earth mover's distance.

    Args:
        shares: [volumes, bins], each row's sum is 1.
        total: [bins] voxels of all volumes.
    """
    everything = np.cumsum(total / max(1, int(total.sum())))
    # A few rows at a time: the sums of ten thousand need not be in memory at once.
    parts = [
        np.abs(np.cumsum(shares[at : at + 1024], 1, np.float64) - everything).sum(axis=1) * bin_width
        for at in range(0, len(shares), 1024)
    ]
    return np.concatenate(parts)


def _words(
    measure: Measure, columns: Mapping[str, NDArray[np.float64]], medians: Mapping[str, float], index: int, score: float
) -> str:
    value, usual = columns[measure.name][index], medians[measure.name]
    return f"{measure.name} {value:.4g} {measure.unit}, median {usual:.4g} (score {score:.1f})"
