"""Pictures of a run show the numbers that they are given."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from mim_scale.methods.method import LevelPreview, SimilarityPreview
from mim_scale.training import pictures


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Figures by the names of the files that they were written to."""
    found: dict[str, Figure] = {}
    write = pictures._save

    def kept(figure: Figure, path: Path) -> None:
        found[path.name] = figure
        write(figure, path)

    monkeypatch.setattr(pictures, "_save", kept)
    return found


def rows(parts: list[str], trivial: dict[str, float]) -> list[dict[str, Any]]:
    steps = [{"kind": "step", "step": step, "parts": dict.fromkeys(parts, 1.0 / step)} for step in range(1, 5)]
    held = [{"kind": "held_out", "step": 4, "held_out": {**dict.fromkeys(parts, 0.3), **trivial}}]
    return [*steps, *held]


def lines(figure: Figure, panel: int) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[panel].lines
    }


def test_each_part_is_drawn_beside_its_trivial_number(drawn: dict[str, Figure], tmp_path: Path) -> None:
    pictures.draw_loss_curve(rows(["contrast"], {"trivial_contrast": math.log(7)}), tmp_path / "loss.png")
    figure = drawn["loss.png"]
    assert [axis.get_title() for axis in figure.axes] == ["contrast"]
    assert lines(figure, 0) == {
        "training": ([1, 2, 3, 4], [1.0, 1 / 2, 1 / 3, 1 / 4]),
        "held out": ([4], [0.3]),
        "trivial predictor, held out": ([4], [math.log(7)]),
    }
    assert figure.axes[0].get_ylabel() == "loss"


def test_parts_without_a_trivial_number_are_left_out(drawn: dict[str, Figure], tmp_path: Path) -> None:
    parts = ["level_1", "level_2", "alignment_1_2"]
    pictures.draw_loss_curve(rows(parts, {"trivial_1": 0.4, "trivial_2": 0.2}), tmp_path / "loss.png")
    figure = drawn["loss.png"]
    assert [axis.get_title() for axis in figure.axes] == ["level 1", "level 2"]
    assert lines(figure, 1)["trivial predictor, held out"] == ([4], [0.2])
    assert "hidden tokens" in figure.axes[0].get_ylabel()


def test_a_run_that_holds_nothing_out_has_its_curve(drawn: dict[str, Figure], tmp_path: Path) -> None:
    steps = [row for row in rows(["contrast"], {}) if row["kind"] == "step"]
    pictures.draw_loss_curve(steps, tmp_path / "loss.png")
    assert [axis.get_title() for axis in drawn["loss.png"].axes] == ["contrast"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_similarities_are_drawn_with_the_views_that_they_are_of(drawn: dict[str, Figure], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    views = random.random((60, 5, 7, 6), np.float32)
    similarity = random.random((60, 60), np.float32)
    keys = [f"{number:016x}" for number in range(30)]
    pictures.draw_preview(SimilarityPreview(views, similarity), keys, tmp_path, 2)
    figure = drawn["similarity_2.png"]
    shown = [np.asarray(axis.images[0].get_array()) for axis in figure.axes if axis.images]
    count = pictures.MOST_COMPARED
    np.testing.assert_array_equal(shown[2 * count], similarity[:count, :count])
    for view in range(count):
        for image in shown[2 * view : 2 * view + 2]:
            np.testing.assert_array_equal(image, views[view, 2, ::-1, ::-1])
    labels = [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel() not in ("", "cosine")]
    assert labels == [key[:8] for key in keys[: count // 2]]


def test_reconstructions_name_their_volume(drawn: dict[str, Figure], tmp_path: Path) -> None:
    picture = np.random.default_rng(0).random((1, 4, 4, 4), np.float32)
    level = LevelPreview(picture, picture, picture, np.ones((1, 4, 4, 4), np.bool_))
    pictures.draw_preview([level], ["abc"], tmp_path, 1)
    assert drawn["reconstruction_1.png"].get_suptitle() == "held-out volume abc"
