"""All cases, in the order of the page that lists them."""

from tests.pipeline.corpus import compression, mha, nifti, nrrd
from tests.pipeline.corpus.case import Case

CASES: list[Case] = [*nifti.CASES, *nrrd.CASES, *mha.CASES, *compression.CASES]


def by_key() -> dict[str, Case]:
    """The cases by their keys; ValueError where two share one."""
    cases = {case.key: case for case in CASES}
    if len(cases) != len(CASES):
        raise ValueError("two cases of one name")
    return cases
