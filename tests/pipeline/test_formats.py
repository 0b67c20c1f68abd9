"""Every accepted format, lying in every way, is stored as SimpleITK reads it, voxel for voxel."""

import gzip
import io
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.canonical import canonical
from data_pipeline.reasons import Reason, Rejected
from data_pipeline.sources.inventory import find_sources
from data_pipeline.sources.nifti import _scaled, header_size
from data_pipeline.sources.read import read_source
from tests.pipeline.sources import (
    Series,
    only_source,
    oracle,
    phantom,
    slice_position,
    write_image,
    write_series,
)

SUFFIXES = ("nii", "nii.gz", "nrrd", "nhdr", "mha", "mhd")
ORIENTATIONS = {
    "axial": (1, 0, 0, 0, 1, 0),
    "axial, feet first": (-1, 0, 0, 0, 1, 0),
    "coronal": (1, 0, 0, 0, 0, -1),
    "sagittal": (0, 1, 0, 0, 0, -1),
    "oblique": (0.8, 0.6, 0, -0.36, 0.48, 0.8),
}


def _assert_as_oracle(root: Path, paths: list[Path]) -> tuple[str, ...]:
    volume, repairs = canonical(read_source(root, only_source(root)))
    voxels, affine = oracle(paths)
    np.testing.assert_array_equal(volume.voxels, voxels)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-3)
    np.testing.assert_allclose(volume.spacing_mm, np.linalg.norm(affine[:3, :3], axis=0)[::-1], rtol=1e-5)
    return repairs


@pytest.mark.parametrize("axes", ["LPS", "RAS", "LAS", "PIR", "SAL"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_in_every_orientation(tmp_path: Path, suffix: str, axes: str) -> None:
    path = write_image(tmp_path / f"scan.{suffix}", phantom(), axes)
    repairs = _assert_as_oracle(tmp_path, [path])
    assert ("reoriented" in repairs) == (axes != "RAS")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_oblique_files_keep_their_tilt(tmp_path: Path, suffix: str) -> None:
    path = write_image(tmp_path / f"scan.{suffix}", phantom(), degrees=(12, -7, 20))
    _assert_as_oracle(tmp_path, [path])


@pytest.mark.parametrize("suffix", ["nii.gz", "nrrd", "mha"])
@pytest.mark.parametrize("dtype", ["int16", "int32", "float32", "float64"])
def test_number_types(tmp_path: Path, suffix: str, dtype: str) -> None:
    voxels = phantom().astype(dtype)
    voxels[1, 1, 1] = -3024
    if voxels.dtype.kind == "f":
        voxels[2, 2, 2] = 100.4
    path = write_image(tmp_path / f"scan.{suffix}", voxels)
    repairs = _assert_as_oracle(tmp_path, [path])
    assert "padding_mapped" in repairs
    assert ("rounded" in repairs) == (voxels.dtype.kind == "f")


def test_nifti_slope_and_intercept_are_applied(tmp_path: Path) -> None:
    stored = (phantom().transpose(2, 1, 0) + 1024).astype(np.uint16)
    image = nib.Nifti1Image(stored, np.diag([-0.8, -0.9, 2.5, 1.0]))
    image.header.set_slope_inter(1.0, -1024.0)
    nib.save(image, tmp_path / "scan.nii")
    assert nib.load(tmp_path / "scan.nii").dataobj.inter == -1024
    _assert_as_oracle(tmp_path, [tmp_path / "scan.nii"])
    np.testing.assert_array_equal(oracle([tmp_path / "scan.nii"])[0], phantom()[:, ::-1, ::-1])


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["u1", "i1", "<i2", ">i2", "<u2", ">u2"]),
    st.integers(0, 2**32),
    st.one_of(st.sampled_from([1.0, -1.0, 2.0, 0.5, 3000.0]), st.floats(-40, 40)),
    st.one_of(st.sampled_from([0.0, -1024.0, 32768.0, 0.25]), st.integers(-70000, 70000).map(float)),
)
def test_nifti_values_are_scaled_as_arithmetic_says(kind: str, seed: int, slope: float, intercept: float) -> None:
    stored = np.frombuffer(np.random.default_rng(seed).bytes(4 * 5 * 6 * np.dtype(kind).itemsize), kind)
    stored = stored.reshape((4, 5, 6), order="F")
    header = nib.Nifti1Header()
    header["scl_slope"], header["scl_inter"] = slope, intercept
    given_slope, given_intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if given_slope == 0:
        given_slope, given_intercept = 1.0, 0.0
    expected = stored.astype(np.float64) * given_slope + given_intercept
    np.testing.assert_array_equal(_scaled(stored.copy(order="F"), header, set()), expected)


@pytest.mark.parametrize("orientation", ORIENTATIONS.values(), ids=ORIENTATIONS)
def test_dicom_in_every_orientation(tmp_path: Path, orientation: tuple[float, ...]) -> None:
    paths = write_series(tmp_path, Series(phantom(), orientation))
    _assert_as_oracle(tmp_path, paths)


def test_dicom_slices_are_ordered_by_position_not_by_name_or_number(tmp_path: Path) -> None:
    voxels = phantom()
    paths = write_series(tmp_path, Series(voxels))
    assert sorted(paths) != paths
    scan = read_source(tmp_path, only_source(tmp_path))
    np.testing.assert_array_equal(scan.voxels.transpose(2, 1, 0), voxels)
    np.testing.assert_allclose(
        (LPS := np.diag([-1, -1, 1, 1])) @ scan.affine[:, 3], [*slice_position(Series(voxels), 0), 1]
    )
    assert LPS.shape == (4, 4)


def test_dicom_rescale_and_padding(tmp_path: Path) -> None:
    voxels = phantom()
    voxels[:, :2] = -2000
    series = Series(voxels, intercept=0, tags={"PixelPaddingValue": -2000})
    paths = write_series(tmp_path, series)
    assert "padding_mapped" in _assert_as_oracle(tmp_path, paths)


def test_dicom_slope_other_than_one(tmp_path: Path) -> None:
    paths = write_series(tmp_path, Series(phantom(), slope=0.5))
    assert "rescaled" in _assert_as_oracle(tmp_path, paths)


def test_padding_value_that_also_is_tissue_is_left_alone(tmp_path: Path) -> None:
    """Padding 40 HU would punch holes into every muscle."""
    voxels = phantom()
    voxels[5, 5, 5] = 40
    write_series(tmp_path, Series(voxels, intercept=0, tags={"PixelPaddingValue": 40}))
    scan = read_source(tmp_path, only_source(tmp_path))
    np.testing.assert_array_equal(scan.voxels.transpose(2, 1, 0), voxels)
    assert "padding_ambiguous" in scan.repairs


@pytest.mark.parametrize("syntax", ["JPEG2000Lossless", "RLELossless", "JPEGLSLossless"])
def test_compressed_dicom(tmp_path: Path, syntax: str) -> None:
    paths = write_series(tmp_path, Series(phantom(shape=(4, 64, 64))))
    for path in paths:
        file = pydicom.dcmread(path)
        file.compress(getattr(pydicom.uid, syntax))
        file.save_as(path, enforce_file_format=True)
    _assert_as_oracle(tmp_path, paths)


def test_dicom_without_preamble_and_without_identity(tmp_path: Path) -> None:
    """Two badly anonymised series in two folders stay two."""
    for seed, name in enumerate(("a", "b")):
        series = Series(phantom(seed), tags={"SeriesInstanceUID": "", "StudyInstanceUID": "", "PatientID": ""})
        for path in write_series(tmp_path / name, series):
            file = pydicom.dcmread(path)
            del file.file_meta
            file.preamble = None
            file.save_as(path, implicit_vr=True, little_endian=True)
    sources = find_sources(tmp_path).sources
    assert [len(source.files) for source in sources] == [len(phantom())] * 2
    for seed, source in enumerate(sources):
        np.testing.assert_array_equal(read_source(tmp_path, source).voxels.transpose(2, 1, 0), phantom(seed))


def test_compressed_nrrd_with_skips_and_two_streams(tmp_path: Path) -> None:
    write_image(tmp_path / "scan.nrrd", phantom())
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "scan.nrrd")), str(tmp_path / "scan.nrrd"), useCompression=True)
    header, _, data = (tmp_path / "scan.nrrd").read_bytes().partition(b"\n\n")
    voxels = b"skip" + gzip.decompress(data)
    data = b"two\nlines\n" + gzip.compress(voxels[:5000]) + gzip.compress(voxels[5000:])
    (tmp_path / "scan.nrrd").write_bytes(header + b"\nline skip: 2\nbyte skip: 4\n\n" + data)
    _assert_as_oracle(tmp_path, [tmp_path / "scan.nrrd"])


@pytest.mark.parametrize("suffix", ["mha", "mhd", "nrrd", "nhdr"])
def test_compressed_itk_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"scan.{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(phantom()), str(path), useCompression=True)
    _assert_as_oracle(tmp_path, [path])


def test_detached_data_belongs_to_its_header(tmp_path: Path) -> None:
    write_image(tmp_path / "scan.mhd", phantom())
    assert len(only_source(tmp_path).files) == 2
    assert sitk.ReadImage(str(tmp_path / "scan.mhd")).GetSize()[::-1] == phantom().shape


@pytest.mark.parametrize("packed", [False, True])
def test_a_header_is_read_without_the_voxels(tmp_path: Path, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan of an archive reads every header: it may not cost the archive's bytes."""
    voxels = np.random.default_rng(0).integers(-1000, 1000, (40, 100, 100), dtype=np.int16)
    path = write_image(tmp_path / f"scan.nii{'.gz' if packed else ''}", voxels)
    count = 0

    class Counting(io.FileIO):
        def readinto(self, target: memoryview) -> int | None:  # type: ignore[override]
            nonlocal count
            read = super().readinto(target)
            count += read or 0
            return read

    monkeypatch.setattr("builtins.open", lambda name, mode: io.BufferedReader(Counting(name), 4096))
    assert header_size(path)[0] == voxels.size
    monkeypatch.undo()
    assert 0 < count <= 8192 < path.stat().st_size


@pytest.mark.parametrize("slope", [0, -1])
def test_a_slice_whose_rescale_makes_no_hu_is_refused(tmp_path: Path, slope: float) -> None:
    paths = write_series(tmp_path, Series(phantom()))
    file = pydicom.dcmread(paths[3])
    file.RescaleSlope = slope
    file.save_as(paths[3])
    with pytest.raises(Rejected) as caught:
        read_source(tmp_path, only_source(tmp_path))
    assert caught.value.reason == Reason.HU_IMPLAUSIBLE
