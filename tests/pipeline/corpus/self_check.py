"""Cases that must be seen to go wrong, each in its own way: the check of the harness."""

import ctypes
import time
from pathlib import Path

import numpy as np

from mim_scale.store.volume import Volume
from tests.pipeline.corpus.case import Case, accepted, with_affine, with_voxels
from tests.pipeline.corpus.files import nifti


def _dies(root: Path, good: Volume) -> None:
    ctypes.string_at(0)


def _hangs(root: Path, good: Volume) -> None:
    time.sleep(600)


def _errs(root: Path, good: Volume) -> None:
    raise ZeroDivisionError("on purpose")


def _eats(root: Path, good: Volume) -> None:
    np.ones(1 << 31, np.uint8)


def _voxels(root: Path, good: Volume) -> Volume:
    (root / "scan.nii").write_bytes(nifti(good))
    return with_voxels(good, good.voxels + (good.voxels == good.voxels.max()))


def _place(root: Path, good: Volume) -> Volume:
    (root / "scan.nii").write_bytes(nifti(good))
    affine = good.affine.copy()
    affine[0, 3] += 0.1
    return with_affine(good, affine)


_WRITERS = {"dies": _dies, "hangs": _hangs, "errs": _errs, "eats memory": _eats}
_WRITERS |= {"other voxels": _voxels, "other place": _place}  # type: ignore[dict-item]
CASES = [Case("self-check", name, write, (accepted(),)) for name, write in _WRITERS.items()]
