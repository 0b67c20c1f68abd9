"""What must not get into a store is refused with the code that says why, and nothing is lost on the way."""

import os
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from data_pipeline.canonical import canonical
from data_pipeline.reasons import Reason, Rejected
from data_pipeline.screen import screen
from data_pipeline.sources.inventory import find_sources
from data_pipeline.sources.read import read_source
from mim_scale.errors import SourceError
from tests.pipeline.sources import Series, only_source, phantom, slice_position, with_tags, write_image, write_series

SERIES = Series(phantom())


def _reason(root: Path, min_slices: int = 4) -> tuple[str, str]:
    """Why the only input below a folder is refused."""
    with pytest.raises(Rejected) as caught:
        screen(canonical(read_source(root, only_source(root)))[0].voxels, min_slices)
    assert "\n" not in caught.value.detail
    assert str(root) not in caught.value.detail
    return caught.value.reason, caught.value.detail


def _moved(indices: dict[int, tuple[float, float, float]]) -> Series:
    """SERIES with some slices moved by millimetres."""
    tags = {
        index: {"ImagePositionPatient": [float(n) for n in slice_position(SERIES, index) + np.array(offset)]}
        for index, offset in indices.items()
    }
    return replace(SERIES, slice_tags=tags)


@pytest.mark.parametrize(
    ("series", "reason"),
    [
        (with_tags(SERIES, Modality="MR"), "not_ct"),
        (with_tags(SERIES, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "localizer"),
        (with_tags(SERIES, ImageType=["DERIVED", "PRIMARY", "PERFUSION", "RCBF"]), "derived_map"),
        (with_tags(SERIES, RescaleType="OD"), "derived_map"),
        (with_tags(SERIES, SOPClassUID="1.2.840.10008.5.1.4.1.1.7"), "secondary_capture"),
        (with_tags(SERIES, NumberOfFrames=2), "multi_frame"),
        (with_tags(SERIES, ImagePositionPatient=None), "no_geometry"),
        (with_tags(SERIES, PixelSpacing=[0, 0]), "no_geometry"),
        (replace(SERIES, slice_tags={3: {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}}), "mixed_orientation"),
        (replace(SERIES, slice_tags={3: {"PixelSpacing": [1.0, 1.0]}}), "mixed_sizes"),
        (_moved({4: (0, 0, 2.5)}), "repeated_positions"),
        (_moved({4: (0, 0, 1.0)}), "uneven_spacing"),
        (_moved({index: (0, index * 0.5, 0) for index in range(18)}), "gantry_tilt"),
        (replace(SERIES, voxels=SERIES.voxels[:1]), "too_few_slices"),
        (replace(SERIES, voxels=SERIES.voxels[:3]), "too_few_slices"),
        (replace(SERIES, voxels=np.full_like(SERIES.voxels, -1000)), "constant"),
        (replace(SERIES, voxels=SERIES.voxels + 1024, intercept=0), "hu_implausible"),
        (replace(SERIES, spacing_mm=(40, 0.9, 0.8)), "spacing_implausible"),
        (with_tags(SERIES, PixelData=b"\0" * 100), "unreadable"),
        (with_tags(SERIES, RescaleSlope=1e300), "non_finite"),
    ],
)
def test_dicom_series_that_are_no_volume(tmp_path: Path, series: Series, reason: str) -> None:
    write_series(tmp_path, series)
    assert _reason(tmp_path)[0] == reason


def test_missing_slices_are_found_by_position_and_counted(tmp_path: Path) -> None:
    write_series(tmp_path, SERIES, skip=(5, 6, 11))
    assert _reason(tmp_path) == ("missing_slices", "3 of 18 slices missing by their positions")


@pytest.mark.parametrize("step", [0.06, 0.1, 0.2, 0.3, 0.34, 0.4])
def test_a_missing_slice_is_found_in_a_fine_stack(tmp_path: Path, step: float) -> None:
    write_series(tmp_path, replace(SERIES, spacing_mm=(step, 0.9, 0.8)), skip=(8,))
    assert _reason(tmp_path) == ("missing_slices", "1 of 18 slices missing by their positions")


def test_positions_written_with_one_decimal_are_no_uneven_spacing(tmp_path: Path) -> None:
    series = replace(SERIES, spacing_mm=(0.625, 0.9, 0.8))
    tags = {index: {"ImagePositionPatient": np.round(slice_position(series, index), 1).tolist()} for index in range(18)}
    write_series(tmp_path, replace(series, slice_tags=tags))
    volume, _ = canonical(read_source(tmp_path, only_source(tmp_path)))
    assert volume.spacing_mm[0] == pytest.approx(0.625, rel=0.02)


def test_a_copied_slice_is_dropped_and_recorded(tmp_path: Path) -> None:
    paths = write_series(tmp_path, SERIES)
    (tmp_path / "again").write_bytes(paths[7].read_bytes())
    scan = read_source(tmp_path, only_source(tmp_path))
    assert "copies_dropped" in scan.repairs
    np.testing.assert_array_equal(scan.voxels.transpose(2, 1, 0), SERIES.voxels)


def test_a_truncated_slice_refuses_the_series_without_a_crash(tmp_path: Path) -> None:
    paths = write_series(tmp_path, SERIES)
    paths[4].write_bytes(paths[4].read_bytes()[:-200])
    assert _reason(tmp_path)[0] == "unreadable"


def test_a_broken_header_is_its_own_input_and_leaves_a_gap(tmp_path: Path) -> None:
    paths = write_series(tmp_path, SERIES)
    paths[4].write_bytes(b"\0" * 128 + b"DICM" + b"\x02\0\0\0UL\x04\0\xff\xff\xff\xff" + b"\xff" * 50)
    sources = find_sources(tmp_path).sources
    outcomes = []
    for source in sources:
        with pytest.raises(Rejected) as caught:
            read_source(tmp_path, source)
        outcomes.append(caught.value.reason)
    assert Reason.MISSING_SLICES in outcomes
    assert len(outcomes) == 2


def _nifti(voxels: np.ndarray, affine: np.ndarray | None = None) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        grid = np.diag([0.8, 0.9, 2.5, 1.0]) if affine is None else affine
        nib.save(nib.Nifti1Image(voxels.transpose(*reversed(range(voxels.ndim))), grid), root / "scan.nii")

    return write


def _sheared() -> np.ndarray:
    affine = np.diag([0.8, 0.9, 2.5, 1.0])
    affine[0, 2] = 0.5
    return affine


def _with_nan() -> np.ndarray:
    voxels = phantom().astype(np.float32)
    voxels[3, 3, 3] = np.nan
    return voxels


def _damaged(suffix: str, keep: float) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        path = write_image(root / f"scan.{suffix}", phantom())
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep)])

    return write


def _colour(root: Path) -> None:
    image = sitk.GetImageFromArray(np.zeros((5, 6, 7, 3), np.uint8), isVector=True)
    sitk.WriteImage(image, str(root / "scan.mha"))


def _promising(root: Path) -> None:
    header = "NRRD0004\ntype: short\ndimension: 3\nsizes: 30000 30000 30000\nencoding: gzip\n\n"
    (root / "scan.nrrd").write_bytes(header.encode() + b"\x1f\x8b" + b"\0" * 50)


def _flipped(suffix: str, data: str, at: float) -> Callable[[Path], None]:
    """Compressed data with one bit turned, which the libraries pass on as other voxels or as zeros."""

    def write(root: Path) -> None:
        image = sitk.GetImageFromArray(phantom())
        sitk.WriteImage(image, str(root / f"scan.{suffix}"), useCompression=True)
        raw = bytearray((root / data).read_bytes())
        raw[int(len(raw) * at) - 1] ^= 4
        (root / data).write_bytes(raw)

    return write


@pytest.mark.parametrize(
    ("suffix", "data"),
    [
        ("nii.gz", "scan.nii.gz"),
        ("mha", "scan.mha"),
        ("mhd", "scan.zraw"),
        ("nrrd", "scan.nrrd"),
        ("nhdr", "scan.raw.gz"),
    ],
)
@pytest.mark.parametrize("at", [0.5, 0.8, 1.0])
def test_damaged_compressed_data_are_refused(tmp_path: Path, suffix: str, data: str, at: float) -> None:
    _flipped(suffix, data, at)(tmp_path)
    assert _reason(tmp_path)[0] == "unreadable"


def test_data_in_a_pipe_are_refused_unopened(tmp_path: Path) -> None:
    write_image(tmp_path / "scan.mhd", phantom())
    (tmp_path / "scan.raw").unlink()
    os.mkfifo(tmp_path / "scan.raw")
    source = next(source for source in find_sources(tmp_path).sources if source.name == "scan.mhd")
    with pytest.raises(Rejected, match="no regular file"):
        read_source(tmp_path, source)


def test_an_unknown_unit_of_length_is_no_geometry(tmp_path: Path) -> None:
    path = write_image(tmp_path / "scan.nii", phantom())
    raw = bytearray(path.read_bytes())
    raw[123] = 255
    path.write_bytes(raw)
    assert _reason(tmp_path)[0] == "no_geometry"


@pytest.mark.parametrize("change", [-2, 2])
def test_compressed_data_of_another_length_than_promised_are_refused(tmp_path: Path, change: int) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(phantom()), str(tmp_path / "scan.mhd"), useCompression=True)
    voxels = (phantom().tobytes() + b"\0\0")[: phantom().nbytes + change]
    (tmp_path / "scan.zraw").write_bytes(zlib.compress(voxels))
    assert "decode to" in _reason(tmp_path)[1]


@pytest.mark.parametrize("suffix", ["nii", "nrrd", "mha"])
def test_a_name_that_is_no_text_is_read_all_the_same(tmp_path: Path, suffix: str) -> None:
    path = write_image(tmp_path / f"scan.{suffix}", phantom(), "RAS")
    os.rename(path, os.fsencode(tmp_path) + f"/sc\udce4n.{suffix}".encode("utf-8", "surrogateescape"))
    volume, _ = canonical(read_source(tmp_path, only_source(tmp_path)))
    np.testing.assert_array_equal(volume.voxels, phantom()[:, ::-1, ::-1])


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (_nifti(np.stack([phantom()] * 2)), "not_3d"),
        (_nifti(phantom()[0]), "not_3d"),
        (_nifti(_with_nan()), "non_finite"),
        (_nifti((phantom() > 0).astype(np.uint8)), "hu_implausible"),
        (_nifti((phantom() / 2000).astype(np.float32)), "hu_implausible"),
        (_nifti(phantom().astype(np.int32) * 50), "hu_implausible"),
        (_nifti(np.clip(phantom() / 8 + 128, 0, 255).astype(np.uint8)), "hu_implausible"),
        (_nifti(np.full((9, 9, 9), 7, np.int16)), "constant"),
        (_nifti(phantom(), _sheared()), "sheared_affine"),
        (_nifti(phantom(), np.diag([0.001, 0.9, 2.5, 1])), "spacing_implausible"),
        (_damaged("nii.gz", 0.6), "unreadable"),
        (_damaged("nii", 0.6), "unreadable"),
        (_damaged("nii", 0.005), "unreadable"),
        (_damaged("nrrd", 0.6), "unreadable"),
        (_damaged("mha", 0.6), "unreadable"),
        (_colour, "not_3d"),
        (_promising, "unreadable"),
        (lambda root: (root / "scan.nii.gz").write_bytes(b"no gzip at all"), "unreadable"),
    ],
)
def test_files_that_are_no_volume(tmp_path: Path, write: Callable[[Path], None], reason: str) -> None:
    write(tmp_path)
    assert _reason(tmp_path)[0] == reason


def test_min_slices_counts_every_axis(tmp_path: Path) -> None:
    write_image(tmp_path / "scan.nii", phantom())
    assert _reason(tmp_path, min_slices=19)[0] == "too_few_slices"


def test_every_file_is_an_input_or_counted_as_ignored(tmp_path: Path) -> None:
    write_series(tmp_path / "series", SERIES)
    write_image(tmp_path / "scan.mhd", phantom())
    for name in ("notes.txt", "table.csv", "series/DICOMDIR", "README"):
        (tmp_path / name).write_text("words")
    for name in ("what", "scan.zip", "empty"):
        (tmp_path / name).write_bytes(b"" if name == "empty" else b"PK" * 300)
    tree = find_sources(tmp_path)
    assert tree.num_ignored == 4
    assert [source.format for source in tree.sources] == ["unknown", "mha", "unknown", "dicom", "unknown"]
    unreadable = [source for source in tree.sources if source.format == "unknown"]
    assert all(source.problem and source.problem[0] == Reason.UNREADABLE for source in unreadable)


@pytest.mark.parametrize("name", ["scan.nii", "scan.mha", "what"])
def test_what_is_no_regular_file_is_refused_unopened(tmp_path: Path, name: str) -> None:
    write_image(tmp_path / "good.nii", phantom())
    os.mkfifo(tmp_path / name)
    (tmp_path / "gone.nii").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    problems = {source.name: source.problem for source in find_sources(tmp_path).sources}
    assert problems == {
        "good.nii": None,
        name: (Reason.UNREADABLE, "a pipe, a socket or a device, no file"),
        "gone.nii": (Reason.UNREADABLE, "a link to something that is not there"),
        "loop": (Reason.UNREADABLE, "a link to something that is not there"),
    }


def test_details_say_what_was_found(tmp_path: Path) -> None:
    _nifti(phantom(), _sheared())(tmp_path)
    # The third axis leans by atan(0.5 / 2.5).
    assert _reason(tmp_path)[1] == "two axes of the grid are 11.31 degrees off a right angle"
    _nifti((phantom() > 0).astype(np.uint8))(tmp_path)
    assert _reason(tmp_path)[1].endswith(": normalised, or a mask")


def test_linked_folders_are_entered_once(tmp_path: Path) -> None:
    write_image(tmp_path / "real" / "scan.nii", phantom())
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    assert len(find_sources(tmp_path).sources) == 1


def test_a_folder_without_images_or_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        find_sources(tmp_path / "gone")
    with pytest.raises(SourceError, match="no image among 0 files"):
        find_sources(tmp_path)
    (tmp_path / "notes.txt").write_text("words")
    with pytest.raises(SourceError, match="no image among 1 files"):
        find_sources(tmp_path)
