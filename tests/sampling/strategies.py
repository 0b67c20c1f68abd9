"""Plan configs that the config allows, of every shape and ratio."""

from hypothesis import assume
from hypothesis import strategies as st

from mim_scale.config import LevelConfig, PlanConfig


@st.composite
def plan_configs(draw):
    """One to three levels; cells that divide the grid, regions that divide into cells, views that fit."""
    cells = [tuple(draw(st.sampled_from([1, 2, 3])) for _ in range(3)) for _ in range(draw(st.integers(1, 3)))]
    grid = tuple(6 * draw(st.integers(1, 2)) for _ in range(3))
    token = tuple(draw(st.integers(1, 3)) for _ in range(3))
    levels, box, num_hidden = [], [1, 1, 1], 0
    for index, own in enumerate(cells):
        as_tokens = draw(st.booleans())
        counts = grid if as_tokens else own
        total = counts[0] * counts[1] * counts[2]
        assume(total > 1)
        ratio = draw(st.floats(0.05, 0.95))
        hidden = int(ratio * total + 0.5)
        assume(0 < hidden < total)
        views = 1 if index == 0 else draw(st.integers(1, min(num_hidden, 5)))
        levels.append(LevelConfig(hidden_ratio=ratio, cells=None if as_tokens else own, views=views))
        box = [size * count for size, count in zip(box, counts, strict=True)]
        num_hidden = hidden
    smallest = draw(st.integers(1, 2))
    view = tuple(size * by for size, by in zip(grid, token, strict=True))
    return PlanConfig(box=tuple(size * smallest for size in box), view=view, token=token, levels=tuple(levels))


shapes = st.tuples(*[st.integers(1, 600)] * 3)
seeds = st.integers(0, 2**63 - 1)
positions = st.integers(0, 2**62)
