"""What is found in a folder, and what is read from it: the two types that every format's reader speaks."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.deidentify import Acquisition, Identity
from data_pipeline.reasons import Reason

Format = Literal["nifti", "nrrd", "mha", "dicom", "ome_zarr", "unknown"]


@dataclass(frozen=True, slots=True)
class Source:
    """One input as found: a file, or the files of a DICOM series. It ends as one manifest row or one quarantine row."""

    name: str = field(repr=False)
    """Relative path of its first file; stays out of stores and messages."""
    format: Format
    files: tuple[str, ...] = field(repr=False)
    """Relative to the source folder, sorted; with / on every system."""
    num_voxels: int = 0
    """By the header; 0 where it could not be read."""
    problem: tuple[Reason, str] | None = None
    """Why it can be refused without reading a voxel: reason and detail."""
    voxel_mm3: float = 0.0
    """Of one voxel, by the header; 0 where it could not be read."""
    subject: str = field(default="", repr=False)
    """Whose it is, in clear, where a table or a dataset's description says so."""
    version: str = ""
    """Digest of its files' names, sizes and times."""
    num_bytes: int = 0
    """Of its files."""
    urls: tuple[str, ...] = field(default=(), repr=False)
    """Where its files are fetched from, where a list gives each an address of its own; a folder's ends with /."""

    def paths(self, root: Path) -> list[Path]:
        """Its files below the source folder."""
        return [root / file for file in self.files]

    @property
    def shown(self) -> str:
        """The name as people write it, for those who ask for names."""
        return self.name.replace("/", "://", 1) if self.urls else self.name


_NOBODY = Identity()
_UNSAID = Acquisition()


@dataclass(frozen=True)
class Scan:
    """A source as read, before any convention is applied.

    voxels: any real dtype, HU, axes (i, j, k) in the order of the affine's columns.
    affine: float64 4x4, voxel index (i, j, k, 1) -> RAS millimetres.
    repairs: codes of what the reader had to do.
    identity: who and what was scanned, in clear; it must be made a pseudonym before it goes anywhere.
    acquisition: how, from the allow-list.
    """

    voxels: NDArray[np.generic]
    affine: NDArray[np.float64]
    repairs: tuple[str, ...] = ()
    identity: Identity = _NOBODY
    acquisition: Acquisition = _UNSAID


LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
