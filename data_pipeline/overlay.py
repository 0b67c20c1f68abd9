"""Near-copies laid over each other: the voxels themselves confirm what marks only suspect, or refute it.

Marks say roughly how one volume lies in the other. From there a small affine change, found by least squares, lays
soft tissue on soft tissue on a coarse grid, whatever a rotation or a wrong voxel size moved; then the values of copies
follow one another, and those of two people do not. A correlation is blind to the scale of either.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from data_pipeline.duplicates import CERTAIN_SCORE, LEAST_SCORE, Evidence, Link, Match
from data_pipeline.volume_fingerprint import FRAMES
from mim_scale.store.manifest import FingerprintRow
from mim_scale.store.volume import Volume

CANDIDATE_SCORE = 1.5
"""From here on voxels are looked at; docs/benchmarks/2026-11-26-leakage.md has what that finds and costs."""
LEAST_CORRELATION = 0.95
"""Of copies: planted ones reach 0.98 and more, heads of two people at most 0.92."""
_CELL_MM = 4.0
_BLUR_MM = 4.0
"""Standard deviation, the voxels' own width included: thick and thin slices look alike."""
_WINDOW_HU = (-160, 240)
_TISSUE_HU = -130
"""Air is flat, and a mask around a body is no part of it."""
_MOST_PLACES = 8000
_FEWEST_PLACES = 500
_LEAST_SHARE = 0.3
"""Of the smaller one's tissue: an overlap of less tells nothing."""
_STEPS = 6
_STEP_MM = 6.0
_STEP_STRETCH = 0.05
_STIFFNESS = 1e-3
_LEAST_GAIN = 0.3
_KEPT = 128
"""Coarse pictures of each side that are kept, a few megabytes each."""


class Voxels(Protocol):
    """Reads the volumes of one side."""

    def __call__(self, key: str, fingerprint: bytes = b"") -> Volume | None:
        """The volume of a key, its values in the scale that the fingerprint is of; None where it cannot be read."""


class NoVoxels:
    """Of a list of fingerprints."""

    def __call__(self, key: str, fingerprint: bytes = b"") -> Volume | None:
        return None


NO_VOXELS = NoVoxels()


@dataclass(frozen=True)
class Coarse:
    """The soft tissue of a volume on a coarse grid."""

    hu: NDArray[np.float16]
    step_mm: NDArray[np.float64]
    first_mm: NDArray[np.float64]
    """Of the first cell's centre, from the centre of the first voxel."""

    @property
    def tissue_mm3(self) -> float:
        return float(np.count_nonzero(self.hu > _TISSUE_HU) * np.prod(self.step_mm))


def coarse(volume: Volume) -> Coarse:
    """Windowed means of whole blocks of voxels, blurred to one sharpness."""
    by = [min(n, max(1, int(_CELL_MM / step))) for n, step in zip(volume.shape, volume.spacing_mm, strict=True)]
    shape = [n // k for n, k in zip(volume.shape, by, strict=True)]
    means = np.empty(shape, np.float32)
    for z in range(shape[0]):
        slab = volume.voxels[z * by[0] : (z + 1) * by[0], : shape[1] * by[1], : shape[2] * by[2]]
        slab = np.clip(slab, *_WINDOW_HU).reshape(by[0], shape[1], by[1], shape[2], by[2])
        means[z] = slab.mean((0, 2, 4), dtype=np.float32)
    spacing = np.array(volume.spacing_mm)
    step = spacing * by
    blurred = ndimage.gaussian_filter(
        means, np.sqrt(np.maximum(_BLUR_MM**2 - step**2 / 12, 0)) / step, mode="nearest", truncate=3.0
    )
    # Nothing outside the tissue is ever compared: of a head in a large image little is kept.
    box = [slice(0, 1)] * 3
    for axis in range(3):
        held = np.flatnonzero((blurred > _TISSUE_HU).any(tuple(other for other in range(3) if other != axis)))
        if len(held):
            box[axis] = slice(max(int(held[0]) - 2, 0), int(held[-1]) + 3)
    first = spacing * (np.array(by) - 1) / 2 + step * [part.start for part in box]
    return Coarse(blurred[tuple(box)].astype(np.float16), step, first)


def correlation(a: Coarse, b: Coarse, match: Match) -> float | None:
    """Of the soft tissue of both, b laid over a as well as a small affine change can; None: too little overlaps."""
    turn, shift = FRAMES[match.relation].astype(np.float64).T, np.array(match.shift_mm)
    if a.tissue_mm3 > b.tissue_mm3:
        a, b, turn, shift = b, a, turn.T, -turn.T @ shift
    places = np.flatnonzero(a.hu > _TISSUE_HU)
    if len(places) < _FEWEST_PLACES:
        return None
    places = places[np.linspace(0, len(places) - 1, min(len(places), _MOST_PLACES)).astype(np.int64)]
    own = a.hu.ravel()[places].astype(np.float64)
    at = np.stack(np.unravel_index(places, a.hu.shape), 1) * a.step_mm + a.first_mm
    centre = at.mean(0)
    at -= centre
    there = turn @ centre + shift
    hu = b.hu.astype(np.float32)
    slopes = [np.gradient(hu, axis=k) / b.step_mm[k] if hu.shape[k] > 1 else np.zeros_like(hu) for k in range(3)]
    found = 0.0
    for step in range(_STEPS + 1):
        cells = (at @ turn.T + there - b.first_mm) / b.step_mm
        kept = np.flatnonzero(((cells >= 0) & (cells <= np.array(hu.shape) - 1)).all(1))
        other = ndimage.map_coordinates(hu, cells[kept].T, order=1, mode="nearest").astype(np.float64)
        kept, other = kept[other > _TISSUE_HU], other[other > _TISSUE_HU]
        if len(kept) < max(_FEWEST_PLACES, _LEAST_SHARE * len(at)):
            return None
        if not own[kept].std() or not other.std():
            return None
        found = float(np.corrcoef(own[kept], other)[0, 1])
        if step < _STEPS:
            slope = [ndimage.map_coordinates(k, cells[kept].T, order=1, mode="nearest") for k in slopes]
            moved, stretched = _better(own[kept], other, np.stack(slope, 1), at[kept])
            there, turn = there + moved, turn + stretched
    return found


def _better(
    own: NDArray[np.float64], other: NDArray[np.float64], slope: NDArray[np.float64], at: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A Gauss-Newton step: how to move and stretch, so that own = gain * other + offset holds better."""
    columns = [slope, *(slope * at[:, [k]] for k in range(3)), np.ones((len(at), 1)), other[:, None]]
    system = np.concatenate(columns, axis=1)
    scale = np.sqrt((system**2).mean(0)) + 1e-9
    system /= scale
    normal = system.T @ system + _STIFFNESS * len(at) * np.eye(system.shape[1])
    answer = np.linalg.solve(normal, system.T @ own) / scale
    change = answer[:12].reshape(4, 3) / max(float(answer[13]), _LEAST_GAIN)
    return np.clip(change[0], -_STEP_MM, _STEP_MM), np.clip(change[1:].T, -_STEP_STRETCH, _STEP_STRETCH)


Pictures = Callable[[str, bytes], Coarse | None]
"""By key and fingerprint; None where voxels cannot be read."""


def pictures_of(voxels: Voxels) -> Pictures:
    """The coarse pictures of a side; the most recent ones are kept."""

    @lru_cache(_KEPT)
    def picture(key: str, fingerprint: bytes) -> Coarse | None:
        volume = voxels(key, fingerprint)
        return None if volume is None else coarse(volume)

    return picture


@dataclass
class Overlay:
    """The near-copies of two sides, judged by their voxels, and how many were."""

    a: Pictures
    b: Pictures
    num_looked_at: int = 0
    """Pairs of images whose voxels were laid over each other."""
    num_confirmed: int = 0
    num_refuted: int = 0
    """Pairs that only marks tied together, dropped."""
    num_refuted_hits: int = 0
    """Those of them that marks alone would have counted."""

    def judge(self, links: Sequence[tuple[FingerprintRow, FingerprintRow, Link]]) -> Link | None:
        """What remains of the links of one pair of images: the one that tells most, or None where voxels refute it.

        Equal voxels need no more evidence. Where voxels cannot be read or hardly overlap, marks decide by their score.
        """
        judged: list[Link] = []
        # An image in an unknown scale has a row for each guess: one that is confirmed is enough.
        for a, b, link in sorted(links, key=lambda item: -score_of(item[2])):
            judged.append(self._look(a, b, link))
            if is_confirmed(judged[-1]):
                break
        seen = [link for link in judged if link.correlation is not None]
        confirmed = [link for link in seen if is_confirmed(link)]
        remaining = confirmed or [link for link in map(_settled, judged) if link is not None]
        self.num_looked_at += bool(seen)
        self.num_confirmed += bool(confirmed)
        if seen and not remaining:
            self.num_refuted += 1
            self.num_refuted_hits += any(score_of(link) >= LEAST_SCORE for link in seen)
        return remaining[0] if remaining else None

    def told(self) -> dict[str, float]:
        """For a certificate."""
        return {
            "candidate_score": CANDIDATE_SCORE,
            "least_correlation": LEAST_CORRELATION,
            "num_looked_at": self.num_looked_at,
            "num_confirmed": self.num_confirmed,
            "num_refuted": self.num_refuted,
            "num_refuted_hits": self.num_refuted_hits,
        }

    def _look(self, a: FingerprintRow, b: FingerprintRow, link: Link) -> Link:
        if link.match is None or link.evidence == Evidence.SAME_VOXELS:
            return link
        ours, theirs = self.a(a.key, a.fingerprint), self.b(b.key, b.fingerprint)
        if ours is None or theirs is None:
            return link
        return replace(link, correlation=correlation(ours, theirs, link.match))


def score_of(link: Link) -> float:
    """Of its near-copy; 0 where hashes or pseudonyms alone tie the two."""
    return link.match.score if link.match is not None else 0.0


def strongest(links: Sequence[tuple[FingerprintRow, FingerprintRow, Link]]) -> Link:
    """Of the links of one pair of images, all of one evidence, the one of the highest score."""
    return max((link for _, _, link in links), key=score_of)


def is_confirmed(link: Link) -> bool:
    """Whether the voxels of both say that it is a copy."""
    return link.correlation is not None and link.correlation >= LEAST_CORRELATION


def _settled(link: Link) -> Link | None:
    if link.match is None:
        return link
    # Marks of a certain score outweigh an overlay that failed: no false alarm ever reached it.
    least = LEAST_SCORE if link.correlation is None else CERTAIN_SCORE
    if link.match.score >= least:
        return link
    return None if link.evidence == Evidence.NEAR_COPY else replace(link, match=None, correlation=None)
