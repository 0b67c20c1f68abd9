"""Pictures of what is stored and of what is cut from it: a volume's slices, and a sample's boxes and masks."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from mim_scale.commit import write_file
from mim_scale.config import PlanConfig
from mim_scale.sampling.plan import Plan
from mim_scale.store.array_store import VolumeReader
from mim_scale.store.geometry import Box, Size3, Spacing3, size3
from mim_scale.store.manifest import Row
from mim_scale.store.slices import PLANES, read_slice, size_mm, upright
from mim_scale.streaming.batch import Sample

Window = tuple[float, float]
"""HU that are black and white."""

_ACROSS = 6
"""Slices of each plane in a montage, and pictures in a row of a crop tree."""
_ENOUGH = 256
"""Pixels that a slice of a montage needs along its longer side."""
_COLOURS = ("#ffd24a", "#4ac8ff", "#ff7ad1", "#8dff6a")
"""Of the boxes of each level, outermost first."""
_HIDDEN_COLOUR = (0.95, 0.35, 0.15)
_HIDDEN_STRENGTH = 0.5


def draw_volume(reader: VolumeReader, row: Row, window: Window, path: Path) -> None:
    """Write a PNG of evenly spaced slices in each plane, with their positions and both axes in mm.

    Raises:
        DamagedError: a chunk that a slice touches is missing or fails its checksum.
    """
    level = max(i for i, shape in enumerate(reader.level_shapes) if i == 0 or max(shape[1:]) >= _ENOUGH)
    shape = reader.level_shapes[level]
    sizes = [size_mm(row, axis) for axis in range(3)]
    heights = [2.0 * height / width for height, width in sizes]
    figure = Figure(figsize=(_ACROSS * 2.3 + 0.6, sum(heights) + 2.1), dpi=100, layout="constrained")
    axes = figure.subplots(3, _ACROSS, height_ratios=heights, squeeze=False)
    for axis, plane in enumerate(PLANES):
        height, width = sizes[axis]
        length = row.shape[axis] * row.spacing_mm[axis]
        for column in range(_ACROSS):
            index = int((column + 0.5) / _ACROSS * shape[axis])
            picture = axes[axis, column]
            picture.imshow(
                read_slice(reader, level, axis, index),
                cmap="gray",
                vmin=window[0],
                vmax=window[1],
                extent=(0, width, height, 0),
                interpolation="nearest",
            )
            picture.set_title(f"{(index + 0.5) / shape[axis] * length:.0f} mm", fontsize=8, pad=2)
            picture.tick_params(labelsize=7, labelleft=column == 0)
        axes[axis, 0].set_ylabel(f"{plane}, mm", fontsize=10)
    size, spacing = " × ".join(map(str, row.shape)), " × ".join(f"{step:.3g}" for step in row.spacing_mm)
    figure.suptitle(
        f"{row.key}: {size} voxels of {spacing} mm (z, y, x), window {window[0]:g} to {window[1]:g} HU\n"
        "slices by their distance from the foot, back and left ends",
        fontsize=10,
    )
    _save(figure, path)


@dataclass(frozen=True)
class _View:
    """One view of one level, ready to be drawn."""

    level: int
    index: int
    start: Size3
    """In the outer box."""
    region: Size3
    hidden: NDArray[np.bool_]
    """[tokens z, y, x]"""


@dataclass(frozen=True)
class Context:
    """The volume that a sample was cut from, where it is at hand."""

    reader: VolumeReader
    row: Row


def draw_sample(
    sample: Sample,
    config: PlanConfig,
    spacing_mm: Spacing3,
    window: Window,
    title: str,
    path: Path,
    context: Context | None = None,
) -> None:
    """Write a PNG of a sample as a tree: the outer box in its volume, then each level's views, hidden tokens shaded.

    One or two views of a level are shown in three planes, more by one axial slice each; boxes within a view are its
    children, dotted where they lie beside the slice.

    Args:
        spacing_mm: Of the volume that it was cut from.
        context: Where there is none, the outer box is the outermost thing that is shown.

    Raises:
        DamagedError: a chunk of the volume is missing or fails its checksum.
    """
    levels = [_views(sample.plan, config, level) for level in range(len(sample.plan.levels))]
    rows = len(levels) + (context is not None)
    figure = Figure(figsize=(14, 2.9 * rows + 0.5), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=11)
    parts: list[Any] = list(figure.subfigures(rows, 1, squeeze=False).flat)
    if context is not None:
        _draw_context(parts.pop(0), context, sample.plan.box, window)
    for level, (part, views) in enumerate(zip(parts, levels, strict=True)):
        children = levels[level + 1] if level + 1 < len(levels) else []
        planes = range(3) if len(views) <= 2 else range(1)
        places = [(view, axis) for view in views for axis in planes][:_ACROSS]
        pictures = _row_of_pictures(part)
        for picture, (view, axis) in zip(pictures, places, strict=False):
            own = [child for child in children if _parent(sample.plan, child) == view.index]
            _draw_view(picture, sample.block, view, own, axis, spacing_mm, window)
        side = " × ".join(f"{n * s:.0f}" for n, s in zip(views[0].region, spacing_mm, strict=True))
        shown = len({view.index for view, _ in places})
        of = f"{shown} of {len(views)} views" if shown < len(views) else f"{shown} view{'s' if shown > 1 else ''}"
        share = f"{views[0].hidden.mean():.0%} of {views[0].hidden.size} tokens hidden"
        part.suptitle(f"level {level + 1}: {of} of {side} mm, {share}", fontsize=10, x=0.01, ha="left")
    _save(figure, path)


def _row_of_pictures(part: Any) -> Any:
    pictures = part.subplots(1, _ACROSS)
    for picture in pictures:
        picture.set_axis_off()
    return pictures


def _draw_context(part: Any, context: Context, box: Box, window: Window) -> None:
    """The volume in three planes through the middle of the box, which is outlined."""
    reader, row = context.reader, context.row
    level = len(reader.level_shapes) - 1
    part.suptitle(f"volume {row.key}, the outer box in it", fontsize=10, x=0.01, ha="left")
    middle = [start + length / 2 for start, length in zip(box.start, box.size, strict=True)]
    for axis, picture in zip(range(3), _row_of_pictures(part), strict=False):
        length = reader.level_shapes[level][axis]
        at = min(int(middle[axis] / row.shape[axis] * length), length - 1)
        height, width = size_mm(row, axis)
        _show(picture, read_slice(reader, level, axis, at), (height, width), axis, window)
        _outline(picture, (height, width), box, row.spacing_mm, axis, 0)


def _views(plan: Plan, config: PlanConfig, level: int) -> list[_View]:
    of_level = plan.levels[level]
    found = []
    for index, start in enumerate(of_level.starts.tolist()):
        hidden = np.zeros(config.num_tokens, np.bool_)
        hidden[of_level.hidden[index]] = True
        found.append(_View(level, index, tuple(start), config.region(level), hidden.reshape(config.grid)))
    return found


def _parent(plan: Plan, view: _View) -> int:
    return int(plan.levels[view.level].parent[view.index])


def _draw_view(
    picture: Any,
    block: NDArray[np.int16],
    view: _View,
    children: Sequence[_View],
    axis: int,
    spacing_mm: Spacing3,
    window: Window,
) -> None:
    """One slice of a view, through its first child where it has one."""
    at = _slice_through(view, children, axis)
    others = [other for other in range(3) if other != axis]
    start, region = (np.array(values) for values in (view.start, view.region))
    inside = tuple(slice(first, first + length) for first, length in zip(start, region, strict=True))
    hu = np.moveaxis(block[inside], axis, 0)[at]
    token = [np.arange(length) * tokens // length for length, tokens in zip(region, view.hidden.shape, strict=True)]
    hidden = np.moveaxis(view.hidden, axis, 0)[token[axis][at]][np.ix_(token[others[0]], token[others[1]])]
    grey = np.clip((hu - window[0]) / (window[1] - window[0]), 0, 1).astype(np.float64)
    colour = np.repeat(grey[..., None], 3, axis=2)
    colour[hidden] = (1 - _HIDDEN_STRENGTH) * colour[hidden] + _HIDDEN_STRENGTH * np.array(_HIDDEN_COLOUR)
    height, width = (float(region[other] * spacing_mm[other]) for other in others)
    _show(picture, upright(colour), (height, width), axis, window)
    for spine in picture.spines.values():
        spine.set(color=_COLOURS[view.level % len(_COLOURS)], linewidth=2.5)
    for child in children:
        box = Box(size3(np.array(child.start) - start), child.region)
        is_cut = box.start[axis] <= at < box.stop[axis]
        _outline(picture, (height, width), box, spacing_mm, axis, child.level, "-" if is_cut else ":")


def _show(picture: Any, image: NDArray[Any], size: tuple[float, float], axis: int, window: Window) -> None:
    """An upright slice with its axes in mm."""
    height, width = size
    low, high = window
    picture.set_axis_on()
    picture.imshow(image, cmap="gray", vmin=low, vmax=high, extent=(0, width, height, 0), interpolation="nearest")
    picture.tick_params(labelsize=6, length=2)
    picture.set_xlabel(f"{PLANES[axis]}, mm", fontsize=7)


def _outline(
    picture: Any, size: tuple[float, float], box: Box, spacing_mm: Spacing3, axis: int, level: int, line: str = "-"
) -> None:
    """Draw a box, in voxels from the picture's own corner, in the colour of its level."""
    stops, lengths = (
        [float(values[other] * spacing_mm[other]) for other in range(3) if other != axis]
        for values in (box.stop, box.size)
    )
    # The picture is upright: what is last along an axis comes first.
    corner = (size[1] - stops[1], size[0] - stops[0])
    colour = _COLOURS[level % len(_COLOURS)]
    picture.add_patch(
        Rectangle(corner, lengths[1], lengths[0], fill=False, ec=colour, lw=2.0, ls=line, clip_on=False, zorder=3)
    )


def _slice_through(view: _View, children: Sequence[_View], axis: int) -> int:
    """Index, in the view's region: the middle of the first child; else of the layer with the most hidden tokens."""
    if children:
        return children[0].start[axis] - view.start[axis] + children[0].region[axis] // 2
    others = tuple(other for other in range(3) if other != axis)
    layer = int(np.argmax(view.hidden.sum(axis=others)))
    return int((2 * layer + 1) * view.region[axis] // (2 * view.hidden.shape[axis]))


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_file(path, buffer.getvalue())
