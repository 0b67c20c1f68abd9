"""Boxes, grids and spacings as plain integers and floats.

Every triple is (z, y, x). A box is in voxels of one level; its start may be negative where a volume is padded.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mim_scale.config import Size3 as Size3  # noqa: PLC0414

Spacing3 = tuple[float, float, float]
"""Millimetres between voxel centres, (z, y, x)."""


@dataclass(frozen=True)
class Box:
    """A block of voxels: the first one, and how many along each axis."""

    start: Size3
    size: Size3

    @property
    def stop(self) -> Size3:
        """The first voxel after the box along each axis."""
        return add(self.start, self.size)

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """The box as an index into an array that holds it."""
        z, y, x = (slice(start, stop) for start, stop in zip(self.start, self.stop, strict=True))
        return z, y, x

    def moved(self, offset: Size3) -> "Box":
        """The same box, offset voxels further."""
        return Box(add(self.start, offset), self.size)

    def is_inside(self, shape: Size3) -> bool:
        """Whether every voxel of the box lies in an array of this shape."""
        return all(
            start >= 0 and size >= 1 and start + size <= limit
            for start, size, limit in zip(self.start, self.size, shape, strict=True)
        )

    def clipped(self, shape: Size3) -> "Box":
        """The part of the box that lies in an array of this shape; its size is 0 where nothing does."""
        pairs = [
            (min(max(start, 0), limit), min(max(stop, 0), limit))
            for start, stop, limit in zip(self.start, self.stop, shape, strict=True)
        ]
        return Box(size3(start for start, _ in pairs), size3(stop - start for start, stop in pairs))


def size3(numbers: Iterable[int]) -> Size3:
    """Three integers as a Size3."""
    z, y, x = (int(number) for number in numbers)
    return z, y, x


def add(a: Size3, b: Size3) -> Size3:
    """a + b per axis."""
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def whole_box(shape: Size3) -> Box:
    """The box that is all of an array."""
    return Box((0, 0, 0), shape)


def blocks(box: Box, block: Size3) -> Iterator[tuple[Size3, Box]]:
    """The blocks of a regular grid that a box touches, row-major: (index in the grid, the part inside the box)."""
    ranges = [
        range(start // step, -(-stop // step)) for start, stop, step in zip(box.start, box.stop, block, strict=True)
    ]
    for index in itertools.product(*ranges):
        start = size3(max(i * step, low) for i, step, low in zip(index, block, box.start, strict=True))
        stop = size3(min((i + 1) * step, high) for i, step, high in zip(index, block, box.stop, strict=True))
        yield size3(index), Box(start, size3(b - a for a, b in zip(start, stop, strict=True)))


def halving(shape: Size3, spacing_mm: Spacing3) -> Size3:
    """The factor, 1 or 2 per axis, from one stored level to the next.

    An axis is halved while its spacing is below twice the smallest, so that voxels come nearer to cubes: thick slices
    stay whole.
    """
    smallest = min(spacing_mm)
    return size3(
        2 if size > 1 and spacing < 2 * smallest else 1 for size, spacing in zip(shape, spacing_mm, strict=True)
    )


def level_geometry(shape: Size3, spacing_mm: Spacing3, num_levels: int) -> list[tuple[Size3, Size3]]:
    """(shape, factor relative to level 0) of each stored level, for a volume of this shape and spacing."""
    levels = [(shape, (1, 1, 1))]
    for _ in range(num_levels - 1):
        size, factor = levels[-1]
        z, y, x = (spacing * by for spacing, by in zip(spacing_mm, factor, strict=True))
        step = halving(size, (z, y, x))
        levels.append(
            (
                size3(-(-length // by) for length, by in zip(size, step, strict=True)),
                size3(a * b for a, b in zip(factor, step, strict=True)),
            )
        )
    return levels


def num_voxels(shape: Size3) -> int:
    """Voxels of an array of this shape."""
    return math.prod(shape)
