"""What people would rather look at than read: reconstructions, similarities, the loss beside the trivial one."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mim_scale.commit import write_file
from mim_scale.methods.method import LevelPreview, Preview, SimilarityPreview
from mim_scale.training.held_out import trivial_name

COLUMNS = ("input", "what the network sees", "reconstruction", "error")
ERROR_RANGE = 0.25
"""Largest error drawn, as a share of the intensity window."""

MOST_COMPARED = 24
"""Views drawn beside their similarities: more would be too small to see."""


def draw_preview(preview: Preview, keys: Sequence[str], folder: Path, number: int) -> None:
    """Write a PNG of a method's preview of samples, `reconstruction_1.png` or `similarity_1.png`.

    Args:
        keys: The volume of each sample.
    """
    if isinstance(preview, SimilarityPreview):
        draw_similarity(preview, keys, folder / f"similarity_{number}.png")
    else:
        draw_reconstruction(preview, f"held-out volume {keys[0]}", folder / f"reconstruction_{number}.png")


def draw_similarity(preview: SimilarityPreview, keys: Sequence[str], path: Path) -> None:
    """Write a PNG of the cosine of every view with every other, their middle slices along two sides.

    The views of a sample are neighbours, so what was learnt shows as bright blocks along the diagonal.
    """
    count = min(len(preview.views), MOST_COMPARED)
    of_sample = len(preview.views) // len(keys)
    slices = preview.views[:count, preview.views.shape[1] // 2]
    figure = Figure(figsize=(0.55 * count + 4, 0.55 * count + 3), dpi=110, layout="constrained")
    grid = figure.add_gridspec(count + 1, count + 2, width_ratios=[1.0] * (count + 1) + [0.3])
    for place, image in enumerate(slices):
        above, beside = figure.add_subplot(grid[0, place + 1]), figure.add_subplot(grid[place + 1, 0])
        for axis in (above, beside):
            _draw(axis, image)
            axis.set_xticks([])
            axis.set_yticks([])
        if place % of_sample == 0:
            beside.set_ylabel(keys[place // of_sample][:8], fontsize=7, rotation=0, ha="right", va="top")
    axis = figure.add_subplot(grid[1:, 1:-1])
    shown = axis.imshow(preview.similarity[:count, :count], cmap="viridis", vmin=-1, vmax=1, aspect="auto")
    axis.set_xticks([])
    axis.set_yticks([])
    figure.colorbar(shown, cax=figure.add_subplot(grid[1:, -1]), label="cosine")
    figure.suptitle("augmented crops of held-out volumes, and how alike their features are", fontsize=11)
    _save(figure, path)


def draw_reconstruction(levels: Sequence[LevelPreview], title: str, path: Path) -> None:
    """Write a PNG with one row a level: input, masked input, reconstruction, error.

    Drawn is the axial slice with the most hidden voxels of the level's view with the most contrast.
    """
    figure = Figure(figsize=(11, 2.9 * len(levels) + 0.6), dpi=110, layout="constrained")
    axes = np.atleast_2d(figure.subplots(len(levels), len(COLUMNS)))
    for row, level in enumerate(levels):
        view = int(np.argmax(level.input.std(axis=(1, 2, 3))))
        place = (view, _slice_with_most_hidden(level.hidden[view]))
        image, reconstruction = level.input[place], level.reconstruction[place]
        _draw(axes[row, 0], image)
        _draw(axes[row, 1], np.ma.masked_array(level.masked[place], mask=level.hidden[place]))
        _draw(axes[row, 2], reconstruction)
        error = axes[row, 3].imshow(_upright(np.abs(reconstruction - image)), cmap="magma", vmin=0, vmax=ERROR_RANGE)
        figure.colorbar(error, ax=axes[row, 3], shrink=0.85)
        axes[row, 0].set_ylabel(f"level {row + 1}", fontsize=12)
    for axis, name in zip(axes[0], COLUMNS, strict=True):
        axis.set_title(name, fontsize=12)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle(title, fontsize=12)
    _save(figure, path)


def draw_loss_curve(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG of each part's losses over the steps: training, held out, and the trivial predictor's held out.

    Parts that have no trivial number are left out, unless none has.
    """
    parts = sorted({name for row in rows for name in row.get("parts", {})})
    measured = [row for row in rows if "held_out" in row]
    compared = [name for name in parts if any(trivial_name(name) in row["held_out"] for row in measured)]
    names = compared or parts
    figure = Figure(figsize=(4.2 * max(1, len(names)), 3.6), dpi=110, layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, max(1, len(names))))
    for axis, name in zip(axes, names, strict=False):
        told = [row for row in rows if name in row.get("parts", {})]
        axis.plot(*_curve(told, "parts", name), color="0.75", lw=0.8, label="training")
        axis.plot(*_curve(measured, "held_out", name), "o-", color="tab:blue", ms=3, label="held out")
        trivial = _curve(measured, "held_out", trivial_name(name))
        axis.plot(*trivial, "--", color="tab:red", label="trivial predictor, held out")
        axis.set_yscale("log")
        axis.set_title(name.replace("_", " "))
        axis.set_xlabel("step")
        axis.grid(alpha=0.3, which="both")
    is_masked = all(name.startswith("level_") for name in names)
    axes[0].set_ylabel("error on hidden tokens" if is_masked else "loss")
    axes[0].legend(fontsize=8, loc="lower left")  # where falling curves are not; "best" is slow on long runs
    _save(figure, path)


def _curve(rows: Sequence[dict[str, Any]], kind: str, name: str) -> tuple[list[int], list[float | None]]:
    """(steps, values)."""
    return [row["step"] for row in rows], [row[kind].get(name) for row in rows]


def _draw(axis: Any, image: NDArray[Any]) -> None:
    axis.imshow(_upright(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_facecolor("#30507a")  # hidden voxels show this, which no CT value does


def _upright(image: NDArray[Any]) -> NDArray[Any]:
    """An axial slice (y to Anterior, x to Right) as radiologists hang it: front up, the patient's right on the left."""
    return image[::-1, ::-1]


def _slice_with_most_hidden(hidden: NDArray[np.bool_]) -> int:
    counts = hidden.sum(axis=(1, 2))
    best = np.flatnonzero(counts == counts.max())
    return int(best[len(best) // 2])


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_file(path, buffer.getvalue())
