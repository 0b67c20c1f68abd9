"""What a report is made of: scores, distances, charts and thumbnails, each against numbers worked out by hand."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.report.charts import histogram
from data_pipeline.report.outliers import MEASURES, Measure, find_outliers, histogram_distances, scores
from data_pipeline.report.thumbnails import thumbnail
from mim_scale.store.dataset import Dataset, commit_dataset
from mim_scale.store.manifest import Row
from mim_scale.store.slices import read_slice
from mim_scale.store.volume import Volume
from tests.synthetic import make_affine, store_volume


def test_scores_are_robust_z_scores() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 100.0])
    away = np.abs(values - 4.0)
    assert scores(values, Measure("m", "mm", 0.1)) == pytest.approx(away / (1.4826 * 2.0))
    # Where all agree, deviations count in units of the least scale; ratios count the same both ways.
    ratios = scores(np.array([8.0, 8.0, 8.0, 8.0, 4.0, 16.0]), Measure("m", "mm", 0.1, is_ratio=True))
    assert ratios == pytest.approx([0, 0, 0, 0, np.log(2) / 0.1, np.log(2) / 0.1])


def test_few_volumes_have_no_outliers() -> None:
    columns = {measure.name: np.array([*[10.0] * 6, 90.0]) for measure in MEASURES}
    assert find_outliers(columns) == []
    more = {name: np.array([10.0, *values]) for name, values in columns.items()}
    assert [outlier.index for outlier in find_outliers(more)] == [7]


def test_the_distance_of_histograms_is_in_hu() -> None:
    shares = np.zeros((1, 64), np.float32)
    shares[0, 10] = 1
    total = np.zeros(64, np.int64)
    total[13] = 500
    assert histogram_distances(shares, total, 64.0) == pytest.approx([3 * 64.0])


def test_a_histogram_counts_every_volume() -> None:
    values = np.concatenate([np.full(200, 2.5), [np.nan] * 7, [0.01, 900.0], np.linspace(1, 4, 91)])
    chart = histogram("Spacing z", "mm", values)
    assert sum(int(count.replace(",", "")) for count in re.findall(r"mm: ([\d,]+) volumes?", chart)) == 293
    assert "7 not said" in chart
    assert "the outer bars hold all beyond" in chart
    assert "No volume says it" in histogram("kV", "kV", np.full(3, np.nan))
    same = histogram("Spacing z", "mm", np.full(5, 2.0))
    assert re.findall(r": (\d+) volumes?", same) == ["5"]


def marked(path: Path) -> tuple[Dataset, Row]:
    """A store of one volume: air, but for the corner towards head, front and right."""
    voxels = np.full((24, 96, 48), -1000, np.int16)
    voxels[16:, 64:, 32:] = 200
    volume = Volume(voxels, (4.0, 1.0, 1.0), make_affine((4.0, 1.0, 1.0)))
    row = store_volume(path, volume)
    commit_dataset(path, [row], [], {"source": "synthetic"})
    return Dataset.open(path), row


def test_slices_are_upright(tmp_path: Path) -> None:
    dataset, row = marked(tmp_path)
    reader = dataset.reader(row)
    for axis, shape in enumerate(((96, 48), (24, 48), (24, 96))):
        image = read_slice(reader, 0, axis, row.shape[axis] - 1)
        assert image.shape == shape
        assert image[0, 0] == 200
        assert image[-1, 0] == image[0, -1] == -1000


def test_thumbnails_are_in_proportion_and_upright(tmp_path: Path) -> None:
    dataset, row = marked(tmp_path)
    uri = thumbnail(dataset.reader(row), row)
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))
    # 96 x 96 x 48 mm at 132 pixels for the longest side: axial 132 x 66, coronal 132 x 66, sagittal 132 x 132.
    assert picture.shape == (132 * 2 + 3, 66 + 66 + 132 + 2 * 3)
    # The middle slices miss the corner: nothing but air, grey in the lung window alone.
    assert picture[:130].max() < 20
    assert 40 < np.median(picture[140:]) < 80
