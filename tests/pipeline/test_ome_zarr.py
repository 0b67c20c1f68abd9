"""OME-Zarr of both versions is read as it was written; what is missing, damaged or no CT volume is one rejection."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.canonical import canonical
from data_pipeline.reasons import Reason, Rejected
from data_pipeline.sources.ome_metadata import header_size, is_ome_zarr, stamp, stored_files
from data_pipeline.sources.ome_zarr import read_ome_zarr
from mim_scale.store.array_store import write_volume
from tests.pipeline.sources import phantom
from tests.synthetic import make_volume

ZYX = tuple({"name": name, "type": "space", "unit": "millimeter"} for name in "zyx")
CHUNK = 8
"""Edge of a chunk: the phantom has several along each axis."""


def multiscale(axes: Any = ZYX, scale: Any = (2.5, 0.9, 0.8), **more: Any) -> dict[str, Any]:
    steps = [{"type": "scale", "scale": list(scale)}]
    return {
        "version": "0.4",
        "axes": list(axes),
        "datasets": [{"path": "0", "coordinateTransformations": steps}],
        **more,
    }


def write_ome(
    folder: Path,
    voxels: NDArray[Any],
    image: dict[str, Any] | None = None,
    zarr_format: int = 3,
    **array: Any,
) -> Path:
    """An image of one level, every chunk written."""
    group = zarr.open_group(folder, mode="w", zarr_format=zarr_format)  # type: ignore[arg-type]
    values = {"fill_value": 0, "config": {"write_empty_chunks": True}, "chunks": (CHUNK,) * voxels.ndim} | array
    level = group.create_array("0", shape=voxels.shape, dtype=voxels.dtype, **values)
    level[...] = voxels
    images = [image or multiscale()]
    group.attrs.update(
        {"multiscales": images} if zarr_format == 2 else {"ome": {"version": "0.5", "multiscales": images}}
    )
    return folder


def rejected(folder: Path) -> Rejected:
    with pytest.raises(Rejected) as caught:
        read_ome_zarr(folder)
    assert "\n" not in caught.value.detail
    assert folder.name not in caught.value.detail
    return caught.value


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


COMPRESSIONS: list[tuple[int, dict[str, Any]]] = [
    (2, {"compressors": None}),
    (2, {"compressors": numcodecs.Zlib(level=1)}),
    (2, {"compressors": numcodecs.Blosc(cname="zstd"), "filters": [numcodecs.Delta(dtype="<i2")]}),
    (3, {"compressors": None}),
    (3, {"compressors": [zarr.codecs.GzipCodec()]}),
    (3, {"compressors": [zarr.codecs.BloscCodec(cname="lz4")]}),
    (3, {"compressors": [zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec()]}),
    (3, {"shards": (16, 16, 16)}),
    (2, {"chunk_key_encoding": {"name": "v2", "separator": "."}}),
    (2, {"chunk_key_encoding": {"name": "v2", "separator": "/"}}),
]


@pytest.mark.parametrize(("zarr_format", "array"), COMPRESSIONS)
def test_voxels_and_geometry(tmp_path: Path, zarr_format: int, array: dict[str, Any]) -> None:
    folder = write_ome(tmp_path / "scan", phantom(), zarr_format=zarr_format, **array)
    scan = read_ome_zarr(folder)
    np.testing.assert_array_equal(scan.voxels.transpose(2, 1, 0), phantom())
    # x to the left, y to posterior: against R and A.
    np.testing.assert_allclose(scan.affine, np.diag([-0.8, -0.9, 2.5, 1]))
    assert scan.repairs == ("orientation_assumed",)
    assert is_ome_zarr(folder)
    assert header_size(folder) == (phantom().size, pytest.approx(2.5 * 0.9 * 0.8))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint16", "int32", ">i2", "float32", "float64"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_number_types(tmp_path: Path, zarr_format: int, dtype: str) -> None:
    voxels = np.abs(phantom() // 16).clip(0, 120).astype(dtype)
    # The values that stand for missing chunks while reading may occur all the same.
    low, high = (np.iinfo(dtype).min, np.iinfo(dtype).max) if voxels.dtype.kind in "iu" else (-1.5, -2.5)
    voxels[0, 0, :2] = low, high
    scan = read_ome_zarr(write_ome(tmp_path / "scan.zarr", voxels, zarr_format=zarr_format))
    np.testing.assert_array_equal(scan.voxels.transpose(2, 1, 0), voxels)


def test_our_own_volume_keeps_its_affine(tmp_path: Path) -> None:
    volume = make_volume((70, 66, 64))
    turned = np.array(volume.affine)
    cos, sin = np.cos(0.2), np.sin(0.2)
    turned[:3, :3] = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ volume.affine[:3, :3]
    volume = type(volume)(volume.voxels, volume.spacing_mm, turned)
    write_volume(tmp_path / "abc.zarr", volume)
    scan = read_ome_zarr(tmp_path / "abc.zarr")
    assert scan.repairs == ()
    again, repairs = canonical(scan)
    assert repairs == ()
    np.testing.assert_array_equal(again.voxels, volume.voxels)
    np.testing.assert_array_equal(again.affine, turned)


def test_units_translation_and_axes_of_one(tmp_path: Path) -> None:
    axes = [{"name": "t", "type": "time"}, {"name": "c", "type": "channel"}]
    axes += [{"name": name, "type": "space", "unit": "micrometer"} for name in "xyz"]
    image = multiscale(axes, (1, 1, 800, 900, 2500))
    image["datasets"][0]["coordinateTransformations"].append(
        {"type": "translation", "translation": [0, 0, 10000, 0, -5000]}
    )
    image["coordinateTransformations"] = [{"type": "scale", "scale": [1, 1, 2, 1, 1]}]
    voxels = phantom().transpose(2, 1, 0)[None, None]
    scan = read_ome_zarr(write_ome(tmp_path / "scan.zarr", voxels, image))
    np.testing.assert_array_equal(scan.voxels, voxels[0, 0])
    np.testing.assert_allclose(scan.affine[:3, 3], [-20, 0, -5])
    np.testing.assert_allclose(np.diag(scan.affine), [-1.6, -0.9, 2.5, 1])
    assert scan.repairs == ("orientation_assumed", "unit_converted")


def test_orientations_of_axes_are_read(tmp_path: Path) -> None:
    words = {"z": "superior-to-inferior", "y": "anterior-to-posterior", "x": "left-to-right"}
    axes = [axis | {"orientation": {"type": "anatomical", "value": words[axis["name"]]}} for axis in ZYX]
    scan = read_ome_zarr(write_ome(tmp_path / "scan.zarr", phantom(), multiscale(axes)))
    np.testing.assert_allclose(scan.affine, np.diag([0.8, -0.9, -2.5, 1]))
    assert scan.repairs == ()


@pytest.mark.parametrize(("zarr_format", "array"), [(2, {}), (3, {}), (3, {"shards": (16, 16, 16)})])
def test_a_missing_chunk_is_damage_never_the_fill_value(
    tmp_path: Path, zarr_format: int, array: dict[str, Any]
) -> None:
    folder = write_ome(tmp_path / "scan.zarr", phantom(), zarr_format=zarr_format, **array)
    chunks = [name for name in stored_files(folder) if "json" not in name and "/." not in name and name[0] != "."]
    assert len(chunks) == (8 if array else 27)
    (folder / chunks[5]).unlink()
    found = rejected(folder)
    assert found.reason is Reason.UNREADABLE
    assert "chunks of level 0 are missing" in found.detail


def test_a_chunk_missing_within_a_shard_is_damage(tmp_path: Path) -> None:
    voxels = phantom()
    voxels[:CHUNK, :CHUNK, :CHUNK] = 0
    # Chunks that hold nothing but the fill value are left out by this writer: nothing tells them from lost ones.
    array = {"shards": (16, 16, 16), "config": {"write_empty_chunks": False}}
    found = rejected(write_ome(tmp_path / "scan.zarr", voxels, **array))
    assert found.detail == f"chunks of level 0 are missing: {CHUNK**3} of {voxels.size} voxels are not there"


def _cut(folder: Path) -> None:
    chunk = folder / "0/c/0/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-7])


def _flip(folder: Path) -> None:
    chunk = folder / "0/c/1/1/1"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 4
    chunk.write_bytes(data)


def _array(**changed: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "0/zarr.json", lambda values: values.update(changed))


def _image(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit(
        folder / "zarr.json", lambda values: change(values["attributes"]["ome"]["multiscales"][0])
    )


def _group(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "zarr.json", lambda values: change(values["attributes"]))


def _step(step: dict[str, Any]) -> Callable[[Path], None]:
    return _image(lambda image: image["datasets"][0].update({"coordinateTransformations": [step]}))


def _pipe(folder: Path) -> None:
    (folder / "0/c/0/0/0").unlink()
    os.mkfifo(folder / "0/c/0/0/0")


def _folder_for_a_chunk(folder: Path) -> None:
    (folder / "0/c/0/0/0").unlink()
    (folder / "0/c/0/0/0").mkdir()


_CHUNKS = {"name": "regular", "configuration": {"chunk_shape": [1 << 20] * 3}}
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
BAD: list[tuple[str, Callable[[Path], None], Reason, str]] = [
    ("a truncated chunk", _cut, Reason.UNREADABLE, "cannot be decoded"),
    ("a flipped bit under a checksum", _flip, Reason.UNREADABLE, "cannot be decoded"),
    ("an empty chunk", lambda f: (f / "0/c/0/0/0").write_bytes(b""), Reason.UNREADABLE, "decoded"),
    ("a pipe for a chunk", _pipe, Reason.UNREADABLE, "is a pipe"),
    ("a folder for a chunk", _folder_for_a_chunk, Reason.UNREADABLE, ""),
    ("no array metadata", lambda f: (f / "0/zarr.json").unlink(), Reason.UNREADABLE, "level 0 are missing"),
    ("no level", lambda f: shutil.rmtree(f / "0"), Reason.UNREADABLE, "level 0 are missing"),
    ("array metadata are no JSON", lambda f: (f / "0/zarr.json").write_text("{"), Reason.UNREADABLE, "are damaged"),
    ("array metadata are a list", lambda f: (f / "0/zarr.json").write_text("[]"), Reason.UNREADABLE, "no Zarr array"),
    ("another version", _array(zarr_format=4), Reason.UNREADABLE, "no Zarr array of version"),
    ("a group for an array", _array(node_type="group"), Reason.UNREADABLE, "no Zarr array"),
    ("an absurd shape", _array(shape=[10**9] * 3), Reason.UNREADABLE, "promise more voxels"),
    ("a larger shape", _array(shape=[90, 20, 22]), Reason.UNREADABLE, "chunks of level 0 are missing"),
    ("a negative shape", _array(shape=[-1, 20, 22]), Reason.UNREADABLE, "give no shape"),
    ("a shape of text", _array(shape="big"), Reason.UNREADABLE, "give no shape"),
    ("absurd chunks", _array(chunk_grid=_CHUNKS), Reason.UNREADABLE, "promise more voxels"),
    ("no chunks", _array(chunk_grid={}), Reason.UNREADABLE, "give no chunks"),
    ("a wrong dtype", _array(data_type="float64"), Reason.UNREADABLE, "cannot be decoded"),
    ("an unknown dtype", _array(data_type="int17"), Reason.UNREADABLE, "no known type"),
    ("complex numbers", _array(data_type="complex64"), Reason.NOT_3D, "one real number"),
    ("booleans", _array(data_type="bool"), Reason.NOT_3D, "one real number"),
    ("an unknown compressor", _array(codecs=[_BYTES, {"name": "zpaq"}]), Reason.UNREADABLE, "not known here"),
    ("pickles", _array(codecs=[{"name": "numcodecs.pickle"}]), Reason.UNREADABLE, "not known here"),
    ("codecs of text", _array(codecs="blosc"), Reason.UNREADABLE, "not known here"),
    ("a storage transformer", _array(storage_transformers=[{"name": "x"}]), Reason.UNREADABLE, "not known here"),
    ("no group metadata", lambda f: (f / "zarr.json").unlink(), Reason.UNREADABLE, "no readable Zarr metadata"),
    ("no multiscales", _group(lambda a: a.clear()), Reason.NO_GEOMETRY, "without OME-Zarr's multiscales"),
    ("multiscales of text", _group(lambda a: a["ome"].update(multiscales="x")), Reason.UNREADABLE, "no list"),
    ("ome is no table", _group(lambda a: a.update(ome=True)), Reason.NO_GEOMETRY, "without OME-Zarr's multiscales"),
    ("two images", _group(lambda a: a["ome"]["multiscales"].append({})), Reason.NOT_3D, "2 images"),
    ("a level elsewhere", _image(lambda i: i["datasets"][0].update(path="../../x")), Reason.UNREADABLE, "no level 0"),
    ("an absolute level", _image(lambda i: i["datasets"][0].update(path="/etc")), Reason.UNREADABLE, "no level 0"),
    ("no datasets", _image(lambda i: i.update(datasets=[])), Reason.UNREADABLE, "no level 0"),
    ("no axes", _image(lambda i: i.pop("axes")), Reason.NO_GEOMETRY, "axes or scale"),
    ("two axes", _image(lambda i: i["axes"].pop()), Reason.NOT_3D, "2 axes are named"),
    ("a channel of many", _image(lambda i: i["axes"][0].update(type="channel")), Reason.NOT_3D, "2 spatial axes"),
    ("an unknown unit", _image(lambda i: i["axes"][0].update(unit="cubit")), Reason.NO_GEOMETRY, "axes or scale"),
    ("no scale", _step({"type": "translation", "translation": [0, 0, 0]}), Reason.NO_GEOMETRY, "axes or scale"),
    ("a scale in a file", _step({"type": "scale", "path": "s"}), Reason.NO_GEOMETRY, "axes or scale"),
    ("a scale of two", _step({"type": "scale", "scale": [1, 1]}), Reason.NO_GEOMETRY, "axes or scale"),
    ("a scale of zero", _step({"type": "scale", "scale": [1, 0, 1]}), Reason.NO_GEOMETRY, "not positive"),
    ("a scale of NaN", _step({"type": "scale", "scale": [1, float("nan"), 1]}), Reason.NO_GEOMETRY, "not positive"),
    ("a rotation", _step({"type": "rotation", "rotation": [1]}), Reason.NO_GEOMETRY, "axes or scale"),
    (
        "an affine that lies",
        _group(lambda a: a.update(mim_scale={"affine": np.eye(4).tolist()})),
        Reason.NO_GEOMETRY,
        "contradicts",
    ),
    ("an affine of text", _group(lambda a: a.update(mim_scale={"affine": "x"})), Reason.NO_GEOMETRY, "malformed"),
]


@pytest.mark.parametrize(("spoil", "reason", "words"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input_is_one_rejection(tmp_path: Path, spoil: Callable[[Path], None], reason: Reason, words: str) -> None:
    checked = [zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec()]
    folder = write_ome(tmp_path / "scan.zarr", phantom(), compressors=checked)
    read_ome_zarr(folder)
    spoil(folder)
    found = rejected(folder)
    assert found.reason is reason
    assert words in found.detail
    assert is_ome_zarr(folder)
    stored_files(folder)
    try:
        header_size(folder)
    except Rejected as error:
        assert error.reason in {Reason.UNREADABLE, Reason.NO_GEOMETRY, Reason.NOT_3D}  # noqa: PT017


def test_bad_zarr_2(tmp_path: Path) -> None:
    folder = write_ome(tmp_path / "scan.zarr", phantom(), zarr_format=2)
    for changed, words in (
        ({"compressor": {"id": "pickle"}}, "not known here"),
        ({"filters": [{"id": "msgpack2"}]}, "not known here"),
        ({"filters": 5}, "not known here"),
        ({"dtype": "|O"}, "one real number"),
        ({"dtype": [["a", "<i2"]]}, "no known type"),
        ({"chunks": [0, 8, 8]}, "give no chunks"),
        ({"chunks": None}, "give no chunks"),
    ):
        copy = tmp_path / "copy.zarr"
        shutil.copytree(folder, copy)
        edit(copy / "0/.zarray", lambda values, changed=changed: values.update(changed))
        assert words in rejected(copy).detail, changed
        shutil.rmtree(copy)
    (folder / "0/.zarray").unlink()
    assert "level 0 are missing" in rejected(folder).detail


def test_what_is_one_image_and_what_is_not(tmp_path: Path) -> None:
    inner = write_ome(tmp_path / "many.zarr" / "0", phantom(), zarr_format=2)
    (tmp_path / "many.zarr" / ".zgroup").write_text('{"zarr_format": 2}')
    (tmp_path / "many.zarr" / ".zattrs").write_text('{"bioformats2raw.layout": 3}')
    assert not is_ome_zarr(tmp_path / "many.zarr")
    assert is_ome_zarr(inner)
    (tmp_path / "empty.zarr").mkdir()
    assert is_ome_zarr(tmp_path / "empty.zarr")
    assert rejected(tmp_path / "empty.zarr").reason is Reason.UNREADABLE
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "zarr.json").write_text("[1]")
    assert not is_ome_zarr(tmp_path / "plain")


def test_stored_files_tell_of_level_0_and_metadata_alone(tmp_path: Path) -> None:
    volume = make_volume((70, 66, 64))
    write_volume(tmp_path / "abc.zarr", volume)
    assert stored_files(tmp_path / "abc.zarr") == ["0/c/0/0/0", "0/zarr.json", "zarr.json"]
    before = stamp(tmp_path / "abc.zarr")
    assert before[0] == sum(
        (tmp_path / "abc.zarr" / name).stat().st_size for name in stored_files(tmp_path / "abc.zarr")
    )
    (tmp_path / "abc.zarr" / "1" / "zarr.json").write_text("another level")
    assert stamp(tmp_path / "abc.zarr") == before
    os.utime(tmp_path / "abc.zarr" / "0/c/0/0/0", (0, 0))
    assert stamp(tmp_path / "abc.zarr") != before


def _places(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in JSON values."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [path] * bool(path) + [place for key, value in inner for place in _places(value, (*path, key))]


_ANYTHING = st.sampled_from(
    [None, True, 0, -1, 3, 1e308, 10**30, "", "0", "zstd", [], {}, [[]], [None], {"id": 1}, [1, 2, 3]]
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from([(2, ".zattrs"), (2, "0/.zarray"), (3, "zarr.json"), (3, "0/zarr.json")]))
def test_any_metadata_are_read_or_rejected(tmp_path: Path, data: st.DataObject, where: tuple[int, str]) -> None:
    folder = tmp_path / f"{where[0]}.zarr"
    if not folder.exists():
        write_ome(folder, phantom(), zarr_format=where[0])
    whole = (folder / where[1]).read_text()
    values = json.loads(whole)
    *parents, last = data.draw(st.sampled_from(_places(values)))
    spot = values
    for key in parents:
        spot = spot[key]
    spot[last] = data.draw(_ANYTHING)
    (folder / where[1]).write_text(json.dumps(values))
    try:
        for call in (is_ome_zarr, stored_files, stamp):
            call(folder)
        for read in (header_size, read_ome_zarr):
            with contextlib.suppress(Rejected):
                read(folder)
    finally:
        (folder / where[1]).write_text(whole)
