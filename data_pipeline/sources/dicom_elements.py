"""The wanted elements of an ordinary DICOM header, picked out in one pass over its first bytes (PS3.5 section 7).

An archive has millions of headers, each of a hundred elements of which twenty are asked for. Anything out of the
ordinary is not judged here but left to pydicom, and what is picked out is what pydicom would have picked out.
"""

from collections.abc import Collection
from struct import Struct
from typing import BinaryIO

from pydicom.charset import convert_encodings, default_encoding
from pydicom.dataelem import RawDataElement, convert_raw_data_element, empty_value_for_VR
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import BaseTag
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32, VR

_FIRST_BYTES = (1 << 15, 1 << 18)
"""Of a file: most headers end within the first count, those with a vendor's private blocks within the second."""

_PREAMBLE = 132
_CHARACTER_SET = 0x00080005
_TRANSFER_SYNTAX = 0x00020010
_PIXEL_DATA = 0x7FE00010
_OTHER_PIXELS = frozenset({0x7FE00008, 0x7FE00009})
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
_DEEPEST = 16
_VRS = {vr.value.encode(): vr.value for vr in VR if len(vr.value) == 2}
_LONG_VRS = frozenset(vr.encode() for vr in EXPLICIT_VR_LENGTH_32)
_SHORT_VRS = frozenset(_VRS) - _LONG_VRS
_SHORT = Struct("<HH2sH").unpack_from
_LONG = Struct("<HHL").unpack_from
_LENGTH = Struct("<L").unpack_from

_Found = tuple[int, str | None, int, int]
"""Tag, VR, length of the value and where it begins."""


class _Unusual(Exception):
    """Not for this module."""


class _Short(_Unusual):
    """The header goes on behind the bytes that were read."""


def pick_elements(file: BinaryIO, only: Collection[int]) -> tuple[Dataset, int] | None:
    """The wanted elements before the pixels, and where the element of the pixels begins.

    Args:
        file: at its start.
        only: tags of the wanted elements; the character set always comes with them.

    Returns:
        None where the header is anything but ordinary.
    """
    data = b""
    for size in _FIRST_BYTES:
        data += file.read(size - len(data))
        try:
            return _pick(data, only)
        except _Short:
            if len(data) < size:
                return None
        except Exception:
            # Whatever is odd in it, pydicom judges.
            return None
    return None


def _pick(data: bytes, only: Collection[int]) -> tuple[Dataset, int]:
    if data[128:_PREAMBLE] != b"DICM":
        raise _Unusual
    meta, place = _meta(data)
    syntax = meta.get("TransferSyntaxUID")
    if not syntax or syntax in {DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian} or syntax.is_private:
        raise _Unusual
    is_implicit = syntax == ImplicitVRLittleEndian
    picked, place = _picked(data, place, is_implicit, {*only, _CHARACTER_SET})
    header = Dataset(picked)
    encoding = default_encoding
    if _CHARACTER_SET in picked:
        encoding = convert_encodings(convert_raw_data_element(picked[BaseTag(_CHARACTER_SET)]).value)
    header.set_original_encoding(is_implicit, True, encoding)
    header.file_meta = meta
    return header, place


def _meta(data: bytes) -> tuple[FileMetaDataset, int]:
    """The file meta elements, and where what follows them begins."""
    place = _PREAMBLE
    found: dict[BaseTag, RawDataElement] = {}
    while data[place + 1 : place + 2] == b"\0" and data[place] == 2:
        tag, vr, length, start = _element(data, place, is_implicit=False)
        place = start + length
        found[BaseTag(tag)] = _raw(data, tag, vr, length, start, is_implicit=False)
    if data[place : place + 2] == b"\0\0":
        # A command set, as of network messages.
        raise _Unusual
    return FileMetaDataset(found), place


def _picked(
    data: bytes, place: int, is_implicit: bool, wanted: Collection[int]
) -> tuple[dict[BaseTag, RawDataElement], int]:
    picked: dict[BaseTag, RawDataElement] = {}
    end = len(data) - 12
    stops = {*wanted, _PIXEL_DATA, *_OTHER_PIXELS, _ITEM, _ITEM_END, _SEQUENCE_END}
    while True:
        # Most elements are short ones that nobody asked for: they are passed over in as few steps as can be.
        while not is_implicit and place <= end:
            group, element, name, length = _SHORT(data, place)
            if name not in _SHORT_VRS or group << 16 | element in stops:
                break
            place += 8 + length
        tag, vr, length, start = _element(data, place, is_implicit)
        if tag == _PIXEL_DATA:
            return picked, place
        if tag in _OTHER_PIXELS or tag >> 16 == 0xFFFE:
            raise _Unusual
        if length == _UNDEFINED:
            if tag in wanted:
                raise _Unusual
            place = _after_sequence(data, start, vr, is_implicit)
            continue
        place = start + length
        if tag in wanted:
            picked[BaseTag(tag)] = _raw(data, tag, vr, length, start, is_implicit)


def _element(data: bytes, place: int, is_implicit: bool) -> _Found:
    if place + 12 > len(data):
        raise _Short
    if is_implicit:
        group, element, length = _LONG(data, place)
        # A VR where a length should be: the transfer syntax is not the one that the file names.
        if data[place + 4 : place + 6].isalpha():
            raise _Unusual
        return group << 16 | element, None, length, place + 8
    group, element, name, length = _SHORT(data, place)
    if group == 0xFFFE:
        return group << 16 | element, None, _LENGTH(data, place + 4)[0], place + 8
    vr = _VRS.get(name)
    if vr is None:
        raise _Unusual
    if name not in _LONG_VRS:
        return group << 16 | element, vr, length, place + 8
    return group << 16 | element, vr, _LENGTH(data, place + 8)[0], place + 12


def _raw(data: bytes, tag: int, vr: str | None, length: int, start: int, is_implicit: bool) -> RawDataElement:
    if start + length > len(data):
        raise _Short
    value = data[start : start + length] if length else empty_value_for_VR(vr, raw=True)
    return RawDataElement(BaseTag(tag), vr, length, value, start, is_implicit, True)


def _after_sequence(data: bytes, place: int, vr: str | None, is_implicit: bool, depth: int = 0) -> int:
    """Where a sequence of undefined length ends."""
    if depth > _DEEPEST or vr not in {None, "SQ"}:
        raise _Unusual
    while True:
        tag, _, length, start = _element(data, place, is_implicit)
        if tag == _SEQUENCE_END:
            return start
        if tag != _ITEM:
            raise _Unusual
        place = start + length if length != _UNDEFINED else _after_item(data, start, is_implicit, depth)


def _after_item(data: bytes, place: int, is_implicit: bool, depth: int) -> int:
    while True:
        tag, vr, length, start = _element(data, place, is_implicit)
        if tag == _ITEM_END:
            return start
        if tag >> 16 == 0xFFFE:
            raise _Unusual
        place = start + length if length != _UNDEFINED else _after_sequence(data, start, vr, is_implicit, depth + 1)
