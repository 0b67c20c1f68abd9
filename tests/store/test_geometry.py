"""Boxes and levels as arithmetic: what holds for every shape."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mim_scale.store.array_store import halve
from mim_scale.store.geometry import Box, blocks, level_geometry, num_voxels

sizes = st.integers(1, 40)
shapes = st.tuples(sizes, sizes, sizes)
starts = st.tuples(*[st.integers(-20, 60)] * 3)
spacings = st.tuples(*[st.floats(0.3, 10.0)] * 3)


@given(starts, shapes, shapes)
def test_blocks_cut_a_box_into_parts_that_cover_it_once(start, size, block):
    box = Box(start, size)
    seen = np.zeros(size, int)
    for index, part in blocks(box, block):
        assert part.is_inside(box.stop) or min(part.start) < 0
        assert all(
            s // b == i and (e - 1) // b == i for s, e, b, i in zip(part.start, part.stop, block, index, strict=True)
        )
        seen[part.moved((-start[0], -start[1], -start[2])).slices] += 1
    assert (seen == 1).all()


@given(starts, shapes, shapes)
def test_clipped_is_what_lies_inside(start, size, shape):
    box = Box(start, size)
    inside = np.zeros(shape, bool)
    grid = np.indices(shape)
    for axis in range(3):
        low, high = box.start[axis], box.stop[axis]
        inside = ((grid[axis] >= low) & (grid[axis] < high)) & (inside if axis else True)
    clipped = box.clipped(shape)
    assert inside[clipped.slices].all()
    assert inside.sum() == num_voxels(clipped.size)
    assert box.is_inside(shape) == (clipped == box)


@given(shapes, spacings)
def test_levels_halve_only_the_axes_that_are_fine(shape, spacing):
    levels = level_geometry(shape, spacing, 3)
    assert levels[0] == (shape, (1, 1, 1))
    for (size, factor), (next_size, next_factor) in itertools.pairwise(levels):
        now = [s * f for s, f in zip(spacing, factor, strict=True)]
        for axis in range(3):
            step = next_factor[axis] // factor[axis]
            assert step == (2 if now[axis] < 2 * min(now) and size[axis] > 1 else 1)
            assert next_size[axis] == -(-size[axis] // step)


def test_thick_slices_stay_until_the_plane_has_caught_up():
    levels = level_geometry((40, 512, 511), (5.0, 0.7, 0.7), 3)
    assert levels == [((40, 512, 511), (1, 1, 1)), ((40, 256, 256), (1, 2, 2)), ((40, 128, 128), (1, 4, 4))]
    assert level_geometry((41, 64, 64), (1.0, 0.8, 0.8), 2)[1] == ((21, 32, 32), (2, 2, 2))


@given(
    st.tuples(st.integers(1, 18), *[st.integers(1, 7)] * 2),
    st.tuples(*[st.sampled_from([1, 2])] * 3),
    st.integers(0, 99),
)
def test_halve_is_the_mean_rounded_half_up(shape, factor, seed):
    voxels = np.random.default_rng(seed).integers(-1024, 3072, shape).astype(np.int16)
    result = halve(voxels, factor)
    padded = np.pad(voxels, [(0, -size % by) for size, by in zip(shape, factor, strict=True)], mode="edge")
    for index in np.ndindex(*result.shape):
        block = padded[tuple(slice(i * by, (i + 1) * by) for i, by in zip(index, factor, strict=True))]
        assert result[index] == np.floor(block.astype(np.float64).mean() + 0.5)
