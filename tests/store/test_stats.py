"""stats counts what rows hold, and says how much was not said."""

from dataclasses import replace

import pytest

from mim_scale.errors import StoreError
from mim_scale.store.dataset import commit_dataset
from mim_scale.store.manifest import QuarantineRow
from mim_scale.store.stats import stats
from tests.synthetic import make_dataset

SHAPES = ((20, 24, 28), (70, 20, 24), (16, 30, 20))


@pytest.fixture
def dataset(tmp_path):
    refused = [QuarantineRow("0", "nifti", "not_ct", "MR"), QuarantineRow("1", "dicom", "not_ct", "PT")]
    dataset = make_dataset(tmp_path / "store", SHAPES, quarantine=refused)
    first, second, third = dataset.rows
    told = {"manufacturer": "GE", "model": "LightSpeed 16", "kernel": "STANDARD", "tube_kv": 120.0}
    rows = [
        replace(first, **told, slice_thickness_mm=5.0, flags=("contrast_agent", "face_likely"), bytes_source=1),
        replace(second, **told, slice_thickness_mm=3.0, flags=("face_likely",), bytes_source=2),
        replace(third, group=second.group, repairs=("reoriented",), bytes_source=4),
    ]
    commit_dataset(dataset.path, rows, refused, {"source": "synthetic"})
    return dataset


def test_stats(dataset):
    numbers = stats(dataset.path)
    assert numbers["num_volumes"] == numbers["num_subjects"] == 3
    assert numbers["num_groups"] == 2
    assert numbers["num_quarantined"] == 2
    assert numbers["quarantine_reasons"] == {"not_ct": 2}
    assert numbers["bytes_raw"] == sum(2 * z * y * x for z, y, x in SHAPES)
    assert numbers["bytes_source"] == 7
    assert numbers["compression_ratio"] == pytest.approx(numbers["bytes_raw"] / numbers["bytes_stored"])
    assert numbers["shape"]["z"]["median"] == 20
    assert numbers["shape"]["z"]["max"] == 70
    assert numbers["spacing_mm"]["z"]["min"] == 2.5
    assert numbers["hu"]["min"] == -1024
    assert set(numbers["hu"]["mean"]) == {"min", "q25", "median", "q75", "max"}


def test_stats_of_the_acquisition(dataset):
    numbers = stats(dataset.path)
    assert numbers["source_formats"] == {"nifti": 3}
    assert numbers["manufacturers"] == {"GE": 2, "not said": 1}
    assert numbers["models"] == {"LightSpeed 16": 2, "not said": 1}
    assert numbers["kernels"] == {"STANDARD": 2, "not said": 1}
    assert numbers["tube_kv"] == {"120": 2, "not said": 1}
    assert numbers["flags"] == {"contrast_agent": 1, "face_likely": 2}
    assert numbers["repairs"] == {"reoriented": 1}
    thickness = numbers["slice_thickness_mm"]
    assert (thickness["not_said"], thickness["min"], thickness["median"], thickness["max"]) == (1, 3.0, 4.0, 5.0)


def test_no_store_is_an_error(tmp_path):
    with pytest.raises(StoreError, match="no such store"):
        stats(tmp_path / "nothing")
