"""Whatever the order, plane and step of slices: one order and affine, and every gap, tilt and repeat is found."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.reasons import Reason, Rejected
from data_pipeline.sources.dicom_geometry import Slice, stack_slices
from tests.pipeline.sources import rotation


def _stack(
    degrees: tuple[float, ...], step: float, count: int, origin: tuple[float, ...], spacing: tuple[float, float]
) -> list[Slice]:
    """A regular stack, foot of its normal first."""
    turn = rotation(degrees)
    orientation = tuple(float(number) for number in turn[:, :2].T.ravel())
    places = np.array(origin) + np.outer(np.arange(count) * step, turn[:, 2])
    return [Slice(_triple(place), orientation, spacing, (64, 48)) for place in places]  # type: ignore[arg-type]


def _triple(place: NDArray[np.float64]) -> tuple[float, float, float]:
    x, y, z = (float(number) for number in place)
    return x, y, z


DEGREES = st.floats(-180, 180)
STACKS = st.builds(
    _stack,
    st.tuples(DEGREES, DEGREES, DEGREES),
    st.floats(0.2, 10),
    st.integers(4, 40),
    st.tuples(*[st.floats(-500, 500)] * 3),
    st.tuples(st.floats(0.3, 1.5), st.floats(0.3, 1.5)),
)


def _moved(slice_: Slice, offset: NDArray[np.float64]) -> Slice:
    return replace(slice_, position=_triple(np.array(slice_.position) + offset))


def _normal(stack: list[Slice]) -> NDArray[np.float64]:
    return np.cross(stack[0].orientation[:3], stack[0].orientation[3:])


def _step(stack: list[Slice]) -> float:
    return float(np.linalg.norm(np.subtract(stack[1].position, stack[0].position)))


def _refused(slices: list[Slice]) -> tuple[Reason, str]:
    with pytest.raises(Rejected) as caught:
        stack_slices(slices)
    return caught.value.reason, caught.value.detail


@given(STACKS, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_any_permutation_gives_the_same_order_and_affine(stack, random):
    shuffled = list(stack)
    random.shuffle(shuffled)
    order, affine = stack_slices(shuffled)
    assert [shuffled[index] for index in order] == stack
    np.testing.assert_array_equal(affine, stack_slices(stack)[1])


@given(STACKS)
@settings(max_examples=60, deadline=None)
def test_the_affine_hits_every_slice_and_pixel(stack):
    _, affine = stack_slices(stack)
    row, column = np.array(stack[0].orientation[:3]), np.array(stack[0].orientation[3:])
    for place, slice_ in enumerate(stack):
        corner = np.array(slice_.position) + row * slice_.spacing[1] * 47 + column * slice_.spacing[0] * 63
        np.testing.assert_allclose((affine @ [47, 63, place, 1])[:3], corner, atol=1e-6)
    assert np.linalg.det(affine[:3, :3]) > 0


@given(STACKS, st.data())
@settings(max_examples=60, deadline=None)
def test_every_gap_is_found_and_counted(stack, data):
    inner = st.integers(1, len(stack) - 2)
    gone = data.draw(st.sets(inner, min_size=1, max_size=max(1, (len(stack) - 2) // 2)))
    kept = [slice_ for index, slice_ in enumerate(stack) if index not in gone]
    if len(set(np.diff([index for index in range(len(stack)) if index not in gone]))) == 1:
        return  # every second one is left: a regular stack of twice the step
    reason, detail = _refused(kept)
    if 1 in np.diff([index for index in range(len(stack)) if index not in gone]):
        assert (reason, detail) == (
            Reason.MISSING_SLICES,
            f"{len(gone)} of {len(stack)} slices missing by their positions",
        )
    else:
        assert reason in {Reason.MISSING_SLICES, Reason.UNEVEN_SPACING}


@given(STACKS, st.data())
@settings(max_examples=60, deadline=None)
def test_every_repeat_is_found_and_counted(stack, data):
    again = data.draw(st.lists(st.sampled_from(stack), min_size=1, max_size=5))
    total = len(stack) + len(again)
    assert _refused([*again, *stack]) == (
        Reason.REPEATED_POSITIONS,
        f"{len(again)} of {total} slices lie where another one lies",
    )


@given(STACKS, st.floats(3, 40), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_tilt_is_found_and_measured(stack, degrees, along_rows):
    sideways = np.array(stack[0].orientation[:3] if along_rows else stack[0].orientation[3:])
    slide = _step(stack) * np.tan(np.radians(degrees))
    tilted = [_moved(slice_, sideways * slide * index) for index, slice_ in enumerate(stack)]
    if slide * (len(stack) - 1) <= 0.6 * min(stack[0].spacing):
        return  # less than a pixel from end to end: no shear that a voxel could show
    assert _refused(tilted) == (Reason.GANTRY_TILT, f"slices slide sideways by {degrees:.1f} degrees")


@given(STACKS, st.data())
@settings(max_examples=60, deadline=None)
def test_a_slice_out_of_step_is_found(stack, data):
    index = data.draw(st.integers(1, len(stack) - 2))
    moved = list(stack)
    moved[index] = _moved(stack[index], _normal(stack) * _step(stack) * data.draw(st.sampled_from([-0.45, 0.4, 0.45])))
    assert _refused(moved)[0] in {Reason.UNEVEN_SPACING, Reason.MISSING_SLICES}


@given(STACKS, st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_one_slice_of_another_plane_size_or_spacing_is_found(stack, random):
    index = random.randrange(len(stack))

    def with_one(slice_: Slice) -> list[Slice]:
        return [*stack[:index], slice_, *stack[index + 1 :]]

    turned = (*stack[index].orientation[3:], *stack[index].orientation[:3])
    assert _refused(with_one(replace(stack[index], orientation=turned)))[0] == Reason.MIXED_ORIENTATION
    assert _refused(with_one(replace(stack[index], size=(64, 64))))[0] == Reason.MIXED_SIZES
    assert _refused(with_one(replace(stack[index], spacing=(2.0, 2.0))))[0] == Reason.MIXED_SIZES


def test_directions_that_are_nearly_right_are_made_right():
    """Cosines written with two decimals are not of unit length: their error must not get into spacing or shear."""
    stack = _stack((12, -37, 20), 2.0, 6, (0, 0, 0), (0.8, 0.8))
    rounded = [replace(slice_, orientation=tuple(round(n, 2) for n in slice_.orientation)) for slice_ in stack]  # type: ignore[arg-type]
    _, affine = stack_slices(rounded)
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    np.testing.assert_allclose(steps, (0.8, 0.8, 2.0), rtol=1e-4)
    np.testing.assert_allclose((affine[:3, :3] / steps).T @ (affine[:3, :3] / steps), np.eye(3), atol=1e-9)


@pytest.mark.parametrize("orientation", [(0,) * 6, (1, 0, 0, 1, 0, 0), (2, 0, 0, 0, 1, 0), (1, 0, 0, 0.2, 1, 0)])
def test_no_directions_are_no_geometry(orientation):
    stack = [replace(slice_, orientation=orientation) for slice_ in _stack((0, 0, 0), 2.0, 6, (0, 0, 0), (0.8, 0.8))]
    assert _refused(stack)[0] == Reason.NO_GEOMETRY
