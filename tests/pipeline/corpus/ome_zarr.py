"""OME-Zarr images whose metadata or chunks are damaged, missing or lie; written by hand, one chunk a slab of slices."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mim_scale.store.volume import Volume
from tests.pipeline.corpus.case import ORIGIN, SPACING, Case, accepted, refused

FAMILY = "OME-Zarr"
_SLAB = 6
_DIRECTIONS = {"z": "inferior-to-superior", "y": "posterior-to-anterior", "x": "left-to-right"}


def _written(
    change: Callable[[dict[str, Any], dict[str, Any]], None] | None = None, after: Callable[[Path], None] | None = None
) -> Callable[[Path, Volume], None]:
    """An image; change gets the multiscale and the array's metadata, after the finished folder."""

    def write(root: Path, good: Volume) -> None:
        image, array = _image(), _array(good)
        if change is not None:
            change(image, array)
        level = root / "scan.zarr" / "0"
        for index in range(len(good.voxels) // _SLAB):
            chunk = level / "c" / str(index) / "0" / "0"
            chunk.parent.mkdir(parents=True)
            chunk.write_bytes(good.voxels[index * _SLAB : (index + 1) * _SLAB].tobytes())
        group = {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": {"ome": {"version": "0.5", "multiscales": [image]}},
        }
        (root / "scan.zarr" / "zarr.json").write_text(json.dumps(group))
        (level / "zarr.json").write_text(json.dumps(array))
        if after is not None:
            after(root / "scan.zarr")

    return write


def _image() -> dict[str, Any]:
    axes = [
        {"name": name, "type": "space", "unit": "millimeter", "orientation": {"type": "anatomical", "value": value}}
        for name, value in _DIRECTIONS.items()
    ]
    steps = [{"type": "scale", "scale": SPACING[::-1]}, {"type": "translation", "translation": ORIGIN[::-1]}]
    return {"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": steps}]}


def _array(good: Volume) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(good.shape),
        "data_type": "int16",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [_SLAB, *good.shape[1:]]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "attributes": {},
    }


def _units(image: dict[str, Any], array: dict[str, Any]) -> None:
    for axis in image["axes"]:
        axis["unit"] = "centimeter"
    for step in image["datasets"][0]["coordinateTransformations"]:
        step[step["type"]] = [number / 10 for number in step[step["type"]]]


def _scale(*numbers: float) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(image: dict[str, Any], array: dict[str, Any]) -> None:
        image["datasets"][0]["coordinateTransformations"][0]["scale"] = list(numbers)

    return change


def _metadata() -> list[Case]:
    bad, lost = refused("unreadable"), refused("no_geometry")
    cases: list[tuple[str, Callable[[dict[str, Any], dict[str, Any]], Any], str]] = [
        ("plain", lambda image, array: None, accepted()),
        ("centimetres", _units, accepted("unit_converted")),
        ("a unit that is none", lambda image, array: image["axes"][0].update(unit="furlong"), lost),
        ("no scale", lambda image, array: image["datasets"][0].update(coordinateTransformations=[]), lost),
        ("scale of 0", _scale(0, 0.9, 0.8), lost),
        ("scale negative", _scale(2.5, -0.9, 0.8), lost),
        ("scale NaN", _scale(float("nan"), 0.9, 0.8), lost),
        ("scale of two numbers", _scale(0.9, 0.8), lost),
        ("scale of 1000", _scale(1000, 1000, 1000), refused("spacing_implausible")),
        ("no axes", lambda image, array: image.pop("axes"), lost),
        ("two axes for three", lambda image, array: image["axes"].pop(), refused("not_3d")),
        ("an axis of time", lambda image, array: image["axes"][0].update(type="time"), refused("not_3d")),
        ("no datasets", lambda image, array: image.update(datasets=[]), bad),
        ("level 0 outside the folder", lambda image, array: image["datasets"][0].update(path="../other"), bad),
        ("a size larger than the chunks", lambda image, array: array.update(shape=[24, 32, 36]), bad),
        ("a size of 0", lambda image, array: array.update(shape=[0, 32, 36]), bad),
        ("a size negative", lambda image, array: array.update(shape=[-18, 32, 36]), bad),
        ("sizes of 30000", lambda image, array: array.update(shape=[30000, 30000, 30000]), bad),
        ("numbers of 32 bits said, of 16 written", lambda image, array: array.update(data_type="int32"), bad),
        (
            "unsigned said, signed written",
            lambda image, array: array.update(data_type="uint16"),
            refused("hu_implausible"),
        ),
        (
            "big-endian said",
            lambda image, array: array["codecs"][0]["configuration"].update(endian="big"),
            refused("hu_implausible"),
        ),
        ("complex numbers", lambda image, array: array.update(data_type="complex64"), refused("not_3d")),
        (
            "compression said, none there",
            lambda image, array: array["codecs"].append({"name": "gzip", "configuration": {"level": 1}}),
            bad,
        ),
        ("a codec that runs code", lambda image, array: array.update(codecs=[{"name": "numcodecs.pickle"}]), bad),
    ]
    return [Case(FAMILY, name, _written(change), (outcome,)) for name, change, outcome in cases]


def _files() -> list[Case]:
    bad = (refused("unreadable"),)
    chunk = Path("0", "c", "1", "0", "0")
    cases: list[tuple[str, Callable[[Path], Any]]] = [
        ("a chunk missing", lambda folder: (folder / chunk).unlink()),
        ("a chunk cut", lambda folder: (folder / chunk).write_bytes((folder / chunk).read_bytes()[:-100])),
        ("a chunk empty", lambda folder: (folder / chunk).write_bytes(b"")),
        ("a chunk too long", lambda folder: (folder / chunk).write_bytes((folder / chunk).read_bytes() * 2)),
        ("all chunks missing", lambda folder: shutil.rmtree(folder / "0" / "c")),
        ("metadata of level 0 missing", lambda folder: (folder / "0" / "zarr.json").unlink()),
        ("metadata of level 0 cut", lambda folder: (folder / "0" / "zarr.json").write_text('{"zarr_format": 3, "sh')),
        ("metadata of the image no JSON", lambda folder: (folder / "zarr.json").write_text("words")),
        ("metadata nested 100,000 deep", lambda folder: (folder / "zarr.json").write_text("[" * 100_000)),
        (
            "nothing but a folder",
            lambda folder: [shutil.rmtree(folder), folder.mkdir(), (folder / "a").write_bytes(b"")],
        ),
    ]
    return [Case(FAMILY, name, _written(after=after), bad) for name, after in cases]


CASES = [*_metadata(), *_files()]
