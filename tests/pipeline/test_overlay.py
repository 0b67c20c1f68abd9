"""Voxels laid over each other confirm copies however they were changed, refute other people, decide nothing unread."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from data_pipeline.duplicates import CERTAIN_SCORE, IDENTITY, LEAST_SCORE, Evidence, Link, Match, find_copies
from data_pipeline.overlay import (
    CANDIDATE_SCORE,
    LEAST_CORRELATION,
    Overlay,
    coarse,
    correlation,
    is_confirmed,
    pictures_of,
)
from data_pipeline.volume_fingerprint import volume_fingerprint
from mim_scale.store.manifest import FingerprintRow
from mim_scale.store.volume import Volume
from tests.pipeline.test_duplicates import COPIES, PERSON, person, volume

OTHER = person(7)
STRANGERS = {"own": PERSON, "copy": COPIES["slabs"], "other": OTHER}


def turned(degrees: float) -> Volume:
    voxels = ndimage.rotate(PERSON.voxels, degrees, (1, 2), reshape=False, order=1, mode="constant", cval=-1024)
    return volume(voxels, PERSON.spacing_mm)


CHANGED = COPIES | {
    "turned by 5 degrees": turned(5),
    "voxel size wrong by 3 %": replace(PERSON, spacing_mm=(3.09, 2.06, 2.06)),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_copy_lies_on_its_original(name: str) -> None:
    (match,) = find_copies([volume_fingerprint(PERSON)], [volume_fingerprint(CHANGED[name])])
    found = correlation(coarse(PERSON), coarse(CHANGED[name]), match)
    assert found is not None
    assert found >= LEAST_CORRELATION
    (back,) = find_copies([volume_fingerprint(CHANGED[name])], [volume_fingerprint(PERSON)])
    other = correlation(coarse(CHANGED[name]), coarse(PERSON), back)
    assert other == pytest.approx(found, abs=0.03)


def test_the_scale_of_the_values_does_not_matter() -> None:
    squeezed = replace(PERSON, voxels=np.clip(PERSON.voxels // 2 + 40, -1024, 3000).astype(np.int16))
    found = correlation(coarse(PERSON), coarse(squeezed), at(0.0, 0.0, 0.0))
    assert found is not None
    assert found > 0.97


def at(*shift_mm: float, score: float = 5.0) -> Match:
    z, y, x = shift_mm
    return Match(0, 0, score, 10, IDENTITY, (z, y, x))


def test_other_people_do_not_follow_one_another() -> None:
    found = correlation(coarse(PERSON), coarse(OTHER), at(0.0, 0.0, 0.0))
    assert found is not None
    assert found < 0.8


@pytest.mark.parametrize(
    "voxels",
    [np.full((30, 60, 60), -1000, np.int16), np.full((30, 60, 60), 40, np.int16), np.full((1, 2, 2), 40, np.int16)],
)
def test_where_there_is_nothing_to_compare_nothing_is_said(voxels: NDArray[np.int16]) -> None:
    assert correlation(coarse(PERSON), coarse(volume(voxels, (2.0, 2.0, 2.0))), at(0.0, 0.0, 0.0)) is None


def test_an_overlap_of_a_corner_says_nothing() -> None:
    assert correlation(coarse(PERSON), coarse(PERSON), at(150.0, 150.0, 0.0)) is None


def row(key: str) -> FingerprintRow:
    return FingerprintRow(key, key, "", key, key, b"")


def overlay(is_readable: bool = True) -> Overlay:
    ours, theirs = (lambda key, mark=b"": STRANGERS.get(key)), (lambda key, mark=b"": STRANGERS[key])
    return Overlay(pictures_of(ours if is_readable else lambda key, mark=b"": None), pictures_of(theirs))


def judge(found: Overlay, other: str, score: float, evidence: Evidence = Evidence.NEAR_COPY) -> Link | None:
    # The slab's first slice is the mean of two: its centre lies half a slice deeper.
    match = at(-1.5, 0.0, 0.0, score=score)
    return found.judge([(row("own"), row(other), Link(0, 0, evidence, match))])


@pytest.mark.parametrize("score", [CANDIDATE_SCORE, LEAST_SCORE, CERTAIN_SCORE])
def test_a_true_copy_is_confirmed_whatever_its_score(score: float) -> None:
    found = overlay()
    link = judge(found, "copy", score)
    assert link is not None
    assert is_confirmed(link)
    assert (found.num_looked_at, found.num_confirmed, found.num_refuted) == (1, 1, 0)


@pytest.mark.parametrize(("score", "hits"), [(CANDIDATE_SCORE, 0), (LEAST_SCORE, 1), (CERTAIN_SCORE - 0.1, 1)])
def test_a_false_hit_is_refuted_and_counted(score: float, hits: int) -> None:
    found = overlay()
    assert judge(found, "other", score) is None
    assert (found.num_looked_at, found.num_confirmed) == (1, 0)
    assert (found.num_refuted, found.num_refuted_hits) == (1, hits)


def test_marks_of_a_certain_score_are_kept_with_what_the_voxels_say() -> None:
    found = overlay()
    link = judge(found, "other", CERTAIN_SCORE)
    assert link is not None
    assert link.correlation is not None
    assert not is_confirmed(link)
    assert found.num_refuted == 0


def test_voxels_that_cannot_be_read_drop_no_hit() -> None:
    found = overlay(is_readable=False)
    link = judge(found, "other", LEAST_SCORE)
    assert link is not None
    assert link.correlation is None
    assert judge(found, "other", LEAST_SCORE - 0.1) is None
    assert (found.num_looked_at, found.num_refuted) == (0, 0)


def test_a_patient_stays_one_when_voxels_say_it_is_another_scan() -> None:
    link = judge(overlay(), "other", LEAST_SCORE, Evidence.SAME_PATIENT)
    assert link == Link(0, 0, Evidence.SAME_PATIENT)
    equal = judge(overlay(), "own", LEAST_SCORE, Evidence.SAME_VOXELS)
    assert equal is not None
    assert equal.correlation is None
