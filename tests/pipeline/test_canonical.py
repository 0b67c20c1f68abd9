"""The store's conventions, as properties: how a file lays out its axes never changes the volume."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from data_pipeline.canonical import canonical, resample
from data_pipeline.reasons import Rejected
from data_pipeline.screen import screen
from data_pipeline.sources.source import Scan
from mim_scale.store.volume import AIR_HU, Volume, content_hash
from tests.pipeline.sources import phantom, rotation
from tests.synthetic import make_volume

PERMUTATIONS = list(itertools.permutations(range(3)))


def _relaid(volume: Volume, axes: tuple[int, ...], flips: tuple[bool, ...]) -> Scan:
    """The same volume as a file with other axes would hold it."""
    voxels, affine = volume.voxels.transpose(2, 1, 0).transpose(axes), volume.affine.copy()
    affine[:, :3] = volume.affine[:, list(axes)]
    for axis, flip in enumerate(flips):
        if flip:
            affine[:3, 3] += affine[:3, axis] * (voxels.shape[axis] - 1)
            affine[:3, axis] *= -1
            voxels = np.flip(voxels, axis)
    return Scan(voxels, affine)


@settings(max_examples=40, deadline=None)
@given(
    axes=st.sampled_from(PERMUTATIONS),
    flips=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    degrees=st.tuples(*[st.floats(-30, 30)] * 3),
)
def test_layout_of_the_axes_does_not_matter(
    axes: tuple[int, ...], flips: tuple[bool, ...], degrees: tuple[float, ...]
) -> None:
    volume = make_volume((9, 10, 11), spacing_mm=(2.5, 0.9, 0.8))
    tilted = volume.affine.copy()
    tilted[:3, :3] = rotation(degrees) @ tilted[:3, :3]
    volume = Volume(volume.voxels, volume.spacing_mm, tilted)
    result, repairs = canonical(_relaid(volume, axes, flips))
    np.testing.assert_array_equal(result.voxels, volume.voxels)
    np.testing.assert_allclose(result.affine, volume.affine, atol=1e-9)
    assert content_hash(result) == content_hash(volume)
    assert ("reoriented" in repairs) == (axes != (0, 1, 2) or any(flips))
    assert np.linalg.det(result.affine[:3, :3]) > 0


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.floats(0.4, 6.0)] * 3))
def test_resampling_keeps_place_and_range(spacing_mm: tuple[float, float, float]) -> None:
    volume = make_volume((12, 20, 18), spacing_mm=(2.5, 0.9, 0.8))
    result = resample(volume, spacing_mm)
    assert result.spacing_mm == spacing_mm
    np.testing.assert_allclose(np.linalg.norm(result.affine[:3, :3], axis=0)[::-1], spacing_mm)
    assert AIR_HU <= result.voxels.min() <= result.voxels.max() <= volume.voxels.max()
    first_corner = [affine @ np.array([-0.5, -0.5, -0.5, 1]) for affine in (volume.affine, result.affine)]
    np.testing.assert_allclose(*first_corner, atol=1e-9)
    extent = np.multiply(result.voxels.shape, spacing_mm) - np.multiply(volume.voxels.shape, volume.spacing_mm)
    assert (np.abs(extent) <= np.maximum(spacing_mm, 0) / 2 + 1e-6).all() or min(result.voxels.shape) == 1


def test_a_plane_of_values_stays_a_plane() -> None:
    """Linear interpolation is exact on a ramp, so this finds any shift by part of a voxel."""
    ramp = np.broadcast_to(np.arange(40, dtype=np.int16) * 40 - 800, (20, 20, 40)).copy()
    volume = make_volume((20, 20, 40), spacing_mm=(1.0, 1.0, 1.0))
    result = resample(Volume(ramp, (1.0, 1.0, 1.0), volume.affine), (1.0, 1.0, 2.0))
    x = (result.affine @ np.array([[i, 0, 0, 1] for i in range(20)]).T)[0] - volume.affine[0, 3]
    np.testing.assert_allclose(result.voxels[5, 5, 2:-2], (x * 40 - 800)[2:-2], atol=0.51)


def test_fine_detail_is_averaged_not_aliased() -> None:
    stripes = np.where(np.arange(64) % 2 == 0, 1000, -1000).astype(np.int16)
    voxels = np.broadcast_to(stripes, (16, 16, 64)).copy()
    result = resample(Volume(voxels, (1.0, 1.0, 1.0), np.eye(4)), (1.0, 1.0, 4.0))
    assert np.abs(result.voxels[:, :, 2:-2]).max() < 50


def test_resampling_equals_the_same_steps_on_the_whole_volume() -> None:
    volume, spacing_mm = make_volume((12, 20, 18), spacing_mm=(2.5, 0.9, 0.8)), (1.5, 1.5, 1.5)
    factors = np.array(spacing_mm) / volume.spacing_mm
    smooth = ndimage.gaussian_filter(volume.voxels.astype(np.float64), np.maximum((factors - 1) / 2, 0), mode="nearest")
    result = resample(volume, spacing_mm)
    expected = ndimage.affine_transform(
        smooth, factors, factors / 2 - 0.5, output_shape=result.voxels.shape, order=1, mode="nearest"
    )
    np.testing.assert_allclose(result.voxels, expected, atol=0.51)


def test_own_spacing_is_not_resampled() -> None:
    volume = make_volume((9, 10, 11), spacing_mm=(2.5, 0.9, 0.8))
    scan = Scan(volume.voxels.transpose(2, 1, 0), volume.affine)
    same, repairs = canonical(scan, (2.5, 0.9, 0.8))
    assert "resampled" not in repairs
    assert content_hash(same) == content_hash(volume)
    assert "resampled" in canonical(scan, (2.5, 0.9, 0.9))[1]


def test_below_air_becomes_air_and_is_recorded() -> None:
    voxels = phantom().astype(np.int32)
    voxels[2, 2, 2], voxels[3, 3, 3] = -100_000, -1025
    volume, repairs = canonical(Scan(voxels.transpose(2, 1, 0), np.diag([1.0, 1.0, 1.0, 1.0])))
    assert repairs == ("padding_mapped",)
    assert volume.voxels[2, 2, 2] == volume.voxels[3, 3, 3] == AIR_HU


@pytest.mark.parametrize("low_high", [(-199, 500), (-1024, 99)])
def test_screen_wants_air_and_something_dense(low_high: tuple[int, int]) -> None:
    voxels = np.full((20, 20, 20), low_high[0], np.int16)
    voxels[0] = low_high[1]
    with pytest.raises(Rejected, match="hu_implausible"):
        screen(voxels, 16)
    voxels[1], voxels[2] = -200, 100
    screen(voxels, 16)


@settings(max_examples=60, deadline=None)
@given(
    axes=st.sampled_from(PERMUTATIONS),
    flips=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    dtype=st.sampled_from(
        ["int8", "uint8", "int16", ">i2", "uint16", "int32", "int64", "float16", "float32", ">f4", "f8"]
    ),
    fraction=st.sampled_from([0.0, 0.25, 0.5]),
    low=st.sampled_from([-30_000, -1025, -1024, -1000]),
)
def test_slabs_give_what_whole_arrays_would(
    axes: tuple[int, ...], flips: tuple[bool, ...], dtype: str, fraction: float, low: int
) -> None:
    values = phantom().astype(np.float64) + fraction
    values[2, 3, 4] = low
    kind = np.dtype(dtype)
    if kind.kind != "f":
        values = np.clip(values, *(np.iinfo(kind).min, np.iinfo(kind).max))
    volume = make_volume(values.shape)
    scan = _relaid(Volume(values.astype(kind), volume.spacing_mm, volume.affine), axes, flips)  # type: ignore[arg-type]
    result, repairs = canonical(scan)
    stored = values.astype(kind).astype(np.float64)
    np.testing.assert_array_equal(result.voxels, np.maximum(np.rint(stored), AIR_HU).astype(np.int16))
    assert result.voxels.flags.c_contiguous
    assert ("rounded" in repairs) == bool((stored != np.rint(stored)).any())
    assert ("padding_mapped" in repairs) == bool(stored.min() < AIR_HU)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0, 0), (9, 3, 2), (-1, -1, -1)])
def test_voxels_that_are_no_numbers_are_found_wherever_they_lie(
    dtype: str, value: float, place: tuple[int, int, int]
) -> None:
    voxels = phantom().astype(dtype)
    voxels[place] = voxels[5, 5, 5] = value
    for array in (voxels, np.asfortranarray(voxels)):
        with pytest.raises(Rejected, match="non_finite: 2 voxels are NaN or infinite"):
            canonical(Scan(array.transpose(2, 1, 0), np.eye(4)))


def test_a_volume_that_is_canonical_is_not_copied() -> None:
    voxels = phantom()
    assert np.shares_memory(canonical(Scan(voxels.transpose(2, 1, 0), np.eye(4)))[0].voxels, voxels)


@pytest.mark.parametrize("dtype", ["int32", "float32", "float64"])
def test_no_second_copy_of_the_voxels_is_made(dtype: str) -> None:
    voxels = np.tile(phantom(shape=(16, 64, 64)), (4, 1, 1)).astype(dtype)
    scan = Scan(voxels.transpose(2, 1, 0), np.eye(4))
    canonical(scan)
    tracemalloc.start()
    canonical(scan)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < voxels.size * 2 + voxels.nbytes / 4


def test_screen_finds_shifted_scales_behind_padding() -> None:
    noise = np.random.default_rng(0).normal(0, 12, (40, 40, 40))
    hu = (np.repeat([-990, -80, 40, 60, 300], 8) + noise).astype(np.int16)
    assert screen(hu, 16) == ()
    stored = hu + np.int16(1024)
    stored[:, :4] = AIR_HU
    with pytest.raises(Rejected, match="an intercept of -1024 was not applied"):
        screen(stored, 16)
    twice = hu - np.int16(1024)
    with pytest.raises(Rejected, match="an intercept was applied twice"):
        canonical(Scan(twice.transpose(2, 1, 0), np.eye(4)))


def test_values_cut_by_a_window_are_flagged() -> None:
    hu = phantom().astype(np.int16)
    hu[hu == hu.max()] -= 1
    assert "clipped_hu" not in screen(hu, 16)
    assert "clipped_hu" in screen(np.minimum(hu, 150), 16)
