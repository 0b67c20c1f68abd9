"""verify finds what is wrong and nothing else."""

import dataclasses
import re
import shutil
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mim_scale.errors import StoreError
from mim_scale.store.array_store import folder_bytes
from mim_scale.store.dataset import Dataset, commit_dataset, volume_folder
from mim_scale.store.manifest import QuarantineRow
from mim_scale.store.verify import sampled, strangers, verify
from tests.synthetic import make_dataset, make_volume, store_volume

SHAPES = ((20, 30, 40), (20, 30, 40), (70, 20, 20))


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "store", SHAPES, quarantine=[QuarantineRow("a", "nifti", "not_ct", "no HU")])


def shard(dataset: Dataset, row: int, level: int = 0):
    return volume_folder(dataset.path, dataset.rows[row].key) / str(level) / "c" / "0" / "0" / "0"


def test_a_whole_store_is_clean(dataset):
    calls = []
    assert verify(dataset.path) == []
    assert verify(dataset.path, True, lambda done, total: calls.append((done, total)), workers=1) == []
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert strangers(dataset.path) == []


def test_missing_cut_short_and_put_beside(dataset):
    keys = [row.key for row in dataset.rows]
    folders = [volume_folder(dataset.path, key) for key in keys]
    shutil.rmtree(folders[0])
    raw = shard(dataset, 1).read_bytes()
    shard(dataset, 1).write_bytes(raw[:10])
    shard(dataset, 1, level=1).unlink()
    (folders[1] / "notes.txt").write_text("mine")
    (folders[2] / "1" / "zarr.json").unlink()
    (dataset.path / "volumes" / "other").mkdir()
    (dataset.path / "volumes" / ".tmp-1-x").mkdir()
    problems = verify(dataset.path)
    told = [(problem.key, problem.level, problem.file, problem.detail) for problem in problems]
    expected = [
        (keys[0], -1, "", "its folder is missing"),
        (keys[1], 0, "0/c/0/0/0", "level 0 (file 0/c/0/0/0): is truncated to 10 bytes"),
        (keys[1], 1, "1/c/0/0/0", "level 1 (file 1/c/0/0/0): is missing"),
        (keys[1], -1, "notes.txt", "does not belong to it"),
        (keys[2], 1, "1/zarr.json", "level 1: metadata is missing"),
    ]
    for (key, level, file, detail), (key_, level_, file_, words) in zip(told, expected, strict=True):
        assert (key, level, file) == (key_, level_, str(Path("volumes") / f"{key_}.zarr" / file_))
        assert words in detail
        assert "\n" not in detail
    assert strangers(dataset.path) == ["other"]


def test_a_chunk_never_written_and_bytes_of_no_chunk(dataset):
    row = dataset.rows.index(next(row for row in dataset.rows if row.shape == (70, 20, 20)))
    raw = shard(dataset, row).read_bytes()
    index = np.frombuffer(raw[-(2 * 16 + 4) : -4], "<u8").reshape(2, 2).copy()
    chunks = [raw[offset : offset + size] for offset, size in index.tolist()]

    def written(body: bytes, entries: list[list[int]]) -> list[str]:
        table = np.array(entries, "<u8").tobytes()
        shard(dataset, row).write_bytes(body + table + google_crc32c.value(table).to_bytes(4, "little"))
        return [re.sub(".*: level", "level", problem.detail) for problem in verify(dataset.path)]

    sizes = [len(chunk) for chunk in chunks]
    absent = 2**64 - 1
    assert "chunk (1, 0, 0) (file 0/c/0/0/0): is missing" in written(chunks[0], [[0, sizes[0]], [absent, absent]])[0]
    there = [[0, sizes[0]], [sizes[0] + 3, sizes[1]]]
    assert f"begins at byte {sizes[0] + 3}, expected {sizes[0]}" in written(chunks[0] + b"abc" + chunks[1], there)[0]
    there = [[0, sizes[0]], [sizes[0], sizes[1]]]
    assert "3 of its bytes belong to no chunk" in written(chunks[0] + chunks[1] + b"abc", there)[0]
    assert "begins at byte 0, expected" in written(chunks[0] + chunks[1], [[0, sizes[0]], [0, sizes[0]]])[0]
    assert "reaches beyond the file" in written(chunks[0] + chunks[1], [[0, sizes[0]], [sizes[0], 2**40]])[0]
    # Another order of chunks is as good.
    assert written(chunks[1] + chunks[0], [[sizes[1], sizes[0]], [0, sizes[1]]]) == []


def regions(path: Path) -> dict[str, list[tuple[Path, int, int]]]:
    """(file, first byte, byte after the last) of every region of a dataset, by kind."""
    found: dict[str, list[tuple[Path, int, int]]] = {}
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        size = file.stat().st_size
        if "c" not in file.parts:
            found.setdefault(file.name, []).append((file, 0, size))
            continue
        found.setdefault("crc of index", []).append((file, size - 4, size))
        found.setdefault("index", []).append((file, size - 20, size - 4))
        offset, length = np.frombuffer(file.read_bytes()[-20:-4], "<u8").tolist()
        found.setdefault("crc of chunk", []).append((file, offset + length - 4, offset + length))
        found.setdefault("chunk", []).append((file, offset, offset + length - 4))
    return found


KINDS = (
    *("chunk", "crc of chunk", "index", "crc of index", "zarr.json"),
    *("manifest.parquet", "quarantine.parquet", "fingerprints.parquet", "dataset.json"),
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    path = tmp_path_factory.mktemp("flips") / "store"
    return make_dataset(path, SHAPES[1:], quarantine=[QuarantineRow("a", "nifti", "not_ct", "no HU")])


def test_the_regions_are_all_there_is(shared):
    assert set(regions(shared.path)) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_one_flipped_bit_anywhere_is_found_and_named(shared, kind):
    places = regions(shared.path)[kind]

    @settings(max_examples=25, deadline=None)
    @given(st.sampled_from(places), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
    def flips(place, where, bit):
        file, start, stop = place
        whole = file.read_bytes()
        raw = bytearray(whole)
        raw[start + int(where * (stop - start))] ^= 1 << bit
        file.write_bytes(raw)
        try:
            problems = verify(shared.path, workers=1)
        finally:
            file.write_bytes(whole)
        name = str(file.relative_to(shared.path))
        if name.startswith("volumes"):
            level = int(file.parts[-5]) if "c" in file.parts else None
            assert {problem.key for problem in problems} == {file.relative_to(shared.path).parts[1][:-5]}
            assert {problem.file for problem in problems} == {name}
            assert level is None or {problem.level for problem in problems} == {level}
            assert kind not in {"chunk", "crc of chunk"} or "chunk (" in problems[0].detail
        else:
            assert {problem.key for problem in problems} == {""}
            assert name in problems[0].detail

    flips()


def test_a_sample_is_seeded_and_never_empty(dataset):
    many = [dataclasses.replace(dataset.rows[0], key=f"{number:016x}") for number in range(400)]
    first, again, other = (sampled(many, 0.1, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len(first) == 40
    assert set(first) < set(sampled(many, 0.2, 0))
    assert list(first) == sorted(first, key=lambda row: row.key)
    assert len(sampled(many, 1e-9, 0)) == 1
    assert sampled(many, 1.0, 5) == tuple(many)
    calls = []
    assert verify(dataset.path, progress=lambda done, total: calls.append((done, total)), share=0.5) == []
    assert calls == [(1, 2), (2, 2)]


def test_deep_compares_the_manifest(dataset):
    wrong = dataclasses.replace(dataset.rows[0], hu_max=4000, hu_mean=dataset.rows[0].hu_mean + 1, voxel_hash="0")
    commit_dataset(dataset.path, [wrong, *dataset.rows[1:]], dataset.quarantine, {})
    assert verify(dataset.path) == []
    problems = verify(dataset.path, deep=True)
    assert [problem.key for problem in problems] == [wrong.key]
    assert "the manifest says another voxel_hash, hu_max, hu_mean than its voxels" in problems[0].detail


def test_deep_finds_another_foreground(dataset):
    bits = bytearray(dataset.rows[0].foreground)
    bits[0] ^= 0x80
    wrong = dataclasses.replace(dataset.rows[0], foreground=bytes(bits))
    commit_dataset(dataset.path, [wrong, *dataset.rows[1:]], dataset.quarantine, {})
    assert verify(dataset.path) == []
    (problem,) = verify(dataset.path, deep=True)
    assert problem.detail.startswith(f"volume {wrong.key}: the manifest says another foreground than its voxels")


def test_deep_finds_whole_files_that_are_wrong(dataset, tmp_path):
    # Valid checksums, the same sizes of files, other voxels: only decoding can tell.
    a, b = (row for row in dataset.rows if row.shape == (20, 30, 40))
    volume = make_volume((20, 30, 40), seed=7)
    other = store_volume(tmp_path / "other", volume)
    for row, level in ((a, 0), (b, 1)):
        path = volume_folder(dataset.path, row.key) / str(level)
        shutil.rmtree(path)
        shutil.copytree(volume_folder(tmp_path / "other", other.key) / str(level), path)
    rows = [
        dataclasses.replace(row, bytes_stored=folder_bytes(volume_folder(dataset.path, row.key)))
        for row in dataset.rows
    ]
    commit_dataset(dataset.path, rows, dataset.quarantine, {})
    assert verify(dataset.path) == []
    problems = {problem.key: problem.detail for problem in verify(dataset.path, deep=True)}
    assert problems.keys() == {a.key, b.key}
    assert "voxels are not those that were committed" in problems[a.key]
    assert "level 1 is no mean of level 0" in problems[b.key]


def test_another_size_is_found_where_all_checksums_hold(dataset):
    row = dataclasses.replace(dataset.rows[0], bytes_stored=dataset.rows[0].bytes_stored + 1)
    commit_dataset(dataset.path, [row, *dataset.rows[1:]], dataset.quarantine, {})
    assert [problem.key for problem in verify(dataset.path)] == [row.key]


def test_damaged_tables_are_problems_and_no_store_is_an_error(dataset, tmp_path):
    (dataset.path / "quarantine.parquet").write_bytes(b"")
    problems = verify(dataset.path, deep=False)
    assert [(problem.key, problem.level) for problem in problems] == [("", -1)]
    with pytest.raises(StoreError, match="no such store"):
        verify(tmp_path / "nothing", deep=False)


def test_a_path_with_dots_leads_to_the_same_store(dataset, monkeypatch):
    (dataset.path / "elsewhere").mkdir()
    monkeypatch.chdir(dataset.path / "elsewhere")
    assert verify(Path("..") / ".." / dataset.path.name, True) == []
