"""NIfTI, NRRD and MetaImage files byte by byte, so that every field can be made to lie."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from mim_scale.store.volume import Volume
from tests.pipeline.corpus.case import ORIGIN, SPACING

Edit = Callable[[Any], None]
_NRRD_TYPES = {"int16": "short", "uint16": "unsigned short", "int32": "int", "float32": "float", "uint8": "uchar"}
_MHA_TYPES = {"int16": "MET_SHORT", "uint16": "MET_USHORT", "int32": "MET_INT", "float32": "MET_FLOAT"}


def nifti(
    good: Volume,
    edit: Edit | None = None,
    voxels: NDArray[Any] | None = None,
    *,
    second: bool = False,
    order: str = "<",
    between: bytes = b"",
    affine: NDArray[np.float64] | None = None,
) -> bytes:
    """A single file: header, extensions or padding, voxels (z, y, x).

    edit: changes header fields last, so that they contradict what follows.
    """
    array = good.voxels if voxels is None else voxels
    header = (nib.Nifti2Header if second else nib.Nifti1Header)(endianness=order)
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape[::-1])
    grid = good.affine if affine is None else affine
    header.set_qform(grid, 1)
    header.set_sform(grid, 1)
    header.set_xyzt_units("mm")
    header["vox_offset"] = (544 if second else 352) + len(between)
    if edit is not None:
        edit(header)
    extension = bytes([1 if between else 0, 0, 0, 0])
    return bytes(header.binaryblock) + extension + between + array.astype(array.dtype.newbyteorder(order)).tobytes()


def fields(**values: Any) -> Edit:
    """Set header fields; `dim_4=2` sets element 4 of `dim`."""

    def edit(header: Any) -> None:
        for name, value in values.items():
            stem, _, index = name.rpartition("_")
            if index.isdigit():
                header[stem][int(index)] = value
            else:
                header[name] = value

    return edit


def nrrd(
    good: Volume,
    change: Mapping[str, str | None] | None = None,
    data: bytes | None = None,
    *,
    magic: str = "NRRD0005",
    extra: Sequence[str] = (),
    newline: str = "\n",
) -> bytes:
    """A NRRD header and data; change replaces, adds or (None) removes fields."""
    steps = [" ".join(f"{SPACING[i]:g}" if i == axis else "0" for i in range(3)) for axis in range(3)]
    values: dict[str, str | None] = {
        "type": _NRRD_TYPES[good.voxels.dtype.name],
        "dimension": "3",
        "space": "right-anterior-superior",
        "sizes": " ".join(str(size) for size in good.shape[::-1]),
        "space directions": " ".join(f"({step.replace(' ', ',')})" for step in steps),
        "kinds": "domain domain domain",
        "endian": "little",
        "encoding": "raw",
        "space origin": f"({','.join(f'{place:g}' for place in ORIGIN)})",
    }
    values.update(change or {})
    lines = [magic, *extra, *(f"{name}: {value}" for name, value in values.items() if value is not None), "", ""]
    return newline.join(lines).encode() + (good.voxels.tobytes() if data is None else data)


def mha(
    good: Volume,
    change: Mapping[str, str | None] | None = None,
    data: bytes | None = None,
    *,
    newline: str = "\n",
) -> bytes:
    """A MetaImage header and data; change replaces, adds or (None) removes fields, ElementDataFile stays last.

    Its world is LPS, so the two first axes run against those of the good volume.
    """
    origin = (-ORIGIN[0], -ORIGIN[1], ORIGIN[2])
    values: dict[str, str | None] = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "TransformMatrix": "-1 0 0 0 -1 0 0 0 1",
        "Offset": " ".join(f"{place:g}" for place in origin),
        "ElementSpacing": " ".join(f"{step:g}" for step in SPACING),
        "DimSize": " ".join(str(size) for size in good.shape[::-1]),
        "ElementType": _MHA_TYPES[good.voxels.dtype.name],
    }
    last = {"ElementDataFile": "LOCAL"}
    for name, value in (change or {}).items():
        (last if name in last else values)[name] = value  # type: ignore[assignment]
    lines = [f"{name} = {value}" for name, value in (values | last).items() if value is not None]
    return (newline.join(lines) + newline).encode() + (good.voxels.tobytes() if data is None else data)
