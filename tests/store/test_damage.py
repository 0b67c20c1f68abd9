"""Damaged bytes are named, never read: volume key, level and chunk."""

import json
import pickle
import re
import shutil

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mim_scale.errors import DamagedError, StoreError
from mim_scale.store.array_format import FORMAT_VERSION
from mim_scale.store.array_store import VolumeReader, write_volume
from mim_scale.store.geometry import Box, whole_box
from tests.synthetic import make_volume

SHAPE = (70, 70, 300)
KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "v.zarr"
    write_volume(folder, make_volume(SHAPE, spacing_mm=(1.0, 1.0, 1.0)))
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "v.zarr")


def read(folder, level=0):
    reader = VolumeReader(folder, KEY, SHAPE)
    return reader.read_box(level, whole_box(reader.level_shapes[level]))


def shard(folder, level=0, index="0/0/0"):
    return folder / str(level) / "c" / index


def chunk_at(path, offset, shape=(2, 2, 4)):
    """The chunk of a shard whose bytes hold this offset; None for the index."""
    raw = path.read_bytes()
    entries = np.frombuffer(raw[-(16 * np.prod(shape) + 4) : -4], "<u8").reshape(*shape, 2)
    for index in np.ndindex(*shape):
        start, size = entries[index]
        if start != 2**64 - 1 and start <= offset < start + size:
            return index
    return None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_one_flipped_bit_anywhere_in_a_shard(original, tmp_path, place, bit):
    folder = shutil.copytree(original, tmp_path / "v.zarr", dirs_exist_ok=True)
    path = shard(folder)
    raw = bytearray(path.read_bytes())
    offset = int(place * len(raw))
    chunk = chunk_at(path, offset)
    raw[offset] ^= 1 << bit
    path.write_bytes(raw)
    with pytest.raises(DamagedError) as caught:
        read(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert f"volume {KEY}: level 0, chunk {chunk or (0, 0, 0)}" in message
    assert re.search("fails (its checksum|to decode)|index of its file fails", message)
    assert str(folder) not in message


def test_a_box_beside_the_damage_is_still_read(folder):
    raw = bytearray(shard(folder).read_bytes())
    raw[10] ^= 1
    shard(folder).write_bytes(raw)
    bad = chunk_at(shard(folder), 10)
    reader = VolumeReader(folder, KEY, SHAPE)
    start = (0, 0, 256)  # another shard
    assert reader.read_box(0, Box(start, (70, 70, 44))).shape == (70, 70, 44)
    with pytest.raises(DamagedError, match=r"fails (its checksum|to decode)"):
        reader.read_box(0, Box(tuple(i * 64 for i in bad), (1, 1, 1)))


def test_missing_shard(folder):
    shard(folder, 0, "0/0/1").unlink()
    with pytest.raises(DamagedError, match=r"level 0, chunk \(0, 0, 4\) and 3 more \(file 0/c/0/0/1\): is missing"):
        read(folder)


def test_missing_shard_of_a_coarse_level(folder):
    shard(folder, 1).unlink()
    read(folder, 0)
    with pytest.raises(DamagedError, match=r"level 1, chunk \(0, 0, 0\).*is missing"):
        read(folder, 1)


@pytest.mark.parametrize("keep", [0, 1, 100, -1, -200])
def test_truncated_shard(folder, keep):
    raw = shard(folder).read_bytes()
    shard(folder).write_bytes(raw[:keep])
    with pytest.raises(DamagedError, match=r"level 0, chunk \(0, 0, 0\)"):
        read(folder)


def test_a_chunk_never_written(folder):
    array = zarr.open_array(folder / "0", mode="r+", config={"write_empty_chunks": False})
    array[64:70, 64:70, 64:128] = -32768
    with pytest.raises(DamagedError, match=r"level 0, chunk \(1, 1, 1\) .*is missing"):
        read(folder)


def test_the_fill_value_is_refused(folder):
    zarr.open_array(folder / "0", mode="r+")[64, 64, 64] = -32768
    with pytest.raises(DamagedError, match=r"level 0, chunk \(1, 1, 1\) .*never written"):
        read(folder)


@pytest.mark.parametrize("name", ["zarr.json", "0/zarr.json"])
@pytest.mark.parametrize("change", ["remove", "empty", "half", "text", "list"])
def test_damaged_metadata(folder, name, change):
    path = folder / name
    text = path.read_bytes()
    match change:
        case "remove":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "half":
            path.write_bytes(text[: len(text) // 2])
        case "text":
            path.write_bytes(b"\xff" + text)
        case "list":
            path.write_bytes(b"[]")
    with pytest.raises(DamagedError, match=f"volume {KEY}: .*metadata is (missing|unreadable|incomplete)"):
        read(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["zarr.json", "0/zarr.json"]), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_one_flipped_bit_in_metadata_changes_no_voxel(original, tmp_path, name, place, bit):
    folder = shutil.copytree(original, tmp_path / "v.zarr", dirs_exist_ok=True)
    raw = bytearray((folder / name).read_bytes())
    raw[int(place * len(raw))] ^= 1 << bit
    (folder / name).write_bytes(raw)
    try:
        voxels = read(folder)
    except StoreError as error:
        assert KEY in str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
    else:
        np.testing.assert_array_equal(voxels, read(original))


def test_another_shape_than_the_manifest_says(folder):
    with pytest.raises(DamagedError, match="contradicts itself or the manifest"):
        VolumeReader(folder, KEY, (70, 70, 299)).read_box(0, Box((0, 0, 0), (1, 1, 1)))


def test_another_format_version(folder):
    values = json.loads((folder / "zarr.json").read_text())
    values["attributes"]["mim_scale"]["format_version"] = FORMAT_VERSION + 1
    (folder / "zarr.json").write_text(json.dumps(values))
    with pytest.raises(StoreError, match=f"format version {FORMAT_VERSION + 1}, this program reads {FORMAT_VERSION}"):
        read(folder)


def test_the_error_travels(folder):
    shard(folder).unlink()
    with pytest.raises(DamagedError) as caught:
        read(folder)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert caught.value.exit_code == 3
