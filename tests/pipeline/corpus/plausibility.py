"""Values that are no HU: shifted, scaled, normalised, cut, computed; and those that look odd and are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mim_scale.store.volume import Volume
from tests.pipeline.corpus.case import Case, accepted, refused, with_voxels
from tests.pipeline.corpus.files import nifti

FAMILY = "values"


def _of(change: Callable[[Any], Any], dtype: str) -> Callable[[Path, Volume], Volume]:
    """A file of changed values, which is also what a reader must find."""

    def write(root: Path, good: Volume) -> Volume:
        values = change(good.voxels.astype(np.float64)).astype(dtype)
        (root / "scan.nii").write_bytes(nifti(good, voxels=values))
        finite = np.nan_to_num(np.clip(values.astype(np.float64), -1024, 32767))
        return with_voxels(good, finite)

    return write


def _corner(value: float) -> Callable[[Any], Any]:
    """The corners of each slice hold another value, as outside a scanner's circle."""

    def change(hu: Any) -> Any:
        values = hu.copy()
        values[:, :6, :6] = values[:, -6:, -6:] = value
        return values

    return change


def _offset(hu: Any) -> Any:
    return _corner(-2000)(hu + 1024)


def _metal(hu: Any) -> Any:
    values = hu.copy()
    values[8:10, 14:17, 14:17] = 31000
    values[8:10, 12, 14:17] = -1900
    return values


def _masked(hu: Any) -> Any:
    return np.where(hu < -300, -1000, hu)


def _brain(hu: Any) -> Any:
    """Tissue alone, everything lighter set to air."""
    return np.where(hu < -60, -1024, hu)


def _noise(hu: Any) -> Any:
    return np.random.default_rng(4).integers(-32000, 32000, hu.shape)


_REFUSED: list[tuple[str, Callable[[Any], Any], str, str]] = [
    ("stored from 0, the intercept lost", lambda hu: hu + 1024, "uint16", "hu_implausible"),
    ("the intercept lost, padding of -2000 kept", _offset, "int16", "hu_implausible"),
    ("an offset of 1000 not taken off", lambda hu: np.clip(hu + 1000, 0, 4095), "int16", "hu_implausible"),
    ("the intercept applied twice", lambda hu: hu - 1024, "int16", "hu_implausible"),
    ("the intercept applied twice, padding kept", lambda hu: _corner(-3024)(hu - 1024), "int16", "hu_implausible"),
    ("tenfold", lambda hu: hu * 10, "int16", "hu_implausible"),
    ("hundredfold", lambda hu: hu * 100, "int32", "hu_implausible"),
    ("a tenth", lambda hu: hu / 10, "float32", "hu_implausible"),
    ("from 0 to 1", lambda hu: (hu + 1024) / 4095, "float32", "hu_implausible"),
    ("from -1 to 1", lambda hu: np.clip(hu / 1024, -1, 1), "float32", "hu_implausible"),
    ("mean 0 and deviation 1", lambda hu: (hu - hu.mean()) / hu.std(), "float32", "hu_implausible"),
    ("8 bits", lambda hu: np.clip((hu + 1000) / 8, 0, 255), "uint8", "hu_implausible"),
    ("8 bits with a sign", lambda hu: np.clip((hu + 1000) / 8 - 128, -128, 127), "int8", "hu_implausible"),
    ("a soft tissue window", lambda hu: np.clip(hu, -160, 240), "int16", "hu_implausible"),
    ("a window stretched to 0 to 4095", lambda hu: np.clip((hu + 1000) * 2, 0, 4095), "uint16", "hu_implausible"),
    ("a mask", lambda hu: hu > 0, "uint8", "hu_implausible"),
    ("a label map", lambda hu: np.digitize(hu, [-500, 0, 100, 200]), "uint8", "hu_implausible"),
    ("as MR", lambda hu: np.abs(np.sin(hu / 300)) * 1500, "int16", "hu_implausible"),
    ("as PET, uptake values", lambda hu: np.exp(hu / 500), "float32", "hu_implausible"),
    ("as PET, activities", lambda hu: np.exp((hu + 1024) / 220), "float32", "hu_implausible"),
    ("attenuation per cm", lambda hu: (hu / 1000 + 1) * 0.19, "float32", "constant"),
    ("noise over all 16 bits", _noise, "int16", "hu_implausible"),
    ("inverted", lambda hu: -hu, "int16", "hu_implausible"),
    ("constant 0", lambda hu: hu * 0, "int16", "constant"),
    ("air alone", lambda hu: hu * 0 - 1024, "int16", "constant"),
    ("padding alone", lambda hu: hu * 0 - 3024, "int16", "constant"),
    ("one NaN", lambda hu: np.where(hu == hu.max(), np.nan, hu), "float32", "non_finite"),
]
_ACCEPTED: list[tuple[str, Callable[[Any], Any], str, str]] = [
    ("padding of -2000", _corner(-2000), "int16", accepted("padding_mapped")),
    ("padding of -3024", _corner(-3024), "int16", accepted("padding_mapped")),
    ("padding of -32768", _corner(-32768), "int16", accepted("padding_mapped")),
    ("metal of 31000 and streaks of -1900", _metal, "int16", accepted("padding_mapped")),
    ("air at -1000, nothing below", lambda hu: np.maximum(hu, -1000), "int16", accepted()),
    ("the background masked to -1000", _masked, "int16", accepted()),
    ("all but tissue masked to air", _brain, "int16", accepted()),
    (
        "a floor of -1100 from a sharp kernel",
        lambda hu: np.where(hu < -1000, hu - 76, hu),
        "int16",
        accepted("padding_mapped"),
    ),
    ("cut at 400", lambda hu: np.minimum(hu, 400), "int16", accepted(flags=("clipped_hu",))),
    ("cut at -500", lambda hu: np.maximum(hu, -500), "int16", accepted(flags=("clipped_hu",))),
    ("fractions of HU", lambda hu: hu + 0.3, "float64", accepted("rounded")),
]

CASES = [
    *(Case(FAMILY, name, _of(change, dtype), (refused(reason),)) for name, change, dtype, reason in _REFUSED),
    *(Case(FAMILY, name, _of(change, dtype), (outcome,)) for name, change, dtype, outcome in _ACCEPTED),
]
