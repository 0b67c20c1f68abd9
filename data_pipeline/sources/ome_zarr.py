"""OME-Zarr 0.4 and 0.5, our own volumes among them: level 0, every chunk of it present, in millimetres.

A chunk that is not there would read as the fill value: it is damage here, never air. Zarr itself is loaded only where
voxels are read.
"""

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.reasons import Reason, Rejected, reading_failed
from data_pipeline.sources.source import LPS_TO_RAS, Scan

_MM_PER_UNIT = {
    "angstrom": 1e-7,
    "nanometer": 1e-6,
    "micrometer": 1e-3,
    "millimeter": 1.0,
    "centimeter": 10.0,
    "decimeter": 100.0,
    "meter": 1000.0,
    "inch": 25.4,
    "foot": 304.8,
}
_LARGEST_RATIO = 1100
"""Bytes promised to bytes on disk: no CT shrinks like that, only metadata that lie."""
_SMALL = 1 << 26
"""Bytes that may be asked for whatever the files hold: a chunk of nothing but air is tiny."""
_PLAIN_CODECS = frozenset(
    {"blosc", "zstd", "zlib", "gzip", "bz2", "lz4", "lzma", "shuffle", "delta", "fixedscaleoffset"}
)
_CODECS_3 = frozenset({"bytes", "transpose", "blosc", "gzip", "zstd", "crc32c", "sharding_indexed"}) | {
    f"numcodecs.{name}" for name in _PLAIN_CODECS
}
"""Others are unknown here, and some of them (pickle) would run what the file says."""
_DIRECTIONS = {
    "left-to-right": (0, 1.0),
    "right-to-left": (0, -1.0),
    "posterior-to-anterior": (1, 1.0),
    "anterior-to-posterior": (1, -1.0),
    "inferior-to-superior": (2, 1.0),
    "superior-to-inferior": (2, -1.0),
}
"""Axis of RAS, and whether along or against it."""
_LAYOUT_OF_MANY = "bioformats2raw.layout"


@dataclass(frozen=True)
class _Image:
    """What the metadata say: level 0, its array, and where it lies."""

    level: Path
    array: dict[str, Any]
    shape: tuple[int, ...]
    spatial: tuple[int, int, int]
    """Which axes of the array are x, y, z."""
    affine: NDArray[np.float64]
    repairs: tuple[str, ...]


def is_ome_zarr(folder: Path) -> bool:
    """Whether a folder is one OME-Zarr image, or pretends to be by its name; folders of several images are not."""
    attributes = _attributes(folder)
    if attributes is not None and _multiscales(attributes) is not None:
        return True
    if not folder.name.lower().endswith(".zarr"):
        return False
    is_folder_of_images = attributes is not None and _LAYOUT_OF_MANY in (attributes.get("ome") or attributes)
    return not is_folder_of_images


def stored_files(folder: Path) -> list[str]:
    """The files that a volume is read from, relative to its folder, sorted: metadata, and all of level 0.

    Their names, sizes and times tell whether the volume has changed.
    """
    try:
        level = _level(_parsed(folder))
    except Rejected:
        return _files(folder, folder)
    metadata = [name for name in ("zarr.json", ".zattrs", ".zgroup") if (folder / name).is_file()]
    return sorted({*metadata, *_files(folder, folder / level)})


def header_size(folder: Path) -> tuple[int, float]:
    """Count of voxels, and mm3 of one, by the metadata alone.

    Raises:
        Rejected: unreadable.
    """
    image = _image(folder)
    return math.prod(image.shape), abs(float(np.linalg.det(image.affine[:3, :3])))


def read_ome_zarr(folder: Path) -> Scan:
    """Read level 0; axes of length 1 that are not spatial are dropped.

    Without an orientation the axes are taken as most writers of CT have them: x to the patient's left, y to posterior,
    z to superior; `orientation_assumed` says so.

    Raises:
        Rejected: unreadable, a chunk missing, or not one 3D volume of plain numbers.
    """
    image = _image(folder)
    dtype = _dtype(image.array)
    _check_size(folder, image, dtype)
    voxels = _voxels(image, dtype)
    others = tuple(axis for axis in range(voxels.ndim) if axis not in image.spatial)
    return Scan(voxels.transpose(*image.spatial, *others).reshape(_of(image)), image.affine, image.repairs)


def _of(image: _Image) -> tuple[int, ...]:
    return tuple(image.shape[axis] for axis in image.spatial)


def _attributes(folder: Path) -> dict[str, Any] | None:
    """The attributes of a Zarr group of either version; None where there are none."""
    for name, key in (("zarr.json", "attributes"), (".zattrs", "")):
        try:
            values = json.loads((folder / name).read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        found = values.get(key) if key and isinstance(values, dict) else values
        if isinstance(found, dict):
            return found
    return None


def _multiscales(attributes: dict[str, Any]) -> Any:
    ome = attributes.get("ome")
    return (ome if isinstance(ome, dict) else attributes).get("multiscales")


def _parsed(folder: Path) -> dict[str, Any]:
    """The first multiscale image of a folder."""
    attributes = _attributes(folder)
    if attributes is None:
        raise Rejected(Reason.UNREADABLE, "the folder has no readable Zarr metadata")
    multiscales = _multiscales(attributes)
    if multiscales is None:
        raise Rejected(Reason.NO_GEOMETRY, "a Zarr folder without OME-Zarr's multiscales: nothing says where it lies")
    if not isinstance(multiscales, list) or not multiscales or not isinstance(multiscales[0], dict):
        raise Rejected(Reason.UNREADABLE, "multiscales is no list of images")
    if len(multiscales) > 1:
        raise Rejected(Reason.NOT_3D, f"{len(multiscales)} images in one folder, expected one")
    return multiscales[0]


def _level(image: dict[str, Any]) -> str:
    datasets = image.get("datasets")
    first = datasets[0] if isinstance(datasets, list) and datasets else None
    path = first.get("path") if isinstance(first, dict) else None
    if not isinstance(path, str) or not path or path.startswith("/") or {"..", ""} & set(path.split("/")):
        raise Rejected(Reason.UNREADABLE, "the metadata name no level 0 below the folder")
    return path


def _image(folder: Path) -> _Image:
    parsed = _parsed(folder)
    level = folder / _level(parsed)
    array = _array_metadata(level)
    shape = array.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        raise Rejected(Reason.UNREADABLE, "the metadata of level 0 give no shape")
    try:
        spatial, axes, assumed = _axes(parsed, shape)
        scale, translation = _placed(parsed, len(shape))
        units = [_MM_PER_UNIT[axes[axis].get("unit") or "millimeter"] for axis in spatial]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise Rejected(Reason.NO_GEOMETRY, "axes or scale of level 0 are missing, unknown or malformed") from None
    repairs = {"orientation_assumed"} if assumed else set()
    steps = np.array([scale[axis] * unit for axis, unit in zip(spatial, units, strict=True)])
    origin = np.array([translation[axis] * unit for axis, unit in zip(spatial, units, strict=True)])
    if set(units) != {1.0}:
        repairs.add("unit_converted")
    attributes = _attributes(folder) or {}
    affine = _own_affine(attributes["mim_scale"], steps) if "mim_scale" in attributes else None
    if affine is None:
        affine, oriented = _affine([axes[axis] for axis in spatial], steps, origin)
        repairs |= set() if oriented else {"orientation_assumed"}
    else:
        repairs.discard("orientation_assumed")
    if not np.isfinite(affine).all() or (steps <= 0).any():
        raise Rejected(Reason.NO_GEOMETRY, "the scale of level 0 is not positive and finite")
    return _Image(level, array, tuple(shape), spatial, affine, tuple(sorted(repairs)))


def _axes(parsed: dict[str, Any], shape: list[int]) -> tuple[tuple[int, int, int], list[dict[str, Any]], bool]:
    """Which axes are x, y and z; all axes; and whether their names left that open."""
    axes = [axis if isinstance(axis, dict) else {"name": axis} for axis in parsed["axes"]]
    if len(axes) != len(shape):
        raise Rejected(Reason.NOT_3D, f"{len(axes)} axes are named, the array has {len(shape)}")
    names = [str(axis["name"]).lower() for axis in axes]
    found = [
        index
        for index, axis in enumerate(axes)
        if axis.get("type") == "space" or ("type" not in axis and names[index] in {"x", "y", "z"})
    ]
    extra = [size for index, size in enumerate(shape) if index not in found and size != 1]
    if len(found) != 3 or extra:
        raise Rejected(Reason.NOT_3D, f"{len(found)} spatial axes in an array of sizes {shape}, expected 3 alone")
    is_named = sorted(names[index] for index in found) == ["x", "y", "z"]
    z, y, x = found if not is_named else (names.index(name) for name in ("z", "y", "x"))
    return (x, y, z), axes, not is_named


def _placed(parsed: dict[str, Any], num_axes: int) -> tuple[list[float], list[float]]:
    """Scale and translation of level 0: those of the level, then those of all levels."""
    scale, translation = [1.0] * num_axes, [0.0] * num_axes
    has_scale = False
    steps = [*parsed["datasets"][0]["coordinateTransformations"], *(parsed.get("coordinateTransformations") or [])]
    for step in steps:
        kind = step["type"]
        if kind not in {"identity", "scale", "translation"}:
            raise ValueError(kind)
        if kind == "identity":
            continue
        numbers = [float(number) for number in step[kind]]
        if len(numbers) != num_axes:
            raise ValueError(kind)
        if kind == "scale":
            has_scale = True
            scale = [a * b for a, b in zip(scale, numbers, strict=True)]
            translation = [a * b for a, b in zip(translation, numbers, strict=True)]
        else:
            translation = [a + b for a, b in zip(translation, numbers, strict=True)]
    if not has_scale:
        raise ValueError("no scale")
    return scale, translation


def _affine(
    axes: list[dict[str, Any]], steps: NDArray[np.float64], origin: NDArray[np.float64]
) -> tuple[NDArray[np.float64], bool]:
    """From x, y, z to RAS; and whether the axes' orientations say how."""
    values = [(axis.get("orientation") or {}) for axis in axes]
    named = [_DIRECTIONS.get(str(value.get("value"))) if isinstance(value, dict) else None for value in values]
    known = [direction for direction in named if direction is not None]
    if sorted(axis for axis, _ in known) != [0, 1, 2]:
        affine = np.diag([*steps, 1.0])
        affine[:3, 3] = origin
        return LPS_TO_RAS @ affine, False
    affine = np.eye(4) * [0, 0, 0, 1]
    for column, (axis, sign) in enumerate(known):
        affine[axis, column] = sign * steps[column]
        affine[axis, 3] = sign * origin[column]
    return affine, True


def _own_affine(own: Any, steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """The affine of a store's volume, which OME-Zarr has no place for."""
    try:
        affine = np.array(own["affine"], dtype=np.float64)
    except (KeyError, TypeError, ValueError):
        affine = np.zeros(0)
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or not np.array_equal(affine[3], [0, 0, 0, 1]):
        raise Rejected(Reason.NO_GEOMETRY, "the store's own affine is missing or malformed")
    if not np.allclose(np.linalg.norm(affine[:3, :3], axis=0), steps, rtol=1e-3):
        raise Rejected(Reason.NO_GEOMETRY, "the store's own affine contradicts the scale of level 0")
    return affine


def _array_metadata(level: Path) -> dict[str, Any]:
    for name in ("zarr.json", ".zarray"):
        try:
            values = json.loads((level / name).read_bytes())
        except FileNotFoundError:
            continue
        except NotADirectoryError:
            break
        except OSError as error:
            raise reading_failed(error, "the metadata of level 0 cannot be read") from None
        except (ValueError, RecursionError):
            raise Rejected(Reason.UNREADABLE, "the metadata of level 0 are damaged") from None
        version = values.get("zarr_format") if isinstance(values, dict) else None
        if version != (3 if name == "zarr.json" else 2) or values.get("node_type", "array") != "array":
            raise Rejected(Reason.UNREADABLE, "level 0 is no Zarr array of version 2 or 3")
        return dict(values)
    raise Rejected(Reason.UNREADABLE, "the metadata of level 0 are missing")


def _dtype(array: dict[str, Any]) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = np.dtype(array["dtype"] if array["zarr_format"] == 2 else array["data_type"])
    except (KeyError, TypeError, ValueError):
        raise Rejected(Reason.UNREADABLE, "the metadata of level 0 give no known type of number") from None
    if dtype.kind not in "iuf" or dtype.itemsize > 8 or dtype.subdtype is not None:
        raise Rejected(Reason.NOT_3D, f"voxels of type {dtype.name}, expected one real number in each")
    _check_codecs(array)
    return dtype


def _check_codecs(array: dict[str, Any]) -> None:
    if array["zarr_format"] == 2:
        chain = [array.get("compressor"), *(array.get("filters") or [])]
        names = [codec.get("id") if isinstance(codec, dict) else codec for codec in chain if codec is not None]
        known = _PLAIN_CODECS
    else:
        names, known = _names_3(array.get("codecs")), _CODECS_3
    # What an extension does to the bytes is not known either.
    if array.get("storage_transformers") or not all(isinstance(name, str) and name in known for name in names):
        raise Rejected(Reason.UNREADABLE, "level 0 is compressed in a way that is not known here")


def _names_3(codecs: Any) -> list[Any]:
    """Names of a chain of codecs, those within shards too."""
    if not isinstance(codecs, list):
        return [None]
    names = []
    for codec in codecs:
        names.append(codec.get("name") if isinstance(codec, dict) else codec)
        inner = codec.get("configuration") if isinstance(codec, dict) else None
        if isinstance(inner, dict):
            names += [name for key in ("codecs", "index_codecs") if key in inner for name in _names_3(inner[key])]
    return names


def _check_size(folder: Path, image: _Image, dtype: np.dtype[Any]) -> None:
    """Refuse what promises more than its files can hold, before memory is asked for it."""
    try:
        stored = 0
        for name in _files(folder, image.level):
            found = os.stat(folder / name)
            if not stat.S_ISREG(found.st_mode):
                raise Rejected(Reason.UNREADABLE, "a chunk is a pipe, a socket or a device, no file")
            stored += found.st_size
        largest = max(math.prod(chunk) for chunk in [image.shape, *_chunk_shapes(image.array)])
    except OSError as error:
        raise reading_failed(error, "level 0 cannot be read") from None
    except (KeyError, TypeError, ValueError):
        raise Rejected(Reason.UNREADABLE, "the metadata of level 0 give no chunks") from None
    if largest * dtype.itemsize > max(_SMALL, stored * _LARGEST_RATIO):
        raise Rejected(Reason.UNREADABLE, "the metadata promise more voxels than the files can hold")


def _chunk_shapes(array: dict[str, Any]) -> list[list[int]]:
    if array["zarr_format"] == 2:
        shapes = [array["chunks"]]
    else:
        shapes = [array["chunk_grid"]["configuration"]["chunk_shape"]]
        shapes += [codec["configuration"]["chunk_shape"] for codec in array["codecs"] if _is_sharding(codec)]
    for shape in shapes:
        if len(shape) != len(array["shape"]) or not all(type(size) is int and size > 0 for size in shape):
            raise ValueError("chunks")
    return shapes


def _is_sharding(codec: Any) -> bool:
    return isinstance(codec, dict) and codec.get("name") == "sharding_indexed"


def _files(folder: Path, below: Path) -> list[str]:
    """Paths relative to `folder` of everything below a folder that is no folder, hidden ones too."""
    found = []
    for root, _, names in os.walk(below):
        relative = os.path.relpath(root, folder).replace(os.sep, "/")
        found += [name if relative == "." else f"{relative}/{name}" for name in names]
    return sorted(found)


def _voxels(image: _Image, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Read with a fill value of ours: where it shows, a second one tells a voxel of that value from a missing chunk."""
    low, high = (np.iinfo(dtype).min, np.iinfo(dtype).max) if dtype.kind in "iu" else (-1.5, -2.5)
    voxels = _filled(image, low)
    suspects = voxels == low
    if suspects.any():
        missing = int((suspects & (_filled(image, high) == high)).sum())
        if missing:
            detail = f"chunks of level 0 are missing: {missing} of {voxels.size} voxels are not there"
            raise Rejected(Reason.UNREADABLE, detail)
    return voxels


def _filled(image: _Image, fill: float) -> NDArray[Any]:
    from zarr import Array
    from zarr.storage import LocalStore, StorePath

    try:
        array = Array.from_dict(StorePath(LocalStore(image.level, read_only=True)), image.array | {"fill_value": fill})
        return np.asarray(array[...])
    except Exception as error:
        raise reading_failed(error, "the voxels of level 0 cannot be decoded") from None
