"""Which boxes are cut and which tokens are hidden: everything that is decided before a voxel is read."""

import math
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from mim_scale.config.parts import Positive, Section, Share, Size, Size3, as_tuple, check_divides, divide


class LevelConfig(Section):
    """One level of nested views."""

    hidden_ratio: Share
    """Share of the level's cells that are hidden, rounded to whole cells; of two numbers, one between is drawn for each
    sample (method: section 7, mixed ratios)."""
    cells: Size | None = None
    """Mask units per axis of a view; none means one token each. A child view shows one hidden cell of its parent."""
    views: Positive = 1
    """Views per parent view; at the first level, per sample."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.ratios
        if low > high:
            raise ValueError(f"hidden_ratio {[low, high]}: its first number must be the smaller one")
        return self

    @property
    def ratios(self) -> tuple[float, float]:
        """The smallest and the largest."""
        return self.hidden_ratio if isinstance(self.hidden_ratio, tuple) else (self.hidden_ratio, self.hidden_ratio)


class ForegroundConfig(Section):
    """How strongly plans prefer what is not air: what the store's manifest calls foreground."""

    box_share: Annotated[float, Field(ge=0.0, le=1.0)]
    """A box, and each view of the first level that shows a crop of it, is drawn again until so much of it is
    foreground."""
    tries: Annotated[int, Field(ge=1, le=64)]
    """At most so many are drawn; where none has its share, the fullest one is taken."""
    hidden_share: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Hidden cells are taken from a view's foreground, up to this share of it, then from air; from more foreground only
    where there is not enough air."""


class PlanConfig(Section):
    """Which boxes are cut and which tokens are hidden: everything that is decided before a voxel is read."""

    box: Size
    """Outer box read from a volume, in voxels."""
    view: Size
    """Every level's regions are resized to this many voxels."""
    token: Size
    """Voxels of a view that one token covers."""
    levels: Annotated[tuple[LevelConfig, ...], BeforeValidator(as_tuple), Field(min_length=1)]
    crop: Size | None = None
    """Voxels of the box that a view of the first level shows, each at a random place; null for the whole box."""
    augment: bool = False
    """Draw for every view of the first level how it is flipped, and how its intensities are changed."""

    foreground: ForegroundConfig | None = None
    """Prefer what is not air (method: section 7); null to draw boxes, masks and children anywhere."""

    @property
    def grid(self) -> Size3:
        """Tokens of a view per axis."""
        return divide(self.view, self.token)

    @property
    def num_tokens(self) -> int:
        """Tokens of a view."""
        return math.prod(self.grid)

    def cells(self, level: int) -> Size3:
        """Mask units per axis at a level (counted from 0)."""
        return self.levels[level].cells or self.grid

    def cell_tokens(self, level: int) -> int:
        """Tokens that one mask unit holds."""
        return self.num_tokens // math.prod(self.cells(level))

    def region(self, level: int) -> Size3:
        """Voxels of the outer box that one view of a level shows, before it is resized."""
        region: Size3 = self.crop or self.box
        for parent in range(level):
            region = divide(region, self.cells(parent))
        return region

    def num_hidden_cells(self, level: int) -> tuple[int, int]:
        """Hidden mask units of each view of a level, (fewest, most): the ratio, rounded half up to whole cells."""
        count = math.prod(self.cells(level))
        low, high = self.levels[level].ratios
        return math.floor(low * count + 0.5), math.floor(high * count + 0.5)

    def num_hidden(self, level: int) -> tuple[int, int]:
        """Hidden tokens of each view of a level, (fewest, most)."""
        low, high = self.num_hidden_cells(level)
        return low * self.cell_tokens(level), high * self.cell_tokens(level)

    def num_views(self, level: int) -> int:
        """Views of a level per sample."""
        return math.prod(self.levels[i].views for i in range(level + 1))

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_divides("view", self.view, "token", self.token)
        if self.crop is None and self.levels[0].views != 1:
            raise ValueError(
                f"levels[0].views is {self.levels[0].views}: the first level shows the outer box itself, so it has 1 "
                "view; give plan.crop for several"
            )
        if self.crop is not None and any(a > b for a, b in zip(self.crop, self.box, strict=True)):
            raise ValueError(f"crop {list(self.crop)} is larger than box {list(self.box)}")
        if self.augment and len(self.levels) > 1:
            raise ValueError("augment works on one level of views: nested views would no longer show what lies there")
        for level in range(len(self.levels)):
            self._check_level(level)
            self._check_foreground(level)
        return self

    def _check_foreground(self, level: int) -> None:
        ratio = self.levels[level].ratios[1]
        if self.foreground is not None and self.foreground.hidden_share < ratio:
            raise ValueError(
                f"foreground.hidden_share is {self.foreground.hidden_share}, but levels[{level}].hidden_ratio goes up "
                f"to {ratio}, and a view without air has no other cells to hide: raise the one or lower the other"
            )

    def _check_level(self, level: int) -> None:
        cells = self.cells(level)
        check_divides("grid (view / token)", self.grid, f"levels[{level}].cells", cells)
        (fewest, most), count = self.num_hidden_cells(level), math.prod(cells)
        ratio = self.levels[level].hidden_ratio
        hides_nothing = self.levels[level].ratios[1] == 0
        if most >= count or (fewest == 0 and not hides_nothing):
            hidden = most if most >= count else fewest
            raise ValueError(
                f"levels[{level}].hidden_ratio {ratio} hides {hidden} of {count} cells: "
                "at least one must be hidden and one visible"
            )
        if level + 1 < len(self.levels):
            views = self.levels[level + 1].views
            if views > fewest:
                raise ValueError(
                    f"levels[{level + 1}].views is {views}, but levels[{level}] hides only {fewest} of its {count} "
                    "cells and each child is cut from a different hidden cell: lower views or raise hidden_ratio"
                )
            check_divides(f"levels[{level}] region", self.region(level), f"levels[{level}].cells", cells)
