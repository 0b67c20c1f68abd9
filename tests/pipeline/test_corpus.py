"""The bad-input corpus: no crash, no hang, no silent wrong result, and for each mutation the outcome that is right."""

from pathlib import Path

import pytest

from mim_scale.errors import SourceError
from tests.pipeline.corpus.case import Case
from tests.pipeline.corpus.cases import CASES, by_key
from tests.pipeline.corpus.good import save_good
from tests.pipeline.corpus.page import PAGE, page
from tests.pipeline.corpus.run import Got, run_cases

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def got(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Got]:
    """What became of the cases that this run asks for."""
    good = tmp_path_factory.mktemp("good") / "good.npy"
    try:
        save_good(good)
    except SourceError as error:
        pytest.skip(f"example data cannot be had here: {error}")
    asked = [item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")]
    whole = any(item.name == test_the_page_is_up_to_date.__name__ for item in request.session.items)
    cases = CASES if whole else [case for case in asked if isinstance(case, Case)]
    return {case.key: result for case, result in run_cases(cases, good)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_outcome(case: Case, got: dict[str, Got]) -> None:
    result = got[case.key]
    assert result.outcomes == case.expected, result.details


def test_the_page_is_up_to_date(got: dict[str, Got]) -> None:
    """docs/bad-inputs.md is what `make bad-inputs` would write now."""
    assert PAGE.read_text(encoding="utf-8") == page(got)


def test_the_corpus_is_large_and_its_names_are_unique() -> None:
    assert len(by_key()) == len(CASES) >= 120


def test_a_reader_that_dies_hangs_or_errs_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The harness itself: its verdicts are worth something only where it can say no."""
    from tests.pipeline.corpus import run, self_check

    monkeypatch.setattr(run, "LIMIT_S", 5.0)
    good = tmp_path / "good.npy"
    try:
        save_good(good)
    except SourceError as error:
        pytest.skip(f"example data cannot be had here: {error}")
    outcomes = {
        case.name: result.outcomes for case, result in run_cases(self_check.CASES, good, module=self_check.__name__)
    }
    assert outcomes == {
        "dies": ("CRASH with -11",),
        "hangs": ("HANG",),
        "errs": ("EXCEPTION ZeroDivisionError",),
        "eats memory": ("EXCEPTION MemoryError",),
        "other voxels": ("WRONG voxels",),
        "other place": ("WRONG geometry",),
    }
