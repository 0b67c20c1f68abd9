"""Plans that prefer what is not air: more of it in boxes, masks and children; nothing changes where all is one."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mim_scale.config import ForegroundConfig
from mim_scale.sampling.plan import plan
from mim_scale.store.foreground import Foreground
from tests.sampling.strategies import plan_configs, positions, seeds, shapes
from tests.sampling.test_crops import crop_configs
from tests.sampling.test_plan import arrays
from tests.synthetic import make_plan_config


def preferring(config, box_share=0.5, tries=4, hidden_share=0.9):
    values = {"box_share": box_share, "tries": tries, "hidden_share": hidden_share}
    return config.model_copy(update={"foreground": ForegroundConfig(**values)})


def uniform(shape, value, block=(5, 7, 8)):
    counts = [-(-size // by) for size, by in zip(shape, block, strict=True)]
    return Foreground(np.full(counts, value, bool), block, shape)


@st.composite
def maps(draw):
    """A blob, or anything, in a volume of any shape."""
    shape, block = draw(st.tuples(*[st.integers(1, 120)] * 3)), draw(st.tuples(*[st.integers(3, 20)] * 3))
    counts = [-(-size // by) for size, by in zip(shape, block, strict=True)]
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        return Foreground(random.random(counts) < draw(st.sampled_from([0.05, 0.5, 0.95])), block, shape)
    middle = random.uniform(0, 1, 3) * counts
    far = sum(((np.indices(counts)[axis] - middle[axis]) / counts[axis]) ** 2 for axis in range(3))
    return Foreground(far < draw(st.sampled_from([0.02, 0.1, 0.3])), block, shape)


def assert_same(one, other):
    assert (one.position, one.box) == (other.position, other.box)
    for a, b in zip(arrays(one), arrays(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


any_configs = st.one_of(plan_configs(), crop_configs())


@given(seeds, positions, shapes, any_configs, st.booleans())
def test_where_all_is_one_nothing_changes(seed, position, shape, config, held_out):
    expected = plan(seed, position, shape, config, held_out)
    sought = preferring(config)
    assert_same(plan(seed, position, shape, sought, held_out), expected)
    assert_same(plan(seed, position, shape, config, held_out, uniform(shape, False)), expected)
    assert_same(plan(seed, position, shape, sought, held_out, uniform(shape, False)), expected)
    if all(size >= length for size, length in zip(shape, config.box, strict=True)):
        assert_same(plan(seed, position, shape, sought, held_out, uniform(shape, True)), expected)


def check_masks(config, planned, foreground):
    """Hidden cells and children are foreground as far as the config lets them be."""
    share = config.foreground.hidden_share
    for level, own in enumerate(planned.levels):
        cells, region = config.cells(level), config.region(level)
        amounts = foreground.amounts(own.starts + np.array(planned.box.start), region, cells)
        is_foreground = 2 * amounts >= math.prod(region)
        inner = [size // count for size, count in zip(config.grid, cells, strict=True)]
        for view, hidden in enumerate(own.hidden):
            z, y, x = np.unravel_index(hidden, config.grid)
            hidden_cells = np.unique(np.ravel_multi_index((z // inner[0], y // inner[1], x // inner[2]), cells))
            of_view, count = is_foreground[view], len(hidden_cells)
            assert count * math.prod(inner) == len(hidden)
            allowed = math.floor(share * of_view.sum())
            wanted = max(min(allowed, count), count - int((~of_view).sum()))
            assert of_view[hidden_cells].sum() == wanted
            if level + 1 < len(planned.levels):
                below = planned.levels[level + 1]
                children = below.cell[below.parent == view]
                assert set(children) <= set(hidden_cells)
                assert of_view[children].sum() == min(len(children), wanted)


@settings(max_examples=40)
@given(seeds, positions, maps(), any_configs, st.floats(0.01, 0.99), st.booleans())
def test_masks_take_foreground_first_and_count_as_ever(seed, position, foreground, config, hidden_share, held_out):
    assume(hidden_share >= max(level.ratios[1] for level in config.levels))
    sought = preferring(config, hidden_share=hidden_share)
    planned, again = (plan(seed, position, foreground.shape, sought, held_out, foreground) for _ in range(2))
    assert_same(planned, again)
    plain = plan(seed, position, foreground.shape, config, held_out)
    for a, b in zip(arrays(planned), arrays(plain), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    for own in planned.levels:
        together = np.sort(np.concatenate([own.visible, own.hidden], axis=1), axis=1)
        assert (together == np.arange(config.num_tokens)).all()
    check_masks(sought, planned, foreground)


def shares(planned, config, foreground):
    """Of the box, and of each first view."""
    region = config.region(0)
    views = foreground.amounts(planned.levels[0].starts + np.array(planned.box.start), region, (1, 1, 1))
    box = foreground.amounts(np.array([planned.box.start]), config.box, (1, 1, 1))
    return box[0, 0] / math.prod(config.box), views[:, 0] / math.prod(region)


@settings(max_examples=40)
@given(seeds, positions, maps(), plan_configs(), st.floats(0, 1))
def test_a_box_is_drawn_until_it_is_full_enough(seed, position, foreground, config, box_share):
    def box(tries):
        sought = preferring(config, box_share, tries, 0.96)
        planned = plan(seed, position, foreground.shape, sought, foreground=foreground)
        return planned.box, shares(planned, config, foreground)[0]

    boxes = [box(tries) for tries in range(1, 7)]
    assert boxes[0][0] == plan(seed, position, foreground.shape, config).box
    for (before, share), (after, then) in itertools.pairwise(boxes):
        # A box that is full enough stays; another one is taken only where it is fuller.
        assert after == before or (share < box_share and then > share)


@given(seeds, positions, maps(), crop_configs(), st.floats(0, 1))
def test_each_crop_is_drawn_until_it_is_full_enough(seed, position, foreground, config, box_share):
    first, many = (
        plan(seed, position, foreground.shape, preferring(config, box_share, tries, 0.99), foreground=foreground)
        for tries in (1, 5)
    )
    starts = many.levels[0].starts
    assert (starts >= 0).all()
    assert (starts + np.array(config.crop) <= config.box).all()
    assert first.levels[0].starts.tolist() == plan(seed, position, foreground.shape, config).levels[0].starts.tolist()
    if first.box == many.box:
        (_, before), (_, after) = (shares(planned, config, foreground) for planned in (first, many))
        same = (first.levels[0].starts == starts).all(axis=1)
        assert (same | ((before < box_share) & (after > before))).all()


def test_tries_find_a_small_body_and_sides_draw_their_own():
    config = make_plan_config()
    blocks = np.zeros((20, 20, 20), bool)
    blocks[4:12, 4:12, 4:12] = True
    foreground = Foreground(blocks, (16, 16, 16), (320, 320, 320))

    def starts(held_out, **changes):
        sought = preferring(config, **changes)
        plans = [plan(5, position, foreground.shape, sought, held_out, foreground) for position in range(200)]
        return [planned.box.start for planned in plans], np.mean([shares(p, config, foreground)[0] for p in plans])

    (_, once), (own, often), (held_out, _) = starts(False, tries=1), starts(False, tries=16), starts(True, tries=16)
    assert once < 0.15
    assert often > 0.45
    assert len(set(own) & set(held_out)) == 0
    assert len(set(own)) > 190


@pytest.mark.parametrize(("hidden_ratio", "words"), [(0.95, r"levels\[1\].hidden_ratio goes up to 0.95")])
def test_a_share_that_could_not_hide_enough_is_refused(hidden_ratio, words):
    values = make_plan_config().model_dump()
    values["levels"][1]["hidden_ratio"] = hidden_ratio
    values["foreground"] = {"box_share": 0.5, "tries": 8, "hidden_share": 0.9}
    with pytest.raises(ValueError, match=words):
        type(make_plan_config()).model_validate(values)
