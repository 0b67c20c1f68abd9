"""Plans with crops, several first views, ratio ranges and augmentation draws."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mim_scale.config import LevelConfig, PlanConfig
from mim_scale.sampling.plan import AUGMENT_DRAWS, DRAW_LIMIT, plan
from mim_scale.sampling.rng import Purpose, words
from tests.sampling.strategies import plan_configs, positions, seeds, shapes

SHAPE = (70, 80, 90)


@st.composite
def crop_configs(draw):
    """One level of crops, any box, any ratio or range of them that hides some and shows some."""
    token = draw(st.integers(1, 3))
    grid = [draw(st.integers(1, 4)) for _ in range(3)]
    tokens = math.prod(grid)
    crop = [draw(st.integers(1, 40)) for _ in range(3)]
    box = [size + draw(st.integers(0, 20)) for size in crop]
    low = high = 0.0
    if tokens > 2 and draw(st.booleans()):
        counts = sorted(draw(st.tuples(*[st.integers(1, tokens - 1)] * 2)))
        low, high = (count / tokens for count in counts)
    return PlanConfig(
        box=tuple(box),
        crop=tuple(crop),
        view=tuple(size * token for size in grid),
        token=token,
        levels=(LevelConfig(hidden_ratio=(low, high) if high > low else low, views=draw(st.integers(1, 5))),),
        augment=draw(st.booleans()),
    )


@given(seeds, positions, shapes, crop_configs(), st.booleans())
def test_crops_lie_in_the_box_and_are_the_same_again(seed, position, shape, config, held_out):
    planned, again = (plan(seed, position, shape, config, held_out) for _ in range(2))
    level, other = planned.levels[0], again.levels[0]
    assert vars(level).keys() == vars(other).keys()
    for name, array in vars(level).items():
        assert array.dtype == np.int32
        np.testing.assert_array_equal(array, getattr(other, name))
    views = config.levels[0].views
    assert level.starts.shape == (views, 3)
    assert (level.starts >= 0).all()
    assert (level.starts + config.crop <= config.box).all()
    assert level.parent.tolist() == level.cell.tolist() == [-1] * views
    if all(2 * crop >= box for crop, box in zip(config.crop, config.box, strict=True)):
        low, high = level.starts.max(axis=0), level.starts.min(axis=0) + config.crop
        assert (high - low >= 2 * np.array(config.crop) - config.box).all()


@given(seeds, positions, crop_configs())
def test_counts_stay_within_the_range_and_tokens_are_partitioned(seed, position, config):
    fewest, most = config.num_hidden(0)
    level = plan(seed, position, SHAPE, config).levels[0]
    assert fewest <= level.hidden.shape[1] <= most
    tokens = np.sort(np.concatenate([level.visible, level.hidden], axis=1), axis=1)
    np.testing.assert_array_equal(tokens, np.tile(np.arange(config.num_tokens), (len(tokens), 1)))


@given(seeds, positions, crop_configs())
def test_draws_are_below_their_limit_and_only_where_asked(seed, position, config):
    draws = plan(seed, position, SHAPE, config).levels[0].draws
    assert draws.shape == (config.levels[0].views, AUGMENT_DRAWS if config.augment else 0)
    assert ((draws >= 0) & (draws < DRAW_LIMIT)).all()


def crops(**changes):
    values = {"box": 48, "crop": 32, "view": 16, "token": 4, "augment": True}
    return PlanConfig(**{**values, "levels": (LevelConfig(hidden_ratio=(0.25, 0.75), views=3),), **changes})


def test_every_number_of_hidden_tokens_is_drawn_about_equally_often():
    config = crops(view=12, levels=(LevelConfig(hidden_ratio=(0.3, 0.7), views=2),))
    counts = [plan(5, position, SHAPE, config).levels[0].hidden.shape[1] for position in range(3000)]
    low, high = config.num_hidden(0)
    assert (low, high) == (8, 19)
    found = np.bincount(counts, minlength=high + 1)
    assert found[:low].sum() == 0
    assert abs(found[low:] / 3000 - 1 / 12).max() < 0.02


def test_every_place_and_every_draw_is_about_equally_likely():
    config = crops()
    levels = [plan(5, position, (48, 48, 48), config).levels[0] for position in range(2000)]
    starts = np.concatenate([level.starts for level in levels])
    assert starts.min(axis=0).tolist() == [0, 0, 0]
    assert starts.max(axis=0).tolist() == [16, 16, 16]
    for axis in range(3):
        assert abs(np.bincount(starts[:, axis], minlength=17) / len(starts) - 1 / 17).max() < 0.015
    assert abs(np.corrcoef(np.array([level.starts.ravel() for level in levels]).T) - np.eye(9)).max() < 0.1
    draws = np.array([level.draws.ravel() for level in levels]) / DRAW_LIMIT
    assert abs(draws.mean(axis=0) - 0.5).max() < 0.04
    assert abs(draws.std(axis=0) - 12**-0.5).max() < 0.02
    assert abs(np.corrcoef(draws.T) - np.eye(draws.shape[1])).max() < 0.1


@given(seeds, positions)
def test_neighbours_seeds_and_sides_differ_in_all_that_is_drawn(seed, position):
    config = crops()
    own = plan(seed, position, SHAPE, config).levels[0]
    others = [
        plan(seed, position + 1, SHAPE, config).levels[0],
        plan((seed + 1) % 2**63, position, SHAPE, config).levels[0],
        plan(seed, position, SHAPE, config, held_out=True).levels[0],
    ]
    for other in others:
        assert not np.array_equal(own.draws, other.draws)
        assert not np.array_equal(own.starts, other.starts)


def test_draws_are_the_top_bits_of_their_own_words():
    config = crops()
    for held_out, purpose in ((False, Purpose.AUGMENT), (True, Purpose.HELD_OUT_AUGMENT)):
        level = plan(5, 9, SHAPE, config, held_out).levels[0]
        top = [int(word) >> 40 for word in words(5, purpose, 9, 3 * AUGMENT_DRAWS)]
        assert level.draws.ravel().tolist() == top
    starts = [(int(word) * 17) >> 64 for word in words(5, Purpose.VIEWS, 9, 9)]
    assert plan(5, 9, SHAPE, config).levels[0].starts.ravel().tolist() == starts


@given(seeds, positions, shapes, plan_configs(), st.booleans())
def test_a_plan_without_them_is_what_it_was(seed, position, shape, config, held_out):
    """A crop of the whole box and a range of one number draw nothing that changes the rest."""
    levels = tuple(
        level.model_copy(update={"hidden_ratio": (level.hidden_ratio, level.hidden_ratio)}) for level in config.levels
    )
    same = config.model_copy(update={"crop": config.box, "levels": levels, "augment": len(levels) == 1})
    one, other = plan(seed, position, shape, config, held_out), plan(seed, position, shape, same, held_out)
    assert one.box == other.box
    for level, twin in zip(one.levels, other.levels, strict=True):
        for name in ("starts", "parent", "cell", "visible", "hidden"):
            np.testing.assert_array_equal(getattr(level, name), getattr(twin, name))
        assert level.draws.shape[1] == 0


def test_children_of_crops_lie_in_hidden_cells_of_their_own_crop():
    nested = (LevelConfig(hidden_ratio=0.5, cells=2, views=2), LevelConfig(hidden_ratio=0.5, views=3))
    config = crops(augment=False, levels=nested)
    for position in range(20):
        first, second = plan(5, position, SHAPE, config).levels
        assert second.parent.tolist() == [0, 0, 0, 1, 1, 1]
        for start, parent, cell in zip(second.starts, second.parent, second.cell, strict=True):
            corner = np.array(np.unravel_index(cell, (2, 2, 2))) * 16
            np.testing.assert_array_equal(start, first.starts[parent] + corner)
            z, y, x = np.unravel_index(first.hidden[parent], config.grid)
            assert int(cell) in set((z // 2 * 4 + y // 2 * 2 + x // 2).tolist())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": 50}, "crop [50, 50, 50] is larger than box [48, 48, 48]"),
        ({"crop": None}, "levels[0].views is 3: the first level shows the outer box itself"),
        ({"levels": (LevelConfig(hidden_ratio=(0.0, 0.5)),)}, "hides 0 of 64 cells"),
        ({"levels": (LevelConfig(hidden_ratio=(0.5, 0.999)),)}, "hides 64 of 64 cells"),
        ({"levels": (LevelConfig(hidden_ratio=0.5), LevelConfig(hidden_ratio=0.5))}, "augment works on one level"),
        (
            {
                "augment": False,
                "levels": (LevelConfig(hidden_ratio=(0.25, 0.75), cells=2), LevelConfig(hidden_ratio=0.5, views=3)),
            },
            "levels[1].views is 3, but levels[0] hides only 2 of its 8 cells",
        ),
    ],
)
def test_impossible_crops_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("]", r"\]")):
        crops(**changes)


def test_a_range_the_wrong_way_round_is_refused():
    with pytest.raises(ValueError, match="its first number must be the smaller one"):
        LevelConfig(hidden_ratio=(0.7, 0.5))
