"""Stored values into Hounsfield units: padding, rescale, unused bits, copies and cuts; right or refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydicom.uid import UID, JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless

from data_pipeline.reasons import Reason, Rejected
from data_pipeline.sources.dicom_pixels import Rescale, Stored, fault_of, to_hu
from data_pipeline.sources.dicom_read import read_series
from data_pipeline.sources.source import Scan
from tests.pipeline.sources import Series, phantom, slice_position, with_tags, write_series

SERIES = Series(phantom())
SQUARE = Series(phantom(shape=(4, 64, 64)))


def _read(folder: Path) -> Scan:
    return read_series(sorted(folder.iterdir()))


def _voxels(folder: Path) -> Any:
    return _read(folder).voxels.transpose(2, 1, 0)


def _rejected(folder: Path) -> tuple[str, str]:
    with pytest.raises(Rejected) as caught:
        _read(folder)
    return caught.value.reason, caught.value.detail


def _edit(path: Path, change: Callable[[pydicom.Dataset], None]) -> None:
    file = pydicom.dcmread(path)
    change(file)
    file.save_as(path, enforce_file_format=True)


def _by_place(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda path: float(pydicom.dcmread(path).ImagePositionPatient[2]))


# One slice.


@given(
    pixels=st.sampled_from([np.int8, np.uint8, np.int16, np.uint16]).flatmap(lambda kind: hnp.arrays(kind, (4, 5))),
    slope=st.one_of(st.just(1.0), st.floats(0.01, 40), st.just(-1.0)),
    intercept=st.one_of(st.integers(-40000, 40000).map(float), st.floats(-5000, 5000)),
    padding=st.one_of(st.none(), st.integers(-(2**15), 2**16 - 1)),
)
@settings(max_examples=300, deadline=None)
def test_any_slice_is_scaled_as_arithmetic_says(pixels, slope, intercept, padding):
    repairs: set[str] = set()
    rescale = Rescale(slope, intercept, None if padding is None else (padding, padding))
    hu = to_hu(pixels, rescale, repairs)
    expected = np.rint(pixels.astype(np.float64) * slope + intercept)
    if padding is not None and padding * slope + intercept <= -200:
        expected[pixels == padding] = -1024
    np.testing.assert_array_equal(hu, expected)
    assert hu.dtype in {np.dtype(np.int16), np.dtype(np.int32)}
    assert hu.dtype == np.int16 or np.abs(expected).max() > 32767
    assert ("rescaled" in repairs) == (slope != 1)


@pytest.mark.parametrize(("stored", "intercept"), [(64512, -65536), (0, -1024), (65535, -40000), (40000, -40000)])
def test_intercepts_beyond_16_bits_give_16_bit_hu_where_these_fit(stored: int, intercept: int) -> None:
    hu = to_hu(np.full((3, 3), stored, np.uint16), Rescale(1.0, float(intercept), None), set())
    assert hu.dtype == np.int16
    assert (hu == stored + intercept).all()


@pytest.mark.parametrize("slope", [np.inf, 1e300, np.nan])
def test_a_rescale_without_usable_numbers_is_refused(slope):
    with pytest.raises(Rejected) as caught:
        to_hu(np.ones((2, 2), np.int16), Rescale(float(slope), 0.0, None), set())
    assert caught.value.reason == Reason.NON_FINITE


# Series.


def test_rescale_and_intercept_may_change_from_slice_to_slice(tmp_path: Path) -> None:
    tags = {
        index: {
            "RescaleIntercept": -1000 - index,
            "PixelData": (SERIES.voxels[index] + 1000 + index).astype("<i2").tobytes(),
        }
        for index in range(18)
    }
    write_series(tmp_path, replace(SERIES, slice_tags=tags))
    np.testing.assert_array_equal(_voxels(tmp_path), SERIES.voxels)


@pytest.mark.parametrize("name", ["RescaleIntercept", "RescaleSlope"])
def test_a_rescale_that_one_slice_lacks_is_not_made_up(tmp_path: Path, name: str) -> None:
    write_series(tmp_path, replace(SERIES, slice_tags={9: {name: None}}))
    assert _rejected(tmp_path) == ("hu_implausible", "only some of the slices say how their values become HU")


def test_values_beyond_16_bits_are_kept_for_the_screen_to_see(tmp_path: Path) -> None:
    write_series(tmp_path, replace(SERIES, slice_tags={9: {"RescaleIntercept": 60000}}))
    voxels = _voxels(tmp_path)
    assert voxels.dtype == np.int32
    np.testing.assert_array_equal(voxels[8], SERIES.voxels[8])
    np.testing.assert_array_equal(voxels[9], SERIES.voxels[9].astype(np.int32) + 61024)


@pytest.mark.parametrize(("signed", "written"), [(1, 63536), (0, -2000)])
def test_a_padding_value_with_the_wrong_sign_means_the_same_bits(tmp_path: Path, signed: int, written: int) -> None:
    """-2000 and 63536 are the same 16 bits."""
    for path in write_series(tmp_path, replace(SERIES, intercept=0)):

        def change(file: pydicom.Dataset) -> None:
            stored = np.frombuffer(file.PixelData, "<i2").copy()
            stored[:7] = -2000
            file.PixelData = stored.tobytes()
            file.PixelRepresentation = signed
            if not signed:
                values = stored.astype(np.int32) + 1024
                values[:7] = 63536
                file.PixelData, file.RescaleIntercept = values.astype("<u2").tobytes(), -65536
            file.add_new(0x00280120, "US" if written > 0 else "SS", written)

        _edit(path, change)
    scan = _read(tmp_path)
    assert "padding_mapped" in scan.repairs
    assert scan.voxels.transpose(2, 1, 0).reshape(18, -1)[:, :7].max() == -1024


def test_a_range_of_padding_is_mapped_whole(tmp_path: Path) -> None:
    voxels = SERIES.voxels.copy()
    voxels[:, 0, :3] = (-2000, -1900, -1801)
    write_series(
        tmp_path,
        with_tags(replace(SERIES, voxels=voxels, intercept=0), PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1800),
    )
    assert (_voxels(tmp_path)[:, 0, :3] == -1024).all()
    np.testing.assert_array_equal(_voxels(tmp_path)[:, 1:], voxels[:, 1:])


def _with_high_bits(file: pydicom.Dataset) -> None:
    stored = np.frombuffer(file.PixelData, "<i2").astype(np.uint16)
    stored[3] |= 0x1000
    file.PixelData = stored.tobytes()
    file.BitsStored, file.HighBit, file.PixelRepresentation = 12, 11, 0


def test_an_overlay_in_unused_bits_is_taken_out_and_recorded(tmp_path: Path) -> None:
    for path in write_series(tmp_path, SERIES):
        _edit(path, _with_high_bits)
        _edit(path, lambda file: file.add_new(0x60000102, "US", 12))
    scan = _read(tmp_path)
    np.testing.assert_array_equal(scan.voxels.transpose(2, 1, 0), SERIES.voxels)
    assert "overlay_removed" in scan.repairs


def test_values_with_more_bits_than_the_header_says_are_refused(tmp_path: Path) -> None:
    for path in write_series(tmp_path, SERIES):
        _edit(path, _with_high_bits)
    assert _rejected(tmp_path) == (
        "hu_implausible",
        "stored values need more than the 12 bits that the header gives them",
    )


@pytest.mark.parametrize("bits", [8, 32])
def test_other_sizes_of_pixels(tmp_path: Path, bits: int) -> None:
    kind = {8: "u1", 32: "<i4"}[bits]
    voxels = np.clip(SERIES.voxels, -100, 155) if bits == 8 else SERIES.voxels
    for path, hu in zip(_by_place_written(tmp_path), voxels, strict=True):

        def change(file: pydicom.Dataset, hu: Any = hu) -> None:
            file.BitsAllocated = file.BitsStored = bits
            file.HighBit, file.PixelRepresentation, file.RescaleIntercept = bits - 1, int(bits == 32), -100
            file.PixelData = (hu.astype(np.int64) + 100).astype(kind).tobytes()

        _edit(path, change)
    np.testing.assert_array_equal(_voxels(tmp_path), voxels)


def _by_place_written(folder: Path) -> list[Path]:
    write_series(folder, SERIES)
    return _by_place(folder)


def test_lossy_origin_derived_type_and_overlap_are_recorded(tmp_path: Path) -> None:
    write_series(
        tmp_path,
        with_tags(
            SERIES, LossyImageCompression="01", ImageType=["DERIVED", "SECONDARY", "REFORMATTED"], SliceThickness=3.0
        ),
    )
    assert _read(tmp_path).repairs == ("derived_image_type", "lossy_source", "overlapping_slices")


def test_slices_as_thick_as_their_step_do_not_overlap(tmp_path: Path) -> None:
    write_series(tmp_path, with_tags(SERIES, SliceThickness=2.5))
    assert _read(tmp_path).repairs == ()


def test_a_table_instead_of_a_rescale_is_refused(tmp_path: Path) -> None:
    def change(file: pydicom.Dataset) -> None:
        del file.RescaleSlope
        item = pydicom.Dataset()
        item.LUTExplanation = "CANARY"
        file.ModalityLUTSequence = [item]

    for path in write_series(tmp_path, SERIES):
        _edit(path, change)
    assert _rejected(tmp_path) == ("unreadable", "stored values become HU by a table, which is not read")


def test_a_transfer_syntax_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    for path in write_series(tmp_path, SERIES):
        path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0"))
    assert _rejected(tmp_path) == ("unreadable", "the pixels are encoded in a way that is not read")


# Files that are not whole, and files too many.


def _cut_pixels(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def _compress(syntax: str) -> Callable[[Path], None]:
    def compress(path: Path) -> None:
        _edit(path, lambda file: file.compress(syntax))

    return compress


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, RLELossless])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_cut_compressed_slice_refuses_the_series(tmp_path: Path, syntax: str, place: int) -> None:
    """Decoders make up what is missing without a word."""
    for path in write_series(tmp_path, SQUARE):
        _compress(syntax)(path)
    path = _by_place(tmp_path)[place]
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.8)])
    reason, detail = _rejected(tmp_path)
    assert reason == "unreadable"
    assert detail.startswith("1 file cannot be decoded (it is cut short)")
    assert ("1 of 4 slices missing" in detail) == (place == 1)


_WHOLE, _OPEN = b"\xff\xd8" + bytes(40) + b"\xff\xd9", b"\xff\xd8" + bytes(40)


@pytest.mark.parametrize("is_defined", [False, True])
@pytest.mark.parametrize(
    ("syntax", "fragments", "num_frames", "is_cut"),
    [
        (JPEGLSLossless, [_WHOLE], 1, False),
        (JPEGLosslessSV1, [_WHOLE + bytes(6)], 1, False),
        (JPEGLosslessSV1, [_OPEN, b"\0" + _WHOLE[-1:]], 1, True),
        (JPEGLosslessSV1, [_WHOLE[:-1], _WHOLE[-1:] + b"\0"], 1, False),
        (JPEGLosslessSV1, [_WHOLE, _OPEN, _WHOLE], 3, True),
        (JPEGLSLossless, [_OPEN], 1, True),
        (JPEG2000Lossless, [_OPEN], 1, False),
    ],
)
def test_frames_of_jpeg_need_their_end(
    tmp_path: Path, syntax: UID, fragments: list[bytes], num_frames: int, is_cut: bool, is_defined: bool
) -> None:
    """Before any decoder sees them: of what a frame lacks JPEG's makes up pixels, and that of JPEG-LS searches on."""
    items = b"".join(b"\xfe\xff\x00\xe0" + len(item).to_bytes(4, "little") + item for item in (b"", *fragments))
    length = len(items).to_bytes(4, "little") if is_defined else b"\xff\xff\xff\xff"
    end = b"" if is_defined else b"\xfe\xff\xdd\xe0" + bytes(4)
    path = tmp_path / "file"
    path.write_bytes(b"\0\xe0\x7f\x10\x00OB\0\0" + length + items + end + bytes(2))
    stored = Stored(path, syntax, 1, (4, 4), num_frames, (16, 16), True, False, False)
    assert fault_of(stored) == ("it is cut short" if is_cut else None)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless])
def test_compressed_pixels_of_another_size_are_refused(tmp_path: Path, syntax: str) -> None:
    """As many pixels, but other rows: what is decoded would be sheared."""
    series = Series(phantom(shape=(4, 64, 96)))
    for path in write_series(tmp_path, series):
        _compress(syntax)(path)

        def swap(file: pydicom.Dataset) -> None:
            file.Rows, file.Columns = 96, 64

        _edit(path, swap)
    assert _rejected(tmp_path) == (
        "unreadable",
        "4 files cannot be decoded (its compressed pixels have another size than its header says)",
    )


@pytest.mark.parametrize(("rows", "words"), [(30, "it is cut short"), (10, "more pixels than its header says")])
def test_a_header_with_other_rows_than_the_pixels_is_refused(tmp_path: Path, rows: int, words: str) -> None:
    write_series(tmp_path, with_tags(SERIES, Rows=rows))
    reason, detail = _rejected(tmp_path)
    assert reason == "unreadable"
    assert words in detail


def test_garbage_instead_of_compressed_pixels_is_refused(tmp_path: Path) -> None:
    paths = write_series(tmp_path, SQUARE)
    for path in paths:
        _compress(RLELossless)(path)
    data = paths[1].read_bytes()
    place = data.index(b"\xe0\x7f\x10\x00")
    paths[1].write_bytes(data[: place + 40] + b"\xa5" * (len(data) - place - 48) + data[-8:])
    reason, detail = _rejected(tmp_path)
    assert reason == "unreadable"
    assert detail.startswith("1 file cannot be decoded (its pixels fail, ")


def test_uncompressed_syntax_with_compressed_pixels_is_refused(tmp_path: Path) -> None:
    for path in write_series(tmp_path, SQUARE):
        _compress(JPEG2000Lossless)(path)
        path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.4.90", b"1.2.840.10008.1.2.1\0\0\0"))
    reason, detail = _rejected(tmp_path)
    assert reason == "unreadable"
    assert "contradict its transfer syntax" in detail


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    write_series(tmp_path, SERIES, skip=(5,))
    ordered = _by_place(tmp_path)
    (tmp_path / "again").write_bytes(ordered[7].read_bytes())
    (tmp_path / "once more").write_bytes(ordered[7].read_bytes())
    _cut_pixels(ordered[11])
    assert _rejected(tmp_path) == (
        "missing_slices",
        "1 file cannot be decoded (it is cut short); 2 byte-identical copies dropped; "
        "2 of 18 slices missing by their positions",
    )


def test_a_cut_copy_of_a_whole_slice_is_no_copy(tmp_path: Path) -> None:
    paths = write_series(tmp_path, SERIES)
    (tmp_path / "again").write_bytes(paths[7].read_bytes()[:-200])
    reason, detail = _rejected(tmp_path)
    assert (reason, detail) == ("unreadable", "1 file cannot be decoded (it is cut short)")


def test_another_version_of_a_slice_is_a_repeat_not_a_copy(tmp_path: Path) -> None:
    paths = write_series(tmp_path, SERIES)
    (tmp_path / "again").write_bytes(paths[7].read_bytes())
    _edit(tmp_path / "again", lambda file: setattr(file, "AcquisitionNumber", 2))
    assert _rejected(tmp_path) == (
        "repeated_positions",
        "1 of 19 slices lie where another one lies: 2 acquisitions",
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("TemporalPositionIdentifier", "3 temporal positions"),
        ("AcquisitionNumber", "3 acquisitions"),
        ("NominalPercentageOfCardiacPhase", "3 cardiac phases"),
        ("TriggerTime", "3 cardiac phases"),
        ("KVP", "3 tube voltages"),
    ],
)
def test_several_volumes_in_one_series_are_refused_with_what_tells_them_apart(
    tmp_path: Path, name: str, words: str
) -> None:
    voxels = np.concatenate([phantom(seed, (6, 20, 22)) for seed in range(3)])
    tags = {
        index: {
            name: index // 6 + 1,
            "ImagePositionPatient": [float(number) for number in slice_position(SERIES, index % 6)],
        }
        for index in range(18)
    }
    write_series(tmp_path, replace(SERIES, voxels=voxels, slice_tags=tags))
    assert _rejected(tmp_path) == (
        "repeated_positions",
        f"12 of 18 slices lie where another one lies: {words}",
    )


def test_a_file_that_cannot_be_opened_may_be_read_the_next_time(tmp_path: Path) -> None:
    paths = write_series(tmp_path, SERIES)
    with pytest.raises(Rejected) as caught:
        read_series([*paths, tmp_path / "gone"])
    assert caught.value.reason == Reason.IO_ERROR
