"""Headers read in one pass say what pydicom says of them, whatever is in the file; what they cannot say they leave."""

import contextlib
import functools
import io
from pathlib import Path
from typing import Any

import pydicom
import pydicom.data
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file

from data_pipeline.sources import dicom_read, dicom_series
from data_pipeline.sources.dicom_elements import pick_elements
from data_pipeline.sources.dicom_header import _plain_value, numbers, text, whole

FILES = sorted((Path(pydicom.data.__file__).parent / "test_files").glob("*.dcm"))
WANTED = sorted({*dicom_series._HEADER, *dicom_read._SLICE})
ORDINARY = ("CT_small.dcm", "MR_small_implicit.dcm", "JPEG2000.dcm", "nested_priv_SQ.dcm", "liver_1frame.dcm")


def _by_pydicom(data: bytes) -> tuple[Any, int]:
    file = io.BytesIO(data)
    header = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=WANTED)
    return header, file.tell()


def _check(data: bytes) -> bool:
    """Whether the quick way was taken; then it must have found what pydicom finds."""
    found = pick_elements(io.BytesIO(data), WANTED)
    if found is None:
        return False
    header, start = found
    oracle, place = _by_pydicom(data)
    assert start == place
    assert data[start : start + 4] == b"\xe0\x7f\x10\x00"
    assert _raw(header) == _raw(oracle)
    assert header.file_meta.get("TransferSyntaxUID") == oracle.file_meta.get("TransferSyntaxUID")
    assert header.original_encoding == oracle.original_encoding
    assert header.original_character_set == oracle.original_character_set
    return True


def _raw(header: Any) -> dict[int, Any]:
    """The elements as they lie in the file, but for the character set, which pydicom has decoded by now."""
    return {int(tag): header.get_item(tag) for tag in header.keys() if tag != 0x00080005}  # noqa: SIM118  # undecoded


@functools.cache
def _ordinary() -> tuple[bytes, ...]:
    found = []
    for name in ORDINARY:
        path = get_testdata_file(name, download=False)
        assert path is not None
        data = Path(path).read_bytes()
        start = _by_pydicom(data)[1]
        # Nothing behind the pixels' own element matters here.
        found.append(data[: start + 64].ljust(start + 64, b"\0"))
    return tuple(found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_it_picks_is_what_pydicom_reads(path: Path) -> None:
    _check(path.read_bytes())


def test_ordinary_headers_take_the_quick_way() -> None:
    for name, data in zip(ORDINARY, _ordinary(), strict=True):
        assert _check(data), name


def test_a_header_longer_than_the_first_bytes_takes_the_quick_way() -> None:
    (data, *_) = _ordinary()
    header = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)
    header.add_new(0x00290010, "LO", "VENDOR")
    header.add_new(0x00291010, "OB", bytes(100_000))
    file = io.BytesIO()
    header.save_as(file)
    assert _check(file.getvalue() + data[-64:])


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_a_damaged_header_is_left_to_pydicom_or_read_alike(drawn: st.DataObject) -> None:
    data = bytearray(_ordinary()[drawn.draw(st.integers(0, len(ORDINARY) - 1))])
    for _ in range(drawn.draw(st.integers(0, 3))):
        place = drawn.draw(st.integers(0, len(data) - 1))
        data[place] = drawn.draw(st.one_of(st.integers(0, 255), st.sampled_from([0, 0xFF, 0xFE, 0xE0, 0x7F])))
    cut = drawn.draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))
    with contextlib.suppress(NotImplementedError):
        _check(bytes(data[:cut]))


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["PixelSpacing", "ImagePositionPatient", "RescaleSlope", "SeriesInstanceUID", "Modality", "Rows"]),
    st.one_of(
        st.binary(max_size=40),
        st.from_regex(rb"[-+0-9.eE\\ ]{0,30}", fullmatch=True),
        st.from_regex(rb"[A-Z .0\0]{0,9}"),
    ),
)
def test_values_are_those_that_pydicom_decodes(name: str, raw: bytes) -> None:
    (data, *_) = _ordinary()
    quick, slow = (_with(data, name, raw) for _ in range(2))
    for tag in list(slow.keys()):
        with contextlib.suppress(Exception):
            slow[tag]
    plain = _plain_value(quick, name)
    if plain is None:
        return
    count = len(plain) if isinstance(plain, tuple) else 1
    assert numbers(quick, name, count) == numbers(slow, name, count)
    assert whole(quick, name) == whole(slow, name)
    if not isinstance(plain, float | tuple):
        assert text(quick, name) == text(slow, name)


def _with(data: bytes, name: str, raw: bytes) -> Any:
    """A header whose attribute has these bytes for a value, not yet decoded."""
    header, _ = _by_pydicom(data)
    tag = pydicom.tag.Tag(name)
    element = header.get_item(tag)
    header._dict[tag] = element._replace(value=raw, length=len(raw))
    return header


def test_letters_of_another_alphabet_are_decoded() -> None:
    (data, *_) = _ordinary()
    header = _with(data, "PatientID", "\u5c71\u7530".encode("iso2022_jp"))
    header[0x00080005].value = ["", "ISO 2022 IR 87"]
    header.set_original_encoding(False, True, pydicom.charset.convert_encodings(["", "ISO 2022 IR 87"]))
    assert text(header, "PatientID") == "\u5c71\u7530"


def test_an_element_that_nobody_can_decode_is_as_none() -> None:
    (data, *_) = _ordinary()
    header, _ = _by_pydicom(data)
    tag = pydicom.tag.Tag("Modality")
    header._dict[tag] = header.get_item(tag)._replace(VR="XX", value=b"", length=0)
    assert text(header, "Modality") == ""
