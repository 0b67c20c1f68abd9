"""NIfTI headers that lie, contradict themselves, or use what few files use."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from mim_scale.store.volume import Volume
from tests.pipeline.corpus.case import SPACING, Case, accepted, refused, with_affine, with_voxels
from tests.pipeline.corpus.files import Edit, fields, nifti

FAMILY = "NIfTI"


def _file(make: Callable[[Volume], bytes], name: str = "scan.nii") -> Callable[[Path, Volume], None]:
    def write(root: Path, good: Volume) -> None:
        (root / name).write_bytes(make(good))

    return write


def _edited(edit: Edit, **settings: Any) -> Callable[[Path, Volume], None]:
    return _file(lambda good: nifti(good, edit, **settings))


def _stored(dtype: str, change: Callable[[Any], Any], edit: Edit | None = None) -> Callable[[Path, Volume], Volume]:
    """The file holds changed voxels; a reader must find the good ones as far as the type keeps them."""

    def write(root: Path, good: Volume) -> Volume:
        (root / "scan.nii").write_bytes(nifti(good, edit, change(good.voxels).astype(dtype)))
        return good

    return write


def _fractions(root: Path, good: Volume) -> Volume:
    values = good.voxels.astype(np.float32) + np.float32(0.25)
    (root / "scan.nii").write_bytes(nifti(good, voxels=values))
    return with_voxels(good, values)


def _some(value: float) -> Callable[[Any], Any]:
    def change(voxels: Any) -> Any:
        changed = voxels.astype(np.float32)
        changed[3, 3, 3:6] = value
        return changed

    return change


def _no_forms(root: Path, good: Volume) -> Volume:
    (root / "scan.nii").write_bytes(nifti(good, fields(sform_code=0, qform_code=0)))
    # By convention x then runs to the left, and the middle of the grid lies at 0.
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = [-(size - 1) / 2 * step for size, step in zip(good.shape[::-1], SPACING, strict=True)]
    return with_affine(Volume(good.voxels[:, :, ::-1], good.spacing_mm, good.affine), affine)


def _flipped_qform(header: Any) -> None:
    header.set_qform(np.diag([-1.0, 1.0, 1.0, 1.0]) @ header.get_sform(), 1)


def _unit(name: str, factor: float) -> Callable[[Path, Volume], None]:
    def write(root: Path, good: Volume) -> None:
        affine = good.affine.copy()
        affine[:3] *= factor
        (root / "scan.nii").write_bytes(nifti(good, lambda header: header.set_xyzt_units(name), affine=affine))

    return write


def _pair(root: Path, good: Volume) -> None:
    image = nib.Nifti1Pair(good.voxels.transpose(2, 1, 0), good.affine)
    nib.save(image, root / "scan.hdr")


def _mgh(root: Path, good: Volume) -> None:
    nib.save(nib.MGHImage(good.voxels.transpose(2, 1, 0).astype(np.float32), good.affine), root / "scan.mgh")
    (root / "scan.mgh").rename(root / "scan.nii")


def _sform(matrix: Any) -> Edit:
    def edit(header: Any) -> None:
        for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
            header[name][:3] = matrix[row]

    return edit


def _shape(*shape: int) -> Callable[[Any], Any]:
    """Values from all over the good volume, in another shape."""
    return lambda voxels: voxels.ravel()[np.linspace(0, voxels.size - 1, int(np.prod(shape))).astype(int)].reshape(
        shape
    )


def _good_files() -> list[Case]:
    spread = {"dim_0": 7, "dim_4": 1, "dim_5": 1, "dim_6": 1, "dim_7": 1}
    good: list[tuple[str, Callable[[Path, Volume], Any], str]] = [
        ("plain", _edited(fields()), accepted()),
        ("NIfTI-2", _edited(fields(), second=True), accepted()),
        ("byte-swapped", _edited(fields(), order=">"), accepted()),
        ("NIfTI-2, byte-swapped", _edited(fields(), order=">", second=True), accepted()),
        ("suffix in capitals", _file(nifti, "SCAN.NII"), accepted()),
        ("unpacked data named .nii.gz", _file(nifti, "scan.nii.gz"), accepted()),
        ("seven axes, the last four of length 1", _edited(fields(**spread)), accepted()),
        ("bitpix lies", _edited(fields(bitpix=64)), accepted()),
        (
            "an extension",
            _edited(fields(), between=(32).to_bytes(4, "little") + b"\6\0\0\0" + b"words" * 4 + b"    "),
            accepted(),
        ),
        ("an extension that claims 2 GB", _edited(fields(), between=b"\xf0\xff\xff\x7f" + b"\6\0\0\0" * 7), accepted()),
        ("an extension of negative length", _edited(fields(), between=b"\xf0\xff\xff\xff" * 8), accepted()),
        ("description is no text", _edited(fields(descrip=b"\xff\xfe\x80" * 20)), accepted()),
        ("sform only", _edited(fields(qform_code=0)), accepted()),
        ("qform only", _edited(fields(sform_code=0)), accepted()),
        ("qfac 0 stands for 1", _edited(fields(sform_code=0, pixdim_0=0)), accepted()),
        ("no sform and no qform", _no_forms, accepted("orientation_assumed", "reoriented")),
        ("qform mirrors what sform says", _edited(_flipped_qform), accepted("sform_preferred")),
        (
            "pixdim says other sizes than sform",
            _edited(fields(qform_code=0, pixdim_3=5.0)),
            accepted("sform_preferred"),
        ),
        (
            "qform is no rotation, sform is good",
            _edited(fields(quatern_b=0.9, quatern_c=0.9)),
            accepted("sform_preferred"),
        ),
        ("pixdim negative beside a good sform", _edited(fields(qform_code=0, pixdim_1=-SPACING[0])), accepted()),
        ("unknown form codes beside a good sform", _edited(fields(qform_code=77)), accepted()),
        ("lengths in metres", _unit("meter", 1e-3), accepted("unit_converted")),
        ("lengths in micrometres", _unit("micron", 1e3), accepted("unit_converted")),
        ("unit of length not told", _edited(fields(xyzt_units=0)), accepted()),
    ]
    return [Case(FAMILY, name, write, (outcome,)) for name, write, outcome in good]


def _values() -> list[Case]:
    def scaled(dtype: str, slope: float, intercept: float) -> Callable[[Path, Volume], Volume]:
        edit = fields(scl_slope=slope, scl_inter=intercept)
        return _stored(dtype, lambda hu: (hu.astype(np.float64) - intercept) / slope, edit)

    def unscaled(slope: float, intercept: float) -> Callable[[Path, Volume], None]:
        return _edited(fields(scl_slope=slope, scl_inter=intercept))

    cases: list[tuple[str, Callable[[Path, Volume], Any], str]] = [
        ("stored from 0, intercept -1024", scaled("uint16", 1, -1024), accepted("rescaled")),
        ("slope 0.5", scaled("int16", 0.5, 0), accepted("rescaled")),
        ("slope -1", scaled("int16", -1, 0), accepted("rescaled")),
        ("32 bit, slope 0.25 and intercept -1000.5", scaled("int32", 0.25, -1000.5), accepted("rescaled")),
        ("float, slope 0.125", scaled("float32", 0.125, 0), accepted("rescaled")),
        ("slope 0 means none", unscaled(0, 0), accepted()),
        ("slope 0 turns the intercept off too", unscaled(0, -1024), accepted()),
        ("slope NaN means none", unscaled(np.nan, 0), accepted()),
        ("slope infinite", unscaled(np.inf, 0), refused("unreadable")),
        ("intercept NaN", unscaled(1, np.nan), refused("unreadable")),
        ("HU already, and an intercept of -1024", unscaled(1, -1024), refused("hu_implausible")),
        ("slope 1e30", unscaled(1e30, 0), refused("hu_implausible")),
        ("32 bit", _stored("int32", lambda hu: hu), accepted()),
        ("64 bit", _stored("int64", lambda hu: hu), accepted()),
        ("float", _stored("float32", lambda hu: hu), accepted()),
        ("double", _stored("float64", lambda hu: hu), accepted()),
        ("float with fractions", _fractions, accepted("rounded")),
        ("some NaN", _stored("float32", _some(np.nan)), refused("non_finite")),
        ("some infinite", _stored("float32", _some(-np.inf)), refused("non_finite")),
        ("all NaN", _stored("float32", lambda hu: hu * np.nan), refused("non_finite")),
        ("doubles of 1e300", _stored("float64", lambda hu: hu * 1e300), refused("hu_implausible")),
        ("signed data called unsigned", _edited(fields(datatype=512)), refused("hu_implausible")),
        ("32 bit integers called float", _stored("int32", lambda hu: hu, fields(datatype=16)), refused("non_finite")),
        (
            "big-endian data behind a little-endian header",
            _file(lambda good: nifti(good, voxels=good.voxels.byteswap())),
            refused("hu_implausible"),
        ),
        ("complex numbers", _stored("complex64", lambda hu: hu), refused("not_3d")),
        ("colour", _edited(fields(datatype=128, bitpix=32)), refused("not_3d")),
        ("colour with alpha", _edited(fields(datatype=2304, bitpix=32)), refused("not_3d")),
        ("datatype 0", _edited(fields(datatype=0)), refused("unreadable")),
        ("datatype of single bits", _edited(fields(datatype=1, bitpix=1)), refused("unreadable")),
        ("datatype unknown", _edited(fields(datatype=12345)), refused("unreadable")),
    ]
    return [Case(FAMILY, name, write, (outcome,)) for name, write, outcome in cases]


def _geometry() -> list[Case]:
    shear = np.diag(SPACING)
    shear[0, 2] = 0.5
    flat = np.array([[0.8, 0.8, 0], [0, 0, 0], [0, 0, 2.5]])
    cases = [
        ("sform of zeros", _sform(np.zeros((3, 3))), "spacing_implausible"),
        ("sform singular", _sform(flat), "sheared_affine"),
        ("sform sheared", _sform(shear), "sheared_affine"),
        ("sform NaN", fields(srow_x=np.nan), "no_geometry"),
        ("sform infinite", fields(srow_y=np.inf), "no_geometry"),
        ("origin NaN", fields(srow_z_3=np.nan), "no_geometry"),
        ("qform is no rotation, no sform", fields(sform_code=0, quatern_b=0.9, quatern_c=0.9), "no_geometry"),
        ("quaternion NaN, no sform", fields(sform_code=0, quatern_b=np.nan), "no_geometry"),
        ("pixdim 0, no sform", fields(sform_code=0, pixdim_2=0), "spacing_implausible"),
        ("pixdim negative, no sform", fields(sform_code=0, pixdim_2=-0.9), "spacing_implausible"),
        ("pixdim NaN, no sform", fields(sform_code=0, pixdim_2=np.nan), "no_geometry"),
        ("pixdim 1000, no sform", fields(sform_code=0, pixdim_2=1000), "spacing_implausible"),
        ("millimetres called metres", lambda header: header.set_xyzt_units("meter"), "spacing_implausible"),
        ("millimetres called micrometres", lambda header: header.set_xyzt_units("micron"), "spacing_implausible"),
        ("unit of length unknown to NIfTI", fields(xyzt_units=7), "no_geometry"),
    ]
    return [Case(FAMILY, name, _edited(edit), (refused(reason),)) for name, edit, reason in cases]


def _sizes() -> list[Case]:
    edited = [
        ("dim[0] is 0", fields(dim_0=0), "unreadable"),
        ("dim[0] is 2", fields(dim_0=2), "not_3d"),
        ("dim[0] is 4, two volumes", fields(dim_0=4, dim_4=2), "not_3d"),
        ("a size is negative", fields(dim_1=-36), "unreadable"),
        ("a size is 0", fields(dim_3=0), "unreadable"),
        ("sizes of 32767", fields(dim_1=32767, dim_2=32767, dim_3=32767), "unreadable"),
        ("a size one too large", fields(dim_1=37), "unreadable"),
        ("a size one too small", fields(dim_1=35), "unreadable"),
        ("a slice too few in the header", fields(dim_3=17), "unreadable"),
        ("datatype twice as wide as the data", fields(datatype=8, bitpix=32), "unreadable"),
        ("voxels begin within the header", fields(vox_offset=100), "unreadable"),
        ("voxels begin before the file", fields(vox_offset=-16), "unreadable"),
        ("voxels begin behind the file", fields(vox_offset=100_000), "unreadable"),
        ("voxels begin at 1e30", fields(vox_offset=1e30), "unreadable"),
        ("voxels begin at NaN", fields(vox_offset=np.nan), "unreadable"),
        ("voxels begin one byte late", fields(vox_offset=353), "unreadable"),
        ("magic unknown", fields(magic=b"n+9"), "unreadable"),
        ("magic of a pair", fields(magic=b"ni1"), "unreadable"),
        ("no magic, as Analyze", fields(magic=b""), "unreadable"),
        ("sizeof_hdr is 0", fields(sizeof_hdr=0), "unreadable"),
    ]
    shapes = {
        "one slice": ((1, 32, 36), "too_few_slices"),
        "one column of voxels": ((200, 1, 1), "too_few_slices"),
        "one voxel": ((1, 1, 1), "constant"),
        "two axes": ((32, 36), "not_3d"),
        "five axes": ((2, 2, 18, 32, 36), "not_3d"),
    }
    whole = [
        ("cut within the header", lambda good: nifti(good)[:100], "unreadable"),
        ("a header and nothing else", lambda good: nifti(good)[:352], "unreadable"),
        ("cut within the voxels", lambda good: nifti(good)[:-5000], "unreadable"),
        ("the last byte is missing", lambda good: nifti(good)[:-1], "unreadable"),
        ("a second volume behind the first", lambda good: nifti(good) + good.voxels.tobytes(), "unreadable"),
        ("text", lambda good: b"<html>404 not found</html>\n" * 50, "unreadable"),
        ("random bytes", lambda good: np.random.default_rng(1).bytes(5000), "unreadable"),
        ("zeros", lambda good: bytes(5000), "unreadable"),
        ("NIfTI-2 header cut", lambda good: nifti(good, second=True)[:400], "unreadable"),
    ]
    return [
        *(Case(FAMILY, name, _edited(edit), (refused(reason),)) for name, edit, reason in edited),
        *(
            Case(FAMILY, name, _stored("int16", _shape(*shape)), (refused(reason),))
            for name, (shape, reason) in shapes.items()
        ),
        *(Case(FAMILY, name, _file(make), (refused(reason),)) for name, make, reason in whole),
        Case(
            FAMILY,
            "512 bytes of padding behind the voxels",
            _file(lambda good: nifti(good) + bytes(512)),
            (accepted(),),
        ),
        Case(FAMILY, "a .hdr and .img pair", _pair, (refused("unreadable"), refused("unreadable"))),
        Case(FAMILY, "an MGH file named .nii", _mgh, (refused("unreadable"),)),
    ]


CASES = [*_good_files(), *_values(), *_geometry(), *_sizes()]
