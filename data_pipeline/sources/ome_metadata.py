"""What an OME-Zarr folder says of itself, 0.4 and 0.5: one image or several, where level 0 lies, how large it is.

JSON only: Zarr itself is loaded where voxels are read.
"""

import json
import math
import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.reasons import Reason, Rejected, reading_failed
from data_pipeline.sources.source import LPS_TO_RAS

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
_DIRECTIONS = {
    "left-to-right": (0, 1.0),
    "right-to-left": (0, -1.0),
    "posterior-to-anterior": (1, 1.0),
    "anterior-to-posterior": (1, -1.0),
    "inferior-to-superior": (2, 1.0),
    "superior-to-inferior": (2, -1.0),
}
"""Axis of RAS, and whether along or against it."""
_ENDLESS_MM = 1e12
"""Beyond this nothing is measured; and squares of it still are numbers."""
_LAYOUT_OF_MANY = "bioformats2raw.layout"


@dataclass(frozen=True)
class Image:
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
    if attributes is not None and _ome(attributes).get("multiscales") is not None:
        return True
    if not folder.name.lower().endswith(".zarr"):
        return False
    is_folder_of_images = attributes is not None and _LAYOUT_OF_MANY in _ome(attributes)
    return not is_folder_of_images


def stored_files(folder: Path) -> list[str]:
    """The files that a volume is read from, relative to its folder, sorted: metadata, and all of level 0.

    Their names, sizes and times tell whether the volume has changed.
    """
    try:
        level = level_of(folder)
    except Rejected:
        return files_below(folder, folder)
    metadata = [name for name in ("zarr.json", ".zattrs", ".zgroup") if (folder / name).is_file()]
    return sorted({*metadata, *files_below(folder, folder / level)})


def level_of(folder: Path) -> str:
    """The path of level 0 below a folder, by the folder's own metadata.

    Raises:
        Rejected: unreadable, or not one image.
    """
    return _level(_parsed(folder))


def stamp(folder: Path) -> tuple[int, str]:
    """Bytes of the stored files, and a digest of their names, sizes and times that changes when the volume does."""
    found = [(name, os.stat(folder / name)) for name in stored_files(folder)]
    digest = sha256(repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]).encode())
    return sum(stat.st_size for _, stat in found), digest.hexdigest()


def header_size(folder: Path) -> tuple[int, float]:
    """Count of voxels, and mm3 of one, by the metadata alone.

    Raises:
        Rejected: unreadable.
    """
    image = read_metadata(folder)
    return math.prod(image.shape), abs(float(np.linalg.det(image.affine[:3, :3])))


def _attributes(folder: Path) -> dict[str, Any] | None:
    """The attributes of a Zarr group of either version; None where there are none."""
    for name, key in (("zarr.json", "attributes"), (".zattrs", "")):
        if not (folder / name).is_file():
            # Nothing, or a pipe, which would keep its reader waiting for ever.
            continue
        try:
            values = json.loads((folder / name).read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        found = values.get(key) if key and isinstance(values, dict) else values
        if isinstance(found, dict):
            return found
    return None


def _ome(attributes: dict[str, Any]) -> dict[str, Any]:
    """Where 0.5 keeps its metadata, or 0.4."""
    ome = attributes.get("ome")
    return ome if isinstance(ome, dict) else attributes


def _parsed(folder: Path) -> dict[str, Any]:
    """The first multiscale image of a folder."""
    attributes = _attributes(folder)
    if attributes is None:
        raise Rejected(Reason.UNREADABLE, "the folder has no readable Zarr metadata")
    multiscales = _ome(attributes).get("multiscales")
    if multiscales is None and _LAYOUT_OF_MANY in _ome(attributes):
        raise Rejected(Reason.NOT_3D, "a Zarr folder of several images: name each of them in a list of files")
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


def read_metadata(folder: Path) -> Image:
    """The image of a folder.

    Raises:
        Rejected: unreadable, or not one 3D volume with a place.
    """
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
    if not ((steps > 0) & (steps < _ENDLESS_MM)).all() or not (np.abs(origin) < _ENDLESS_MM).all():
        raise Rejected(Reason.NO_GEOMETRY, "the scale of level 0 is not positive and finite")
    if set(units) != {1.0}:
        repairs.add("unit_converted")
    attributes = _attributes(folder) or {}
    affine = _own_affine(attributes["mim_scale"], steps) if "mim_scale" in attributes else None
    if affine is None:
        affine, oriented = _affine([axes[axis] for axis in spatial], steps, origin)
        repairs |= set() if oriented else {"orientation_assumed"}
    else:
        repairs.discard("orientation_assumed")
    return Image(level, array, tuple(shape), spatial, affine, tuple(sorted(repairs)))


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
    if (
        affine.shape != (4, 4)
        or not (np.abs(affine) < _ENDLESS_MM).all()
        or not np.array_equal(affine[3], [0, 0, 0, 1])
    ):
        raise Rejected(Reason.NO_GEOMETRY, "the store's own affine is missing or malformed")
    if not np.allclose(np.linalg.norm(affine[:3, :3], axis=0), steps, rtol=1e-3):
        raise Rejected(Reason.NO_GEOMETRY, "the store's own affine contradicts the scale of level 0")
    return affine


def _array_metadata(level: Path) -> dict[str, Any]:
    for name in ("zarr.json", ".zarray"):
        if (level / name).exists() and not (level / name).is_file():
            raise Rejected(Reason.UNREADABLE, "the metadata of level 0 are no regular file")
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


def files_below(folder: Path, below: Path) -> list[str]:
    """Paths relative to `folder` of everything below a folder that is no folder, hidden ones too."""
    found = []
    for root, _, names in os.walk(below):
        relative = os.path.relpath(root, folder).replace(os.sep, "/")
        found += [name if relative == "." else f"{relative}/{name}" for name in names]
    return sorted(found)
