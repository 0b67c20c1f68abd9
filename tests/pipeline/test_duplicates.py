"""Near-copies are found whatever was done to them, people are kept apart, and groups follow."""

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from data_pipeline.canonical import resample
from data_pipeline.duplicates import IDENTITY, LEAST_SCORE, Evidence, find_copies, groups, links
from data_pipeline.volume_fingerprint import FRAMES, MOST_MARKS, unpack, volume_fingerprint
from mim_scale.store.geometry import Spacing3
from mim_scale.store.manifest import FingerprintRow
from mim_scale.store.volume import Volume
from tests.synthetic import make_affine


def person(seed: int, shape: tuple[int, int, int] = (60, 100, 110)) -> Volume:
    """Soft tissue with structures of all sizes, no symmetry, in air; 3 mm slices of 2 mm pixels."""
    random = np.random.default_rng(seed)
    hu = np.full(shape, 30.0)
    for sigma in (2.0, 4.0, 8.0):
        noise = ndimage.gaussian_filter(random.normal(size=shape), sigma)
        hu += 60 * noise / noise.std()
    _, y, x = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    hu[y**2 + x**2 > 0.9] = -1000
    return volume(np.clip(hu, -1024, 3000).astype(np.int16), (3.0, 2.0, 2.0))


def volume(voxels: NDArray[np.int16], spacing_mm: Spacing3) -> Volume:
    return Volume(np.ascontiguousarray(voxels), spacing_mm, make_affine(spacing_mm))


PERSON = person(1)
COPIES = {
    "flipped": volume(PERSON.voxels[:, :, ::-1], PERSON.spacing_mm),
    "permuted and flipped": volume(PERSON.voxels.transpose(2, 0, 1)[::-1, :, ::-1], (2.0, 3.0, 2.0)),
    "resampled": resample(PERSON, (5.0, 1.5, 1.5)),
    "half of the slices": volume(PERSON.voxels[10:40], PERSON.spacing_mm),
    "cut in plane": volume(PERSON.voxels[:, 20:80, 30:96], PERSON.spacing_mm),
    "soft-tissue window": volume(np.clip(PERSON.voxels, -160, 240), PERSON.spacing_mm),
    "wide window": volume(np.clip(PERSON.voxels, -1000, 400), PERSON.spacing_mm),
    "every second slice": volume(PERSON.voxels[1::2], (6.0, 2.0, 2.0)),
    "slabs": volume(PERSON.voxels.reshape(30, 2, 100, 110).mean(1).astype(np.int16), (6.0, 2.0, 2.0)),
    "noise": volume(
        PERSON.voxels + np.random.default_rng(3).normal(0, 15, PERSON.shape).astype(np.int16), PERSON.spacing_mm
    ),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_found_among_other_people(name: str) -> None:
    corpus = [volume_fingerprint(person(seed)) for seed in (5, 1, 6)]
    found = find_copies(corpus, [volume_fingerprint(COPIES[name])])
    assert [(match.a, match.b) for match in found] == [(1, 0)]


def test_people_are_no_copies_of_one_another() -> None:
    assert find_copies([volume_fingerprint(person(seed)) for seed in range(10, 16)], least_score=LEAST_SCORE / 2) == []


def test_a_match_tells_how_the_copy_lies() -> None:
    (match,) = find_copies(
        [volume_fingerprint(PERSON)],
        [volume_fingerprint(volume(PERSON.voxels[12:, ::-1, 20:], PERSON.spacing_mm))],
    )
    assert FRAMES[match.relation].tolist() == [[1, 0, 0], [0, -1, 0], [0, 0, 1]]
    assert np.allclose(match.shift_mm, (-36.0, 198.0, -40.0), atol=2.5)
    (same,) = find_copies([volume_fingerprint(PERSON)], [volume_fingerprint(PERSON)])
    assert same.relation == IDENTITY
    assert np.allclose(same.shift_mm, 0)


def test_a_fingerprint_is_small_and_the_same_again() -> None:
    mark = volume_fingerprint(PERSON)
    assert mark == volume_fingerprint(volume(PERSON.voxels.copy(), PERSON.spacing_mm))
    assert 0 < len(unpack(mark)) <= MOST_MARKS
    assert len(mark) <= 6000


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 40, 40), (5, 5, 5), (40, 3, 40)])
def test_small_volumes_have_few_marks_and_no_copies(shape: tuple[int, int, int]) -> None:
    voxels = np.random.default_rng(0).integers(-100, 200, shape).astype(np.int16)
    mark = volume_fingerprint(volume(voxels, (1.0, 1.0, 1.0)))
    assert find_copies([mark], [volume_fingerprint(PERSON)]) == []
    flat = volume_fingerprint(volume(np.zeros((40, 40, 40), np.int16), (2.0, 2.0, 2.0)))
    assert len(unpack(flat)) == 0
    assert find_copies([flat, b""]) == []


@pytest.mark.parametrize("damaged", [b"\x07", b"\x01abc", b"\x09" + bytes(23)])
def test_what_is_no_fingerprint_is_refused(damaged: bytes) -> None:
    with pytest.raises(ValueError, match="no volume fingerprint"):
        find_copies([damaged], [volume_fingerprint(PERSON)])


def row(key: str, subject: str, mark: bytes = b"", **values: str) -> FingerprintRow:
    return dataclasses.replace(FingerprintRow(key, subject, "", key * 4, key * 4, mark), **values)


def test_groups_join_by_every_evidence_and_chain() -> None:
    own, copy, other = (volume_fingerprint(v) for v in (PERSON, COPIES["flipped"], person(9)))
    rows = [
        row("k1", "s4", own),
        row("k2", "s3", copy),
        row("k3", "s3"),
        row("k4", "s2", series="one"),
        row("k5", "s5", series="one"),
        row("k6", "s6", other),
        row("k7", "s7", voxel_hash="v"),
        row("k8", "s1", voxel_hash="v"),
    ]
    expected = {"k1": "s3", "k2": "s3", "k3": "s3", "k4": "s2", "k5": "s2", "k6": "s6", "k7": "s1", "k8": "s1"}
    assert groups(rows) == expected
    assert groups(rows[::-1]) == expected


def test_links_give_the_strongest_evidence_and_no_pseudonyms_of_another_key() -> None:
    mark = volume_fingerprint(PERSON)
    a = [row("k1", "s1", mark, series="one")]
    b = [row("k2", "s1", mark, series="one"), row("k3", "s1"), row("k1", "s9", mark)]
    assert [link.evidence for link in links(a, b)] == [
        Evidence.SAME_SERIES,
        Evidence.SAME_PATIENT,
        Evidence.SAME_VOXELS,
    ]
    assert [link.b for link in links(a, b, same_key=False)] == [0, 2]
    assert links(a, b, same_key=False)[0].evidence == Evidence.NEAR_COPY
