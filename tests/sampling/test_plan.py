"""Plans: boxes inside, children in hidden cells and only there, counts exact, for every config that is allowed."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mim_scale.config import LevelConfig, PlanConfig
from mim_scale.sampling.plan import plan
from tests.sampling.strategies import plan_configs, positions, seeds, shapes
from tests.synthetic import make_plan_config


def arrays(planned):
    return [array for level in planned.levels for array in vars(level).values()]


@given(seeds, positions, shapes, plan_configs(), st.booleans())
def test_a_plan_is_pure_and_typed(seed, position, shape, config, held_out):
    first, second = (plan(seed, position, shape, config, held_out) for _ in range(2))
    assert first.box == second.box
    for a, b in zip(arrays(first), arrays(second), strict=True):
        assert a.dtype == np.int32
        np.testing.assert_array_equal(a, b)


@given(seeds, positions, shapes, plan_configs())
def test_outer_box_is_inside_or_centred(seed, position, shape, config):
    box = plan(seed, position, shape, config).box
    assert box.size == config.box
    for start, stop, size in zip(box.start, box.stop, shape, strict=True):
        if size >= stop - start:
            assert start >= 0
            assert stop <= size
        else:
            before, after = -start, stop - size
            assert 0 <= after - before <= 1


@given(seeds, positions, shapes, plan_configs())
def test_visible_and_hidden_partition_the_tokens(seed, position, shape, config):
    for level, planned in enumerate(plan(seed, position, shape, config).levels):
        assert planned.visible.shape == (config.num_views(level), config.num_tokens - config.num_hidden(level)[0])
        assert planned.hidden.shape == (config.num_views(level), config.num_hidden(level)[0])
        for visible, hidden in zip(planned.visible, planned.hidden, strict=True):
            assert (np.diff(visible) > 0).all()
            assert (np.diff(hidden) > 0).all()
            assert sorted([*visible, *hidden]) == list(range(config.num_tokens))


@given(seeds, positions, shapes, plan_configs())
def test_hidden_tokens_are_whole_cells(seed, position, shape, config):
    for level, planned in enumerate(plan(seed, position, shape, config).levels):
        cells = config.cells(level)
        inner = [size // count for size, count in zip(config.grid, cells, strict=True)]
        for hidden in planned.hidden:
            grid = np.zeros(config.grid, bool)
            grid.ravel()[hidden] = True
            blocks = grid.reshape(cells[0], inner[0], cells[1], inner[1], cells[2], inner[2]).transpose(
                0, 2, 4, 1, 3, 5
            )
            share = blocks.reshape(math.prod(cells), -1).mean(axis=1)
            assert set(share.tolist()) <= {0.0, 1.0}
            assert share.sum() == config.num_hidden_cells(level)[0]


def shown_and_hidden(config, planned, level, view):
    """Voxels of the outer box that a view shows, and those of them that it hides."""
    region, start = config.region(level), planned.levels[level].starts[view]
    shown, masked = (np.zeros(config.box, bool) for _ in range(2))
    slices = tuple(slice(s, s + size) for s, size in zip(start.tolist(), region, strict=True))
    assert all(part.start >= 0 and part.stop <= size for part, size in zip(slices, config.box, strict=True))
    shown[slices] = True
    # A voxel of the region is hidden where its cell is: cells divide the region, tokens need not.
    cells, grid = config.cells(level), np.zeros(config.grid, bool)
    grid.ravel()[planned.levels[level].hidden[view]] = True
    per_cell = grid[tuple(slice(None, None, g // c) for g, c in zip(config.grid, cells, strict=True))]
    if all(size % count == 0 for size, count in zip(region, cells, strict=True)):
        masked[slices] = np.kron(per_cell, np.ones([s // c for s, c in zip(region, cells, strict=True)], bool))
    return shown, masked


@given(seeds, positions, shapes, plan_configs())
def test_what_a_child_shows_is_hidden_from_its_parent_in_full(seed, position, shape, config):
    planned = plan(seed, position, shape, config)
    assert planned.levels[0].starts.tolist() == [[0, 0, 0]]
    assert planned.levels[0].parent.tolist() == planned.levels[0].cell.tolist() == [-1]
    if math.prod(config.box) > 200_000:  # the painted check below is for boxes that fit; the arithmetic is the same
        return
    for level in range(1, len(planned.levels)):
        for view, parent in enumerate(planned.levels[level].parent.tolist()):
            shown, _ = shown_and_hidden(config, planned, level, view)
            parent_shown, parent_hidden = shown_and_hidden(config, planned, level - 1, parent)
            assert shown.sum() == math.prod(config.region(level))
            assert (shown <= parent_shown).all()
            assert (shown <= parent_hidden).all()


@given(seeds, positions, shapes, plan_configs())
def test_children_are_distinct_hidden_cells_in_order(seed, position, shape, config):
    planned = plan(seed, position, shape, config)
    for level in range(1, len(planned.levels)):
        now, before = planned.levels[level], planned.levels[level - 1]
        views, cells = config.levels[level].views, config.cells(level - 1)
        assert now.parent.tolist() == np.repeat(np.arange(len(before.parent)), views).tolist()
        inner = [size // count for size, count in zip(config.grid, cells, strict=True)]
        for parent in range(len(before.parent)):
            own = now.cell[now.parent == parent]
            assert (np.diff(own) > 0).all()
            z, y, x = np.unravel_index(before.hidden[parent], config.grid)
            hidden_cells = np.ravel_multi_index((z // inner[0], y // inner[1], x // inner[2]), cells)
            assert set(own.tolist()) <= set(hidden_cells.tolist())
            corners = np.stack(np.unravel_index(own, cells), 1) * config.region(level) + before.starts[parent]
            np.testing.assert_array_equal(now.starts[now.parent == parent], corners)


def masks(seed, position, config, held_out=False):
    return b"".join(array.tobytes() for array in arrays(plan(seed, position, (300, 300, 300), config, held_out)))


@given(seeds, positions)
def test_neighbours_seeds_and_sides_have_their_own_plans(seed, position):
    config = make_plan_config()
    own = masks(seed, position, config)
    assert own != masks(seed, position + 1, config)
    assert own != masks((seed + 1) % 2**63, position, config)
    assert own != masks(seed, position, config, held_out=True)


def test_every_cell_is_hidden_and_chosen_equally_often():
    config = make_plan_config()
    plans = [plan(3, position, (60, 60, 60), config) for position in range(2000)]
    hidden = np.zeros(8)
    for planned in plans:
        hidden[np.unique(planned.levels[1].cell)] += 1
    assert abs(hidden / 2000 - 3 / 8).max() < 0.05
    tokens = np.bincount(np.concatenate([p.levels[1].hidden.ravel() for p in plans]), minlength=216) / (2000 * 3)
    assert abs(tokens - 130 / 216).max() < 0.05
    starts = np.array([planned.box.start for planned in plans])
    assert starts.min(axis=0).tolist() == [0, 0, 0]
    assert starts.max(axis=0).tolist() == [12, 12, 12]


def test_octants_are_true_octants():
    config = make_plan_config(box=192, view=96, token=16, views=(4, 4))
    planned = plan(0, 0, (192, 192, 192), config)
    first = planned.levels[0]
    assert first.visible.shape == first.hidden.shape == (1, 108)
    z, y, x = np.unravel_index(first.hidden[0], (6, 6, 6))
    octants, counts = np.unique((z // 3) * 4 + (y // 3) * 2 + x // 3, return_counts=True)
    assert counts.tolist() == [27] * 4
    assert planned.levels[1].cell.tolist() == octants.tolist()
    assert config.region(1) == (96, 96, 96)
    assert config.region(2) == (16, 16, 16)
    assert len(planned.levels[2].starts) == 16


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([(0.01, 2, 1)], "hides 0 of 8 cells"),
        ([(0.99, 2, 1)], "hides 8 of 8 cells"),
        ([(0.5, 2, 1), (0.5, None, 5)], "hides only 4 of its 8 cells"),
        ([(0.5, 4, 1)], "is not a multiple of levels"),
        ([(0.5, 2, 2)], "first level"),
    ],
)
def test_impossible_counts_are_refused_by_name(levels, message):
    with pytest.raises(ValueError, match=message):
        PlanConfig(
            box=48,
            view=24,
            token=4,
            levels=tuple(LevelConfig(hidden_ratio=ratio, cells=cells, views=views) for ratio, cells, views in levels),
        )
