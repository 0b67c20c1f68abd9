"""What `data peek` draws is what is stored and planned: boxes, masks and slices where they belong."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from mim_scale.cli import run
from mim_scale.config_file import dump_config
from mim_scale.errors import ConfigError, DamagedError, StoreError
from mim_scale.store.dataset import volume_folder
from mim_scale.store.manifest import split_subjects
from mim_scale.streaming import peek
from mim_scale.streaming.reader import SampleReader
from tests.streaming.packs import CONFIG, config_for
from tests.synthetic import make_dataset


@pytest.fixture
def config_path(dataset, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(config_for("/nowhere", held_out_subjects=1)))
    return path


@pytest.fixture
def figures(monkeypatch):
    """Figures that would be saved: drawing them to the last pixel takes a second each."""
    drawn = []
    monkeypatch.setattr(peek, "_save", lambda figure, path: drawn.append(figure))
    return drawn


def sample_at(dataset, position, held_out=False):
    config = config_for(dataset.path, 1)
    rows = split_subjects(dataset.rows, config.seed, 1)[held_out]
    return SampleReader(dataset, rows, CONFIG, config.seed, held_out).sample(position)


def pictures(figure):
    """Every picture of a figure by the row it stands in: (axes, image), left to right."""
    return [[(axes, axes.images[0].get_array()) for axes in part.axes if axes.images] for part in figure.subfigs]


def shaded(image):
    """Where a picture in colour is not grey."""
    return image[..., 0] != image[..., 2]


def test_a_volume_is_drawn_at_its_proportions(dataset, figures, tmp_path, capsys):
    out = tmp_path / "peek.png"
    row = dataset.rows[1]
    assert run(["data", "peek", str(dataset.path), row.key[:9], "--out", str(out)]) == 0
    assert f"volume {row.key}, one of {len(dataset.rows)}" in capsys.readouterr().out
    (figure,) = figures
    axes = [axes for axes in figure.axes if axes.images]
    assert len(axes) == 18
    z, y, x = (length * spacing for length, spacing in zip(row.shape, row.spacing_mm, strict=True))
    for axis, (height, width) in enumerate([(y, x), (z, x), (z, y)]):
        of_plane = axes[axis * 6 : axis * 6 + 6]
        assert all(picture.images[0].get_extent() == pytest.approx([0, width, height, 0]) for picture in of_plane)
        assert all(picture.get_aspect() == 1 for picture in of_plane)
        indices = [int((column + 0.5) / 6 * row.shape[axis]) for column in range(6)]
        for picture, index in zip(of_plane, indices, strict=True):
            voxels = dataset.reader(row).read_box(0, peek.Box((0, 0, 0), row.shape)).take(index, axis)
            assert np.array_equal(picture.images[0].get_array(), voxels[::-1, ::-1])
            assert picture.get_title() == f"{(index + 0.5) * row.spacing_mm[axis]:.0f} mm"


def test_the_first_volume_is_drawn_where_none_is_named(dataset, tmp_path, capsys):
    out = tmp_path / "peek.png"
    assert run(["data", "peek", str(dataset.path), "--out", str(out)]) == 0
    assert dataset.rows[0].key in capsys.readouterr().out
    assert Image.open(out).format == "PNG"


def test_the_window_is_the_one_asked_for(dataset, figures, tmp_path):
    for words, window in (([], (-160, 240)), (["--window", "lung"], (-1350, 150))):
        run(["data", "peek", str(dataset.path), "--out", str(tmp_path / "peek.png"), *words])
        assert {axes.images[0].get_clim() for axes in figures[-1].axes if axes.images} == {window}


@pytest.mark.parametrize("position", [0, 3, 11])
def test_hidden_tokens_are_shaded_and_children_lie_in_them(dataset, config_path, figures, tmp_path, position):
    words = ["data", "peek", str(dataset.path), "--config", str(config_path), "--position", str(position)]
    assert run([*words, "--out", str(tmp_path / "peek.png")]) == 0
    sample = sample_at(dataset, position)
    context, *levels = pictures(figures[0])
    assert len(context) == 3
    assert [len(row) for row in levels] == [3, 3, 6]
    for level, row in enumerate(levels):
        planes = (0, 1, 2) if level == 0 else (0,) * len(row)
        for view, (axis, (axes, image)) in enumerate(zip(planes, row, strict=True)):
            view = 0 if level == 0 else view  # noqa: PLW2901
            check_view(sample, level, view, axis, axes, image)


def check_view(sample, level, view, axis, axes, image):
    """The slice is one of the view's, shaded where the plan hides tokens; each child's outline is shaded inside."""
    plan = sample.plan.levels[level]
    start, region = plan.starts[view], np.array(CONFIG.region(level))
    block = sample.block[tuple(slice(a, a + n) for a, n in zip(start, region, strict=True))]
    hidden = np.zeros(CONFIG.num_tokens, bool)
    hidden[plan.hidden[view]] = True
    hidden = hidden.reshape(CONFIG.grid)
    for axis_of, (length, tokens) in enumerate(zip(region, CONFIG.grid, strict=True)):
        hidden = hidden.take(np.arange(length) * tokens // length, axis_of)
    grey = np.clip((block + 1000) / 2000, 0, 1)
    match = [
        at
        for at in range(region[axis])
        if np.array_equal(shaded(image), hidden.take(at, axis)[::-1, ::-1])
        and np.allclose(image[~shaded(image)][:, 0], grey.take(at, axis)[::-1, ::-1][~shaded(image)])
    ]
    assert match
    if level + 1 < len(sample.plan.levels):
        below = sample.plan.levels[level + 1]
        children = np.flatnonzero(below.parent == view)
        outlines = [patch for patch in axes.patches if hasattr(patch, "get_width")]
        assert len(outlines) == len(children) > 0
        assert any(outline.get_linestyle() == "-" for outline in outlines)
        height, width = axes.images[0].get_extent()[2], axes.images[0].get_extent()[1]
        scale = image.shape[0] / height, image.shape[1] / width
        for outline in outlines:
            left, top = outline.get_x() * scale[1], outline.get_y() * scale[0]
            right, bottom = left + outline.get_width() * scale[1], top + outline.get_height() * scale[0]
            part = shaded(image)[round(top) : round(bottom), round(left) : round(right)]
            assert part.size == np.prod(np.delete(CONFIG.region(level + 1), axis))
            if outline.get_linestyle() == "-":
                assert part.all()


def test_the_outer_box_is_outlined_where_it_lies(dataset, config_path, figures, tmp_path):
    words = ["data", "peek", str(dataset.path), "--config", str(config_path), "--position", "3"]
    assert run([*words, "--out", str(tmp_path / "peek.png")]) == 0
    sample = sample_at(dataset, 3)
    row = next(row for row in dataset.rows if row.key == sample.key)
    for axis, (axes, _) in enumerate(pictures(figures[0])[0]):
        (outline,) = axes.patches
        a, b = (other for other in range(3) if other != axis)
        first, last = (
            (edge[a] * row.spacing_mm[a], edge[b] * row.spacing_mm[b])
            for edge in (sample.plan.box.start, sample.plan.box.stop)
        )
        height, width = (row.shape[other] * row.spacing_mm[other] for other in (a, b))
        assert outline.get_xy() == pytest.approx((width - last[1], height - last[0]))
        assert (outline.get_width(), outline.get_height()) == pytest.approx((last[1] - first[1], last[0] - first[0]))


def test_a_sample_is_a_picture_whole(split_pack, tmp_path):
    out = tmp_path / "peek.png"
    assert run(["data", "peek", str(split_pack), "--position", "7", "--out", str(out)]) == 0
    picture = Image.open(out)
    picture.load()
    assert picture.format == "PNG"
    assert [path.name for path in tmp_path.iterdir()] == ["peek.png"]


def test_a_pack_shows_what_its_store_shows(dataset, split_pack, config_path, figures, tmp_path):
    out = tmp_path / "peek.png"
    for held_out, position in ((False, 6), (True, 0)):
        more = ["--position", str(position), "--out", str(out), *(["--held-out"] if held_out else [])]
        assert run(["data", "peek", str(split_pack), *more]) == 0
        assert run(["data", "peek", str(dataset.path), "--config", str(config_path), *more]) == 0
        packed, cut = (pictures(figure) for figure in figures[-2:])
        assert len(cut) == len(packed) + 1
        for one, other in zip(packed, cut[1:], strict=True):
            assert len(one) == len(other) > 0
            assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(one, other, strict=True))


def test_overrides_count(dataset, config_path, figures, tmp_path):
    out = str(tmp_path / "peek.png")
    words = ["data", "peek", str(dataset.path), "--position", "2", "--out", out, "--config", str(config_path)]
    run(words)
    run([*words, "seed=99"])
    first, second = (pictures(figure)[1][0][1] for figure in figures)
    assert not np.array_equal(first, second)


def test_mistakes_are_one_line_and_leave_no_picture(dataset, split_pack, config_path, tmp_path):
    store, pack, out = str(dataset.path), str(split_pack), tmp_path / "peek.png"
    run_config = ["--config", str(config_path)]
    cases = [
        ([store, "zz"], StoreError, "no volume has a key that begins with zz"),
        ([store, "--position", "1"], ConfigError, "add --config CONFIG"),
        ([store, *run_config], ConfigError, "add --position N"),
        ([store, "ab", *run_config, "--position", "1"], ConfigError, "give one of them"),
        ([store, *run_config, "--position", "-1"], ConfigError, "expected 0 or more"),
        ([store, "--position", "1", *run_config, "stray"], ConfigError, "'stray' stands behind --config"),
        ([pack], ConfigError, "add --position N"),
        ([pack, "--position", "6", *run_config], ConfigError, "leave --config out"),
        ([pack, "--position", "60"], StoreError, "position 60 is not in the pack, which holds 5 to 12"),
        ([str(tmp_path / "nowhere")], StoreError, "no such store"),
    ]
    for words, kind, message in cases:
        with pytest.raises(kind, match=re.escape(message)):
            run(["data", "peek", *words, "--out", str(out)])
        assert not out.exists()


def test_a_short_key_that_two_volumes_share_is_refused(tmp_path):
    shapes = [(16, 16, 16)] * 17
    dataset = make_dataset(tmp_path / "store", shapes)
    first = [row.key[0] for row in dataset.rows]
    shared = next(digit for digit in first if first.count(digit) > 1)
    with pytest.raises(StoreError, match=f"{first.count(shared)} volumes have keys that begin with {shared}"):
        run(["data", "peek", str(dataset.path), shared])


def test_damage_is_named(dataset, tmp_path):
    copy = shutil.copytree(dataset.path, tmp_path / "store")
    shutil.rmtree(volume_folder(copy, dataset.rows[0].key) / "0" / "c")
    with pytest.raises(DamagedError, match=f"volume {dataset.rows[0].key}: level 0"):
        run(["data", "peek", str(copy), "--out", str(tmp_path / "peek.png")])
    assert not (tmp_path / "peek.png").exists()
