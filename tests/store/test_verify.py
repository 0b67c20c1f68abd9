"""verify finds what is wrong and nothing else; stats counts."""

import re
import shutil

import numpy as np
import pytest
import zarr

from mim_scale.errors import StoreError
from mim_scale.store.dataset import Dataset, volume_folder
from mim_scale.store.manifest import QuarantineRow
from mim_scale.store.verify import stats, verify
from tests.synthetic import make_dataset

SHAPES = ((20, 30, 40), (20, 30, 40), (70, 20, 20))


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "store", SHAPES, quarantine=[QuarantineRow("a", "nifti", "not_ct", "no HU")])


def shard(dataset: Dataset, row: int, level: int = 0):
    return volume_folder(dataset.path, dataset.rows[row].key) / str(level) / "c" / "0" / "0" / "0"


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[5] ^= 4
    path.write_bytes(raw)


def test_a_whole_store_is_clean(dataset):
    calls = []
    assert verify(dataset.path, deep=False, progress=None) == []
    assert verify(dataset.path, True, lambda done, total: calls.append((done, total))) == []
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_fast_finds_missing_truncated_and_metadata(dataset):
    keys = [row.key for row in dataset.rows]
    shutil.rmtree(volume_folder(dataset.path, keys[0]))
    raw = shard(dataset, 1).read_bytes()
    shard(dataset, 1).write_bytes(raw[:-1])
    metadata = volume_folder(dataset.path, keys[2]) / "1" / "zarr.json"
    metadata.write_text(metadata.read_text().replace("zstd", "lz4"))
    problems = verify(dataset.path, deep=False)
    assert [problem.key for problem in problems] == keys
    details = [problem.detail for problem in problems]
    for detail, words in zip(details, ["folder is missing", "bytes on disk", "level 1: metadata"], strict=True):
        assert words in detail
        assert "\n" not in detail


def test_deep_finds_bits_and_exchanged_files(dataset):
    flip(shard(dataset, 0))
    flip(shard(dataset, 0, level=2))
    assert verify(dataset.path, deep=False) == []
    problems = verify(dataset.path, deep=True)
    assert [(problem.key, problem.level) for problem in problems] == [(dataset.rows[0].key, level) for level in (0, 2)]
    assert re.search("fails (its checksum|to decode)", problems[0].detail)


def test_deep_finds_whole_files_that_are_wrong(dataset, monkeypatch):
    # Same sizes, valid checksums, other voxels: only the content hash can tell.
    monkeypatch.setattr("mim_scale.store.verify.folder_bytes", lambda folder: sizes[folder.name.removesuffix(".zarr")])
    sizes = {row.key: row.bytes_stored for row in dataset.rows}
    for row, level in ((0, 0), (1, 1)):
        array = zarr.open_array(volume_folder(dataset.path, dataset.rows[row].key) / str(level), mode="r+")
        array[3, 3, 3] = array[3, 3, 3] + np.int16(1)
    problems = verify(dataset.path, deep=True)
    assert "voxels are not those that were committed" in problems[0].detail
    assert "level 1 is no mean of level 0" in problems[1].detail
    assert len(problems) == 2


def test_damaged_tables_are_problems_and_no_store_is_an_error(dataset, tmp_path):
    (dataset.path / "quarantine.parquet").write_bytes(b"")
    problems = verify(dataset.path, deep=False)
    assert [(problem.key, problem.level) for problem in problems] == [("", -1)]
    with pytest.raises(StoreError, match="no such store"):
        verify(tmp_path / "nothing", deep=False)


def test_stats(dataset):
    numbers = stats(dataset.path)
    assert numbers["num_volumes"] == numbers["num_subjects"] == 3
    assert numbers["num_quarantined"] == 1
    assert numbers["quarantine_reasons"] == {"not_ct": 1}
    assert numbers["bytes_raw"] == sum(2 * z * y * x for z, y, x in SHAPES)
    assert numbers["compression_ratio"] == pytest.approx(numbers["bytes_raw"] / numbers["bytes_stored"])
    assert numbers["shape"]["z"]["median"] == 20
    assert numbers["shape"]["z"]["max"] == 70
    assert numbers["spacing_mm"]["z"]["min"] == 2.5
    assert numbers["hu"]["min"] == -1024
    assert set(numbers["hu"]["mean"]) == {"min", "q25", "median", "q75", "max"}
