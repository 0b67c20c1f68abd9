"""A volume goes in and comes out, voxel for voxel, by our reader and by others."""

import dataclasses
import json

import numpy as np
import pytest
import tensorstore
import yaozarrs
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from mim_scale.errors import StoreError
from mim_scale.store.array_format import shard_shape
from mim_scale.store.array_store import VolumeReader, folder_bytes, pyramid, write_volume
from mim_scale.store.geometry import Box, whole_box
from mim_scale.store.manifest import HU_EDGES
from mim_scale.store.volume import AIR_HU, FORBIDDEN_HU, Volume, content_hash, hu_histogram, volume_key, voxel_hash
from tests.synthetic import make_affine, make_volume

SHAPE = (70, 130, 66)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    volume = make_volume(SHAPE, seed=3)
    folder = tmp_path_factory.mktemp("store") / "v.zarr"
    size = write_volume(folder, volume)
    assert size == folder_bytes(folder)
    return folder, volume


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_read_box_is_a_slice(stored, data):
    folder, volume = stored
    levels = pyramid(volume)
    level = data.draw(st.integers(0, 2))
    pairs = [sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2))) for size in levels[level].shape]
    box = Box(tuple(a for a, _ in pairs), tuple(max(1, b - a) for a, b in pairs))
    if not box.is_inside(levels[level].shape):
        return
    voxels = VolumeReader(folder, "k", SHAPE).read_box(level, box)
    assert voxels.dtype == np.int16
    np.testing.assert_array_equal(voxels, levels[level][box.slices])


def test_a_box_outside_is_our_bug(stored):
    with pytest.raises(ValueError, match="not inside"):
        VolumeReader(stored[0], "k", SHAPE).read_box(0, Box((0, 0, 0), (71, 1, 1)))


@pytest.mark.parametrize("shape", [(1, 1, 1), (64, 64, 64), (65, 3, 257), (16, 300, 20)])
def test_any_shape_in_any_reader(tmp_path, shape):
    volume = make_volume(shape, seed=1, spacing_mm=(1.5, 1.0, 1.0))
    write_volume(tmp_path / "v.zarr", volume)
    reader = VolumeReader(tmp_path / "v.zarr", "k", shape)
    group = zarr.open_group(tmp_path / "v.zarr", mode="r")
    for level, expected in enumerate(pyramid(volume)):
        np.testing.assert_array_equal(reader.read_box(level, whole_box(expected.shape)), expected)
        np.testing.assert_array_equal(group[str(level)][:], expected)
        store = {"driver": "file", "path": str(tmp_path / "v.zarr" / str(level))}
        plain = tensorstore.open({"driver": "zarr3", "kvstore": store}, open=True).result()
        np.testing.assert_array_equal(plain.read().result(), expected)
        assert plain.domain.labels == ("z", "y", "x")
        assert group[str(level)].shards == shard_shape(expected.shape)


def test_metadata_is_ome_zarr(stored):
    folder, volume = stored
    image = yaozarrs.validate_ome_json((folder / "zarr.json").read_text())
    scales = [dataset.coordinateTransformations[0].scale for dataset in image.attributes.ome.multiscales[0].datasets]
    assert scales == [[2.5, 0.8, 0.8], [2.5, 1.6, 1.6], [5.0, 3.2, 3.2]]
    yaozarrs.validate_zarr_store(folder)
    own = json.loads((folder / "zarr.json").read_text())["attributes"]["mim_scale"]
    np.testing.assert_array_equal(own["affine"], volume.affine)
    np.testing.assert_array_equal(own["direction"], np.eye(3))


def test_air_is_written_too(tmp_path):
    air = Volume(np.full((130, 64, 64), AIR_HU, np.int16), (1.0, 1.0, 1.0), make_affine((1.0, 1.0, 1.0)))
    write_volume(tmp_path / "v.zarr", air)
    raw = (tmp_path / "v.zarr" / "0" / "c" / "0" / "0" / "0").read_bytes()
    index = np.frombuffer(raw[-(3 * 16 + 4) : -4], "<u8").reshape(3, 2)
    assert (index != 2**64 - 1).all()


def test_writing_again_replaces(tmp_path):
    write_volume(tmp_path / "v.zarr", make_volume(SHAPE, seed=1))
    second = make_volume((20, 30, 40), seed=2)
    write_volume(tmp_path / "v.zarr", second)
    voxels = VolumeReader(tmp_path / "v.zarr", "k", second.shape).read_box(0, whole_box(second.shape))
    np.testing.assert_array_equal(voxels, second.voxels)
    assert [path.name for path in tmp_path.iterdir()] == ["v.zarr"]


@pytest.mark.parametrize("fault", ["os.replace", "os.fsync"])
def test_a_killed_write_leaves_no_volume(tmp_path, monkeypatch, fault):
    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(fault, killed)
    with pytest.raises(KeyboardInterrupt):
        write_volume(tmp_path / "v.zarr", make_volume(SHAPE))
    assert not (tmp_path / "v.zarr").exists()


def test_what_cannot_be_stored_is_refused(tmp_path):
    good = make_volume((8, 9, 10))
    hole = good.voxels.copy()
    hole[1, 2, 3] = FORBIDDEN_HU
    cases = {
        "-32768": dataclasses.replace(good, voxels=hole),
        "3D int16": dataclasses.replace(good, voxels=good.voxels.astype(np.float32)),
        "3D int16 array with voxels": dataclasses.replace(good, voxels=good.voxels[:0]),
        "positive millimetres": dataclasses.replace(good, spacing_mm=(0.0, 1.0, 1.0)),
        "finite 4x4": dataclasses.replace(good, affine=np.full((4, 4), np.nan)),
        "affine steps by": dataclasses.replace(good, spacing_mm=(1.0, 1.0, 1.0)),
    }
    for message, volume in cases.items():
        with pytest.raises(StoreError, match=message):
            write_volume(tmp_path / "v.zarr", volume)
    assert list(tmp_path.iterdir()) == []


def test_content_hash_sees_every_part_and_no_layout():
    volume = make_volume((8, 9, 10))
    same = dataclasses.replace(volume, voxels=np.asfortranarray(volume.voxels), affine=volume.affine + 1e-9)
    assert content_hash(same) == content_hash(volume)
    assert volume_key(content_hash(volume)) == content_hash(volume)[:16]
    voxels = volume.voxels.copy()
    voxels[0, 0, 0] += 1
    others = [
        dataclasses.replace(volume, voxels=voxels),
        dataclasses.replace(volume, voxels=volume.voxels.reshape(9, 8, 10)),
        dataclasses.replace(volume, spacing_mm=(2.5, 0.8, 0.81)),
        dataclasses.replace(volume, affine=volume.affine + 0.1),
    ]
    assert len({content_hash(other) for other in [volume, *others]}) == 5


def test_content_hash_takes_a_known_voxel_hash():
    volume = make_volume((8, 9, 10))
    assert content_hash(volume, voxel_hash(volume)) == content_hash(volume)
    assert content_hash(volume, "00" * 32) != content_hash(volume)


def test_hu_histogram_counts_every_voxel_once():
    voxels = np.random.default_rng(0).integers(-32768, 32767, (5, 60, 70), dtype=np.int16)
    voxels[0, 0, :6] = [-32768, -1024, -961, -960, 3071, 32767]
    expected, _ = np.histogram(np.clip(voxels.astype(int), HU_EDGES[0], HU_EDGES[-1] - 1), HU_EDGES)
    assert hu_histogram(voxels, HU_EDGES) == tuple(expected)
