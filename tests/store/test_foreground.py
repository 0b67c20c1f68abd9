"""The map of what is not air: the bits are those that FORMAT.md says, and shares are those of counted voxels."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import binary_fill_holes

from mim_scale.errors import DamagedError
from mim_scale.store.array_store import pyramid
from mim_scale.store.foreground import Foreground, foreground_bits
from mim_scale.store.geometry import level_geometry, num_voxels
from mim_scale.store.volume import Volume
from tests.synthetic import make_affine, make_volume, store_volume


@pytest.mark.parametrize(
    ("shape", "spacing_mm"),
    [
        ((40, 64, 56), (1.0, 1.0, 1.0)),
        ((9, 70, 66), (5.0, 0.8, 0.8)),
        ((33, 35, 37), (2.5, 0.8, 0.9)),
        ((3, 2, 50), (1.0, 3.0, 0.5)),
    ],
)
def test_a_row_says_which_blocks_are_not_air(tmp_path, shape, spacing_mm):
    volume = make_volume(shape, 3, spacing_mm)
    row = store_volume(tmp_path, volume)
    found = Foreground.of(row)
    coarsest = pyramid(volume)[-1]
    counts = tuple(-(-size // 4) for size in coarsest.shape)
    expected = np.zeros(counts, bool)
    for z, y, x in itertools.product(*map(range, counts)):
        expected[z, y, x] = (coarsest[4 * z : 4 * z + 4, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] > -500).any()
    expected = np.stack([binary_fill_holes(layer) for layer in expected])
    np.testing.assert_array_equal(found.blocks, expected)
    assert 0 < expected.sum() < expected.size or min(shape) < 9
    factor = level_geometry(shape, spacing_mm, 3)[-1][1]
    assert (found.block, found.shape) == (tuple(4 * by for by in factor), shape)
    # As FORMAT.md has it: x fastest, the first one in the highest bit, filled up with 0.
    bits = "".join(str(int(bit)) for bit in expected.ravel())
    assert row.foreground == int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")


@given(st.tuples(*[st.integers(1, 12)] * 3), st.integers(0, 2**32), st.floats(0.2, 0.9))
def test_what_is_enclosed_in_its_layer_is_no_air(counts, seed, density):
    blocks = np.random.default_rng(seed).random(counts) < density
    bits = foreground_bits(np.where(blocks, 0, -1000).astype(np.int16).repeat(4, 0).repeat(4, 1).repeat(4, 2))
    assert bits == np.packbits(np.stack([binary_fill_holes(layer) for layer in blocks])).tobytes()


def test_half_way_to_water_is_still_air():
    voxels = np.full((4, 4, 8), -500, np.int16)
    assert foreground_bits(voxels) == b"\x00"
    voxels[3, 3, 4] = -499
    assert foreground_bits(voxels) == b"\x40"


def test_a_map_of_another_shape_is_damage(tmp_path):
    row = store_volume(tmp_path, Volume(np.zeros((8, 8, 8), np.int16), (1.0, 1.0, 1.0), make_affine((1.0, 1.0, 1.0))))
    for bits in (b"", b"\x80\x00"):
        with pytest.raises(DamagedError, match=rf"volume {row.key}: its foreground .* {len(bits)} bytes, expected 1"):
            Foreground.of(dataclasses.replace(row, foreground=bits))


@st.composite
def maps(draw):
    """Any blocks of any size, the last ones cut short."""
    block = draw(st.tuples(*[st.integers(1, 6)] * 3))
    shape = draw(st.tuples(*[st.integers(1, 14)] * 3))
    counts = tuple(-(-size // by) for size, by in zip(shape, block, strict=True))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    return Foreground(random.random(counts) < draw(st.sampled_from([0.1, 0.5, 0.9, 1.0])), block, shape)


@given(maps(), st.data())
def test_amounts_are_those_of_counted_voxels(foreground, data):
    cells, size = (data.draw(st.tuples(*[st.integers(1, most)] * 3)) for most in (4, 12))
    starts = data.draw(st.lists(st.tuples(*[st.integers(-14, 16)] * 3), min_size=1, max_size=3))
    voxels = foreground.blocks
    for axis in range(3):
        voxels = voxels.repeat(foreground.block[axis], axis).take(range(foreground.shape[axis]), axis)
    around = np.pad(voxels, 32)
    found = foreground.amounts(np.array(starts), size, cells)
    assert found.shape == (len(starts), num_voxels(cells))
    for start, amounts in zip(starts, found, strict=True):
        box = around[tuple(slice(s + 32, s + 32 + n) for s, n in zip(start, size, strict=True))]
        # Each voxel cut into as many parts along an axis as there are cells.
        for axis in range(3):
            box = box.repeat(cells[axis], axis)
        z, y, x = cells
        parts = box.reshape(z, size[0], y, size[1], x, size[2])
        assert amounts.tolist() == parts.sum(axis=(1, 3, 5)).ravel().tolist()
