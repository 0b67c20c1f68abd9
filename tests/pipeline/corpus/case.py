"""One mutation of a good input, and the outcome that is right for it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mim_scale.store.volume import Volume

ORIGIN = (-30.5, 12.25, -400.0)
SPACING = (0.8, 0.9, 2.5)
"""Of the good volume along x, y, z in mm."""


@dataclass(frozen=True)
class Case:
    """A source folder to be written, and what must come out of it."""

    family: str
    name: str
    write: Callable[[Path, Volume], Volume | None]
    """Fills an empty folder from the good volume; returns what a reader must find where that is another volume."""
    expected: tuple[str, ...]
    """One outcome for each input in the folder, sorted."""
    meanwhile: Callable[[Path], None] | None = None
    """Done to the folder after it was scanned and before it is read."""
    during: Callable[[Path], AbstractContextManager[None]] = field(default=lambda root: nullcontext())
    """Holds while it is scanned and read."""

    @property
    def key(self) -> str:
        """Name of the case, unique in the corpus."""
        return f"{self.family}: {self.name}"


STOPS = "stops: one line says what to mend"
"""A description of the dataset is wrong: without it nobody knows who is on the images, so nothing is built."""


def accepted(*repairs: str, flags: tuple[str, ...] = ()) -> str:
    """A volume with the voxels and the affine that it must have, and what was done to it."""
    words = sorted(repairs) + [f"flag {flag}" for flag in flags]
    return "accepted" + (f": {', '.join(words)}" if words else "")


def refused(reason: str) -> str:
    """A quarantine row."""
    return f"refused: {reason}"


def good_affine() -> NDArray[np.float64]:
    """Of the good volume: axes R, A, S."""
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = ORIGIN
    return affine


def with_voxels(good: Volume, voxels: NDArray[np.generic]) -> Volume:
    """What a reader must find where only the voxels differ; rounded, and air where they lie below it."""
    whole = np.maximum(np.rint(voxels.astype(np.float64)), -1024).astype(np.int16)
    return Volume(whole, good.spacing_mm, good.affine)


def with_affine(good: Volume, affine: NDArray[np.float64]) -> Volume:
    """What a reader must find where only the geometry differs; the affine's axes must be R, A, S already."""
    x_mm, y_mm, z_mm = (float(step) for step in np.linalg.norm(affine[:3, :3], axis=0))
    return Volume(good.voxels, (z_mm, y_mm, x_mm), affine)
