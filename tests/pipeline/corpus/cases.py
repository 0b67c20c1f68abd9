"""All cases, in the order of the page that lists them."""

from tests.pipeline.corpus import (
    archives,
    compression,
    descriptions,
    dicom,
    dicom_pixels,
    filesystem,
    mha,
    nifti,
    nrrd,
    ome_zarr,
    plausibility,
)
from tests.pipeline.corpus.case import Case

_FAMILIES = (
    dicom,
    dicom_pixels,
    nifti,
    nrrd,
    mha,
    ome_zarr,
    compression,
    archives,
    filesystem,
    plausibility,
    descriptions,
)

CASES: list[Case] = [case for family in _FAMILIES for case in family.CASES]


def by_key() -> dict[str, Case]:
    """The cases by their keys; ValueError where two share one."""
    cases = {case.key: case for case in CASES}
    if len(cases) != len(CASES):
        raise ValueError("two cases of one name")
    return cases
