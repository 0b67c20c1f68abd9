"""What people would rather look at than read: reconstructions at each level, the loss beside the trivial one."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mim_scale.commit import write_file
from mim_scale.methods.method import LevelPreview

COLUMNS = ("input", "what the network sees", "reconstruction", "error")
ERROR_RANGE = 0.25
"""Largest error drawn, as a share of the intensity window."""


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
    """Write a PNG of each level's losses over the steps: training, held out, and the trivial predictor's held out."""
    names = sorted({name for row in rows for name in row.get("parts", {}) if name.startswith("level_")})
    figure = Figure(figsize=(4.2 * max(1, len(names)), 3.6), dpi=110, layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, max(1, len(names))))
    for axis, name in zip(axes, names, strict=False):
        steps = [row["step"] for row in rows if name in row.get("parts", {})]
        axis.plot(
            steps,
            [row["parts"][name] for row in rows if name in row.get("parts", {})],
            color="0.75",
            lw=0.8,
            label="training",
        )
        measured = [row for row in rows if name in row.get("held_out", {})]
        held_out_steps = [row["step"] for row in measured]
        axis.plot(
            held_out_steps, [row["held_out"][name] for row in measured], "o-", color="tab:blue", ms=3, label="held out"
        )
        trivial = [row["held_out"].get(name.replace("level", "trivial")) for row in measured]
        axis.plot(held_out_steps, trivial, "--", color="tab:red", label="trivial predictor, held out")
        axis.set_yscale("log")
        axis.set_title(name.replace("_", " "))
        axis.set_xlabel("step")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("mean squared error on hidden tokens")
    axes[0].legend(fontsize=8)
    _save(figure, path)


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
