"""CT with many frames in one file is read as each frame says for itself, and refused where the frames are no volume."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import JPEG2000Lossless

from data_pipeline.canonical import canonical
from data_pipeline.reasons import Rejected
from data_pipeline.sources.inventory import find_sources
from data_pipeline.sources.read import read_source
from data_pipeline.sources.source import Scan
from tests.pipeline.sources import Series, only_source, oracle, phantom, slice_position, write_series

ENHANCED = "1.2.840.10008.5.1.4.1.1.2.1"
LEGACY = "1.2.840.10008.5.1.4.1.1.2.2"
VOXELS = phantom(shape=(18, 64, 48))
Change = Callable[[Dataset], None]


def _item(**tags: Any) -> list[Dataset]:
    item = Dataset()
    for name, value in tags.items():
        setattr(item, name, value)
    return [item]


def _write(
    path: Path,
    order: Sequence[int] | None = None,
    intercepts: Sequence[float] | None = None,
    change: Change | None = None,
) -> Path:
    """VOXELS as one file: frames in the given order, each with its own intercept."""
    series = Series(VOXELS)
    file = pydicom.dcmread(write_series(path.parent / "slices", series)[0])
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"):
        delattr(file, name)
    file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = ENHANCED
    order = list(range(len(VOXELS)) if order is None else order)
    intercepts = intercepts or [-1024] * len(order)
    shared = Dataset()
    shared.PlaneOrientationSequence = _item(ImageOrientationPatient=list(series.orientation))
    shared.PixelMeasuresSequence = _item(PixelSpacing=list(series.spacing_mm[1:]), SliceThickness=2.5)
    shared.CTImageFrameTypeSequence = _item(FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"])
    file.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for index, intercept in zip(order, intercepts, strict=True):
        group = Dataset()
        position = [float(number) for number in slice_position(series, index)]
        group.PlanePositionSequence = _item(ImagePositionPatient=position)
        group.FrameContentSequence = _item(StackID="1", FrameAcquisitionNumber=1)
        group.PixelValueTransformationSequence = _item(RescaleIntercept=intercept, RescaleSlope=1, RescaleType="HU")
        groups.append(group)
    file.PerFrameFunctionalGroupsSequence = groups
    file.NumberOfFrames = len(order)
    stored = [VOXELS[index] - intercept for index, intercept in zip(order, intercepts, strict=True)]
    file.PixelData = np.stack(stored).astype("<i2").tobytes()
    if change is not None:
        change(file)
    for slice_ in (path.parent / "slices").iterdir():
        slice_.unlink()
    (path.parent / "slices").rmdir()
    file.save_as(path, enforce_file_format=True)
    return path


def _read(root: Path) -> Scan:
    return read_source(root, only_source(root))


def _assert_is_phantom(scan: Scan) -> None:
    np.testing.assert_array_equal(scan.voxels.transpose(2, 1, 0), VOXELS)
    expected = slice_position(Series(VOXELS), 0) * (-1, -1, 1)
    np.testing.assert_allclose(scan.affine[:3, 3], expected)
    np.testing.assert_allclose(np.linalg.norm(scan.affine[:3, :3], axis=0), (0.8, 0.9, 2.5))


def test_frames_are_ordered_by_position_and_scaled_each_for_itself(tmp_path: Path) -> None:
    order = np.random.default_rng(3).permutation(len(VOXELS)).tolist()
    intercepts = [-1024.0 + 10 * place for place in range(len(VOXELS))]
    _write(tmp_path / "file", order, intercepts)
    scan = _read(tmp_path)
    _assert_is_phantom(scan)
    assert scan.voxels.dtype == np.int16
    assert only_source(tmp_path).num_voxels == VOXELS.size
    assert only_source(tmp_path).voxel_mm3 == pytest.approx(0.8 * 0.9 * 2.5)


def test_as_simpleitk_reads_it(tmp_path: Path) -> None:
    path = _write(tmp_path / "file.dcm")
    volume, _ = canonical(_read(tmp_path))
    voxels, affine = oracle([path])
    np.testing.assert_array_equal(volume.voxels, voxels)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-3)


def test_a_legacy_file_may_give_at_the_top_what_its_groups_do_not(tmp_path: Path) -> None:
    def change(file: Dataset) -> None:
        file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = LEGACY
        for group in file.PerFrameFunctionalGroupsSequence:
            del group.PixelValueTransformationSequence
        file.RescaleIntercept, file.RescaleSlope = -1024, 1
        file.add_new(0x00280120, "SS", -3000)

    _write(tmp_path / "file", change=change)
    _assert_is_phantom(_read(tmp_path))


def _compressed(file: Dataset, with_table: bool, fragments: int) -> None:
    file.compress(JPEG2000Lossless)
    frames = list(generate_frames(file.PixelData, number_of_frames=len(VOXELS)))
    file.PixelData = encapsulate(frames, fragments_per_frame=fragments, has_bot=with_table)


@pytest.mark.parametrize(("with_table", "fragments"), [(True, 1), (True, 3), (False, 1)])
def test_compressed_frames(tmp_path: Path, with_table: bool, fragments: int) -> None:
    _write(tmp_path / "file", change=lambda file: _compressed(file, with_table, fragments))
    _assert_is_phantom(_read(tmp_path))


def test_fragments_without_a_table_of_offsets_are_put_together(tmp_path: Path) -> None:
    """Only the JPEG markers say where a frame ends."""

    def change(file: Dataset) -> None:
        file.compress(pydicom.uid.JPEGLSLossless)
        frames = list(generate_frames(file.PixelData, number_of_frames=len(VOXELS)))
        file.PixelData = encapsulate(frames, fragments_per_frame=3, has_bot=False)

    _write(tmp_path / "file", change=change)
    _assert_is_phantom(_read(tmp_path))


def test_each_file_of_a_series_is_a_source_of_its_own(tmp_path: Path) -> None:
    path = _write(tmp_path / "one")
    (tmp_path / "two").write_bytes(path.read_bytes())
    assert [source.files for source in find_sources(tmp_path).sources] == [("one",), ("two",)]


def test_a_series_of_files_of_one_frame_each_is_one_volume(tmp_path: Path) -> None:
    uid = pydicom.uid.generate_uid()

    def change(file: Dataset) -> None:
        file.SeriesInstanceUID = uid

    for index in range(len(VOXELS)):
        _write(tmp_path / f"file{index}", [index], change=change)
    np.testing.assert_array_equal(_read(tmp_path).voxels.transpose(2, 1, 0)[0], VOXELS[0])
    _assert_is_phantom(_read(tmp_path))


def _no_uid(file: Dataset) -> None:
    file.SeriesInstanceUID = ""


def test_without_a_series_uid_the_file_itself_is_the_series(tmp_path: Path) -> None:
    _write(tmp_path / "file", change=_no_uid)
    _assert_is_phantom(_read(tmp_path))


def _map(file: Dataset) -> None:
    frame_type = file.SharedFunctionalGroupsSequence[0].CTImageFrameTypeSequence[0]
    frame_type.FrameType = ["DERIVED", "PRIMARY", "PERFUSION", "RCBV"]


def _map_in_one_frame(file: Dataset) -> None:
    file.PerFrameFunctionalGroupsSequence[7].CTImageFrameTypeSequence = _item(
        FrameType=["DERIVED", "PRIMARY", "VOLUME", "MAX_IP"]
    )


def _units(file: Dataset) -> None:
    for group in file.PerFrameFunctionalGroupsSequence:
        group.PixelValueTransformationSequence[0].RescaleType = "Z_EFF"


def _stacks(file: Dataset) -> None:
    for group in file.PerFrameFunctionalGroupsSequence[9:]:
        group.FrameContentSequence[0].StackID = "2"


def _fewer_groups(file: Dataset) -> None:
    del file.PerFrameFunctionalGroupsSequence[-1]


def _no_positions(file: Dataset) -> None:
    for group in file.PerFrameFunctionalGroupsSequence:
        del group.PlanePositionSequence


def _no_groups(file: Dataset) -> None:
    del file.PerFrameFunctionalGroupsSequence


def _phases(file: Dataset) -> None:
    groups = file.PerFrameFunctionalGroupsSequence
    for group, earlier in zip(groups[9:], groups, strict=False):
        group.PlanePositionSequence = earlier.PlanePositionSequence
        group.FrameContentSequence[0].TemporalPositionIndex = 2


def _half_the_pixels(file: Dataset) -> None:
    file.PixelData = file.PixelData[: len(file.PixelData) // 2]


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        (_map, "derived_map", "image type PERFUSION RCBV"),
        (_map_in_one_frame, "derived_map", "image type MAX_IP"),
        (_units, "derived_map", "the rescale type is not HU"),
        (_stacks, "multi_frame", "2 stacks of frames in one file"),
        (_fewer_groups, "no_geometry", "not as many as the frames"),
        (_no_positions, "no_geometry", "image position"),
        (_no_groups, "multi_frame", "no position for each"),
        (_phases, "repeated_positions", "9 of 18 slices lie where another one lies: 2 temporal positions"),
        (_half_the_pixels, "unreadable", "1 file cannot be decoded (it is cut short)"),
    ],
)
def test_frames_that_are_no_volume(tmp_path: Path, change: Change, reason: str, detail: str) -> None:
    _write(tmp_path / "file", change=change)
    with pytest.raises(Rejected) as caught:
        _read(tmp_path)
    assert caught.value.reason == reason
    assert detail in caught.value.detail


def test_a_missing_frame_is_found(tmp_path: Path) -> None:
    _write(tmp_path / "file", [index for index in range(len(VOXELS)) if index != 4])
    with pytest.raises(Rejected, match="1 of 18 slices missing by their positions"):
        _read(tmp_path)
