"""Which DICOM files belong together: by what their headers say, never by luck; and nothing of it names anybody."""

import gzip
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.uid import generate_uid

from data_pipeline.reasons import Reason, Rejected
from data_pipeline.sources.dicom_header import read_header
from data_pipeline.sources.dicom_read import read_series
from data_pipeline.sources.dicom_series import DicomFacts, group_series, header_facts, is_dicom, sources_of
from data_pipeline.sources.inventory import find_sources
from data_pipeline.sources.read import read_source
from tests.pipeline.sources import Series, only_source, phantom, slice_position, with_tags, write_series

SERIES = Series(phantom())
NO_UIDS = {"SeriesInstanceUID": "", "StudyInstanceUID": "", "PatientID": ""}


def _numbered(folder: Path, series: Series, first: int = 1, suffix: str = "") -> None:
    """A series whose instance numbers follow the slices, as scanners write them."""
    folder.mkdir(parents=True, exist_ok=True)
    written = write_series(folder / "written", series)
    by_place = sorted((float(pydicom.dcmread(path).ImagePositionPatient[2]), path) for path in written)
    for number, (_, path) in enumerate(by_place, start=first):
        file = pydicom.dcmread(path)
        file.InstanceNumber = number
        file.save_as(folder / f"{path.name}{suffix}")
        path.unlink()
    (folder / "written").rmdir()


def _rejected(root: Path) -> tuple[Reason, str]:
    with pytest.raises(Rejected) as caught:
        read_source(root, only_source(root))
    return caught.value.reason, caught.value.detail


def test_facts_are_small_name_nobody_and_survive_json(tmp_path: Path) -> None:
    write_series(tmp_path, with_tags(SERIES, SeriesDescription="CANARY series", AccessionNumber="CANARY"))
    facts = {path.name: header_facts(path) for path in tmp_path.iterdir()}
    texts = {file: json.dumps(fact.values()) for file, fact in facts.items()}
    assert "CANARY" not in "".join(texts.values())
    assert max(map(len, texts.values())) < 400
    again = {file: DicomFacts.from_values(json.loads(text)) for file, text in texts.items()}
    assert again == facts
    assert sources_of(again) == group_series(tmp_path, list(facts))
    (source,) = sources_of(again)
    assert len(source.files) == 18
    assert source.num_voxels == SERIES.voxels.size
    assert source.voxel_mm3 == pytest.approx(2.5 * 0.9 * 0.8)


def test_identity_is_read_in_clear_with_the_issuer(tmp_path: Path) -> None:
    write_series(tmp_path, with_tags(SERIES, IssuerOfPatientID="HOSPITAL", SeriesInstanceUID="1.2.3.4"))
    identity = read_source(tmp_path, only_source(tmp_path)).identity
    assert (identity.patient, identity.study, identity.series) == ("HOSPITAL\nCANARY-ID", "1.2.3", "1.2.3.4")
    assert "CANARY" not in repr(identity)


def test_a_localizer_in_a_series_does_not_spoil_it(tmp_path: Path) -> None:
    uid = generate_uid()
    write_series(tmp_path / "axial", replace(SERIES, uid=uid))
    localizer = Series(phantom()[:1], (0, 1, 0, 0, 0, -1), uid=uid)
    write_series(tmp_path / "scout", with_tags(localizer, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    axial, scout = find_sources(tmp_path).sources
    np.testing.assert_array_equal(read_source(tmp_path, axial).voxels.transpose(2, 1, 0), SERIES.voxels)
    assert scout.problem is not None
    assert scout.problem[0] == Reason.LOCALIZER


def test_a_screenshot_in_a_series_does_not_spoil_it(tmp_path: Path) -> None:
    uid = generate_uid()
    write_series(tmp_path / "axial", replace(SERIES, uid=uid))
    screen = Series(phantom()[:1], uid=uid)
    write_series(tmp_path / "screen", with_tags(screen, ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"]))
    problems = [source.problem and source.problem[0] for source in find_sources(tmp_path).sources]
    assert problems == [None, Reason.SECONDARY_CAPTURE]


def test_an_object_without_pixels_in_a_series_does_not_spoil_it(tmp_path: Path) -> None:
    """Raw data and protocols of some scanners carry modality CT and the series' UID."""
    uid = generate_uid()
    write_series(tmp_path / "axial", replace(SERIES, uid=uid))
    other = Series(phantom()[:1], uid=uid)
    write_series(
        tmp_path / "raw",
        with_tags(other, SOPClassUID="1.3.12.2.1107.5.9.1", Rows=None, Columns=None, PixelData=None),
    )
    problems = [source.problem and source.problem[0] for source in find_sources(tmp_path).sources]
    assert problems == [None, Reason.NO_PIXELS]


@pytest.mark.parametrize("place", [0, 8, 17])
def test_a_slice_cut_within_its_header_stays_in_its_series_and_refuses_it(tmp_path: Path, place: int) -> None:
    write_series(tmp_path, SERIES)
    by_place = {float(pydicom.dcmread(path).ImagePositionPatient[2]): path for path in tmp_path.iterdir()}
    path = by_place[sorted(by_place)[place]]
    data = path.read_bytes()
    # Up to and with the series UID, which (0020,000E) starts.
    path.write_bytes(data[: data.index(b"\x20\x00\x0e\x00") + 8 + 70])
    reason, detail = _rejected(tmp_path)
    assert reason == (Reason.UNREADABLE if place in {0, 17} else Reason.MISSING_SLICES)
    assert "1 file cannot be decoded (it ends before its pixels)" in detail


def test_headers_without_pixels_are_no_series(tmp_path: Path) -> None:
    write_series(tmp_path, with_tags(SERIES, PixelData=None))
    assert _rejected(tmp_path) == (Reason.NO_PIXELS, "no image in the file")


def test_a_file_that_ends_within_its_header_is_damaged_not_empty(tmp_path: Path) -> None:
    path = write_series(tmp_path, replace(SERIES, voxels=SERIES.voxels[:1]))[0]
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"\x20\x00\x32\x00DS") + 12])
    assert _rejected(tmp_path) == (Reason.UNREADABLE, "the file ends within its header")


def _without_meta(file: pydicom.Dataset, path: Path) -> None:
    del file.file_meta
    file.preamble = None
    file.save_as(path, implicit_vr=True, little_endian=True)


def _preamble_only(file: pydicom.Dataset, path: Path) -> None:
    _without_meta(file, path)
    path.write_bytes(b"\0" * 128 + b"DICM" + path.read_bytes())


def _deflated(file: pydicom.Dataset, path: Path) -> None:
    file.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    file.save_as(path, enforce_file_format=True)


def _big_endian(file: pydicom.Dataset, path: Path) -> None:
    other = pydicom.Dataset()
    for element in file:
        other.add(element)
    other.PixelData = np.frombuffer(file.PixelData, "<i2").astype(">i2").tobytes()
    other.file_meta = file.file_meta
    other.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
    other.save_as(path, implicit_vr=False, little_endian=False, enforce_file_format=True)


def _private(file: pydicom.Dataset, path: Path) -> None:
    block = file.private_block(0x0009, "CANARY MAKER", create=True)
    block.add_new(1, "UN", b"\xff\xfe\x00\xe0\xff\xff\xff\xff")
    block.add_new(2, "SH", "CANARY")
    file.add_new(0x00081140, "SQ", [])
    file.save_as(path, enforce_file_format=True)


def _unknown(file: pydicom.Dataset, path: Path) -> None:
    """Attributes that went through software which did not know them are marked UN."""
    file.save_as(path, enforce_file_format=True)
    data = path.read_bytes()
    for name, vr in (("ImagePositionPatient", b"DS"), ("PixelSpacing", b"DS"), ("SeriesInstanceUID", b"UI")):
        tag = file[name].tag
        start = tag.group.to_bytes(2, "little") + tag.elem.to_bytes(2, "little") + vr
        place = data.index(start)
        length = data[place + 6 : place + 8]
        data = data[:place] + start[:4] + b"UN\0\0" + length + b"\0\0" + data[place + 8 :]
    path.write_bytes(data)


def _trailing_bytes(file: pydicom.Dataset, path: Path) -> None:
    file.save_as(path, enforce_file_format=True)
    path.write_bytes(path.read_bytes() + b"\0" * 500)


@pytest.mark.parametrize(
    "write", [_without_meta, _preamble_only, _deflated, _big_endian, _private, _unknown, _trailing_bytes]
)
def test_every_way_of_writing_a_file_gives_the_same_voxels(
    tmp_path: Path, write: Callable[[pydicom.Dataset, Path], None]
) -> None:
    for path in write_series(tmp_path, SERIES):
        write(pydicom.dcmread(path), path)
    scan = read_source(tmp_path, only_source(tmp_path))
    np.testing.assert_array_equal(scan.voxels.transpose(2, 1, 0), SERIES.voxels)
    assert scan.voxels.dtype == np.int16


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_wrong_length_in_the_header_is_refused_not_believed(tmp_path: Path) -> None:
    path = write_series(tmp_path, SERIES)[7]
    data = bytearray(path.read_bytes())
    place = data.index(b"\x20\x00\x32\x00DS")
    data[place + 6 : place + 8] = b"\xf0\xff"
    path.write_bytes(data)
    assert len(find_sources(tmp_path).sources) in {1, 2}
    for source in find_sources(tmp_path).sources:
        with pytest.raises(Rejected):
            read_source(tmp_path, source)


def test_a_dicomdir_is_known_by_its_class_under_any_name(tmp_path: Path) -> None:
    write_series(tmp_path, SERIES)
    path = next(tmp_path.iterdir())
    file = pydicom.dcmread(path)
    file.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    for name in ("SOPClassUID", "Modality", "Rows", "Columns", "PixelData"):
        delattr(file, name)
    file.save_as(path)
    (other,) = [source for source in find_sources(tmp_path).sources if len(source.files) == 1]
    assert other.problem == (Reason.NO_PIXELS, "a DICOMDIR: an index of other files, no image")


def test_dicom_inside_gzip_is_refused_with_what_to_do(tmp_path: Path) -> None:
    write_series(tmp_path / "series", SERIES)
    path = next((tmp_path / "series").iterdir())
    path.with_suffix(".gz").write_bytes(gzip.compress(path.read_bytes()))
    assert is_dicom(path.with_suffix(".gz"))
    (other,) = [source for source in find_sources(tmp_path).sources if len(source.files) == 1]
    assert other.problem == (Reason.UNREADABLE, "a DICOM file inside gzip: unpack it")


@pytest.mark.parametrize("modality", ["CANARY", "CANARY^NAME", "canary1"])
def test_a_modality_that_is_none_is_not_repeated(tmp_path: Path, modality: str) -> None:
    write_series(tmp_path, with_tags(SERIES, Modality=modality))
    assert _rejected(tmp_path) == (Reason.NOT_CT, "an unknown modality, expected CT")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_header_that_cannot_be_read_is_a_fact_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(b"\0" * 128 + b"DICM" + b"\x02\0\0\0UL\x04\0\xff\xff\xff\xff" + b"\xff" * 50)
    facts = header_facts(tmp_path / "broken")
    assert facts.problem is not None
    assert header_facts(tmp_path / "gone").problem[0] == Reason.IO_ERROR  # type: ignore[index]  # it has one


# Series without UIDs.


def test_two_series_without_uids_in_one_folder_are_told_apart_by_what_describes_them(tmp_path: Path) -> None:
    for seed, number in enumerate((3, 4)):
        _numbered(tmp_path, Series(phantom(seed), tags={**NO_UIDS, "SeriesNumber": number}), suffix=str(number))
    sources = find_sources(tmp_path).sources
    assert [len(source.files) for source in sources] == [18, 18]
    found = {read_source(tmp_path, source).voxels.tobytes() for source in sources}
    assert found == {np.ascontiguousarray(phantom(seed).transpose(2, 1, 0)).tobytes() for seed in (0, 1)}


def _between(series: Series) -> Series:
    """The same stack, half a step further."""
    x, y, z = slice_position(series, 0)
    return replace(series, origin=(float(x), float(y), float(z) + series.spacing_mm[0] / 2))


def _beyond(series: Series) -> Series:
    """The same stack, where the first one ends."""
    x, y, z = slice_position(series, len(series.voxels))
    return replace(series, origin=(float(x), float(y), float(z)))


@pytest.mark.parametrize("second", [_between, _beyond])
@pytest.mark.parametrize("first_number", [1, 19])
def test_two_series_that_nothing_tells_apart_are_never_merged(
    tmp_path: Path, second: Callable[[Series], Series], first_number: int
) -> None:
    series = Series(phantom(), tags=NO_UIDS)
    _numbered(tmp_path, series, suffix="a")
    _numbered(tmp_path, second(replace(series, voxels=phantom(1))), first_number, suffix="b")
    if second is _beyond and first_number == 19:
        # One stack, one run of numbers: nothing but the pixels could tell that these were two.
        assert read_source(tmp_path, only_source(tmp_path)).voxels.shape[2] == 36
    else:
        reason, detail = _rejected(tmp_path)
        assert reason == Reason.MIXED_SERIES
        assert "no series UID" in detail


@pytest.mark.parametrize("number", [None, "", 1])
def test_without_uids_and_numbers_nothing_says_that_slices_belong_together(tmp_path: Path, number: Any) -> None:
    for path in write_series(tmp_path, Series(phantom(), tags=NO_UIDS)):
        file = pydicom.dcmread(path)
        if number is None:
            del file.InstanceNumber
        else:
            file.InstanceNumber = number
        file.save_as(path)
    assert _rejected(tmp_path)[0] == Reason.MIXED_SERIES


def test_descending_numbers_of_a_series_without_uid_are_one_run(tmp_path: Path) -> None:
    _numbered(tmp_path, Series(phantom(), tags=NO_UIDS))
    for path in tmp_path.iterdir():
        file = pydicom.dcmread(path)
        file.InstanceNumber = 500 - 2 * int(file.InstanceNumber)
        file.save_as(path)
    assert read_source(tmp_path, only_source(tmp_path)).voxels.shape[2] == 18


@pytest.mark.parametrize("length", [0x7FFFFFF0, 0xFFFFFFFE])
def test_no_more_is_read_than_the_file_has(tmp_path: Path, length: int) -> None:
    """An element that claims 4 GB would take them before its end is looked for."""
    asked = []

    class Asked(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            asked.append(size or 0)
            return super().read(size)

    (path,) = write_series(tmp_path, replace(SERIES, voxels=SERIES.voxels[:1]))
    data = path.read_bytes()
    place = data.index(b"\x10\x00\x10\x00PN")
    data = data[:place] + b"\x10\x00\x10\x00UN\0\0" + length.to_bytes(4, "little") + data[place + 8 :]
    assert read_header(Asked(data))[1] is None
    assert 1 << 10 < max(asked) < len(data)
    path.write_bytes(data)
    with pytest.raises(Rejected) as caught:
        read_series([path])
    assert caught.value.reason == Reason.UNREADABLE
