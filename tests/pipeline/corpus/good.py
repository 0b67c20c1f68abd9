"""The good volume that everything else is made from: a thinned-out real chest with air, lung, soft tissue and bone."""

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from data_pipeline.example_data import default_cache, fetch_examples
from mim_scale.store.geometry import Size3
from mim_scale.store.volume import AIR_HU, Volume
from tests.pipeline.corpus.case import SPACING, good_affine

SHAPE: Size3 = (18, 32, 36)
_SCAN = "pyradiomics/lung_1.nrrd"
_PICK = (slice(10, 46, 2), slice(100, 452, 11), slice(60, 488, 12))


def save_good(path: Path) -> None:
    """Take it out of an example volume and keep it for the workers; SourceError where the examples cannot be had."""
    cache = default_cache()
    if not (cache / _SCAN).is_file():
        fetch_examples(cache, print)
    voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(cache / _SCAN)))[_PICK]
    np.save(path, np.maximum(voxels, AIR_HU).astype(np.int16))


def load_good(path: Path) -> Volume:
    """What save_good kept, with axes R, A, S."""
    x_mm, y_mm, z_mm = SPACING
    return Volume(np.load(path), (z_mm, y_mm, x_mm), good_affine())
