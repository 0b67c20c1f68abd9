"""DICOM headers and streams: attributes missing, absurd, doubled, in the wrong form, and data sets that never end."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from mim_scale.store.volume import Volume
from tests.pipeline.corpus.case import Case, accepted, refused
from tests.pipeline.corpus.dicom_bytes import (
    Change,
    changed,
    element,
    files_of,
    inserted,
    place_of,
    rewritten,
    series_of,
    with_number,
    with_value,
    without,
)

FAMILY = "DICOM header"
_OK = accepted("reoriented")
_TOP = b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
_SEQUENCE = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff"
_END_ITEM, _END = b"\xfe\xff\x0d\xe0\0\0\0\0", b"\xfe\xff\xdd\xe0\0\0\0\0"


def _syntax(uid: str) -> Change:
    """Another transfer syntax named, nothing else changed."""
    return with_value("TransferSyntaxUID", uid.encode() + b"\0" * (len(uid) % 2), b"UI")


def _nested(depth: int, is_closed: bool = True) -> Change:
    """Referenced images in referenced images."""
    data = (_SEQUENCE + _TOP) * depth + (_END_ITEM + _END) * (depth if is_closed else 0)
    return inserted("PatientName", data)


def _meta_length(data: bytes) -> bytes:
    return data[:140] + struct.pack("<L", 5) + data[144:]


def _missing() -> list[Case]:
    outcomes = {
        "ImagePositionPatient": refused("no_geometry"),
        "ImageOrientationPatient": refused("no_geometry"),
        "PixelSpacing": refused("no_geometry"),
        "Rows": refused("no_pixels"),
        "Columns": refused("no_pixels"),
        "Modality": refused("not_ct"),
        "BitsAllocated": refused("unreadable"),
        "BitsStored": _OK,
        "HighBit": _OK,
        "PixelRepresentation": _OK,
        "SamplesPerPixel": _OK,
        "PhotometricInterpretation": _OK,
        "SOPClassUID": _OK,
        "SOPInstanceUID": _OK,
        "SeriesInstanceUID": _OK,
        "StudyInstanceUID": _OK,
        "PatientID": _OK,
        "InstanceNumber": _OK,
        "ImageType": _OK,
        "RescaleSlope": _OK,
        "RescaleIntercept": refused("hu_implausible"),
        "PixelData": refused("no_pixels"),
        "TransferSyntaxUID": _OK,
    }
    return [Case(FAMILY, f"{name} missing", changed(without(name)), (outcome,)) for name, outcome in outcomes.items()]


def _values() -> list[Case]:
    values: list[tuple[str, bytes, str]] = [
        ("ImagePositionPatient", b"nan\\nan\\nan", "no_geometry"),
        ("ImagePositionPatient", b"0\\0", "no_geometry"),
        ("ImagePositionPatient", b"left\\right\\up", "no_geometry"),
        ("ImagePositionPatient", b"1e30\\0\\0", "no_geometry"),
        ("ImagePositionPatient", b"0\\0\\0", "repeated_positions"),
        ("ImagePositionPatient", b"", "no_geometry"),
        ("ImageOrientationPatient", b"2\\0\\0\\0\\2\\0", "no_geometry"),
        ("ImageOrientationPatient", b"0\\0\\0\\0\\0\\0", "no_geometry"),
        ("ImageOrientationPatient", b"1\\0\\0\\1\\0\\0", "no_geometry"),
        ("ImageOrientationPatient", b"1\\0\\0\\0\\1", "no_geometry"),
        ("ImageOrientationPatient", b"1\\0\\0\\0\\inf\\0", "no_geometry"),
        ("PixelSpacing", b"0\\0", "no_geometry"),
        ("PixelSpacing", b"-0.9\\0.8", "no_geometry"),
        ("PixelSpacing", b"0.9", "no_geometry"),
        ("PixelSpacing", b"1000\\1000", "spacing_implausible"),
        ("PixelSpacing", b"0.001\\0.001", "spacing_implausible"),
        ("PixelSpacing", b"0,9\\0,8 ", "no_geometry"),
        ("RescaleSlope", b"0 ", "hu_implausible"),
        ("RescaleSlope", b"inf ", "non_finite"),
        ("RescaleSlope", b"nan ", "non_finite"),
        ("RescaleSlope", b"1,0 ", "non_finite"),
        ("RescaleSlope", b"1\\2 ", "non_finite"),
        ("RescaleSlope", b"1e30", "non_finite"),
        ("RescaleIntercept", b"-2048 ", "hu_implausible"),
        ("RescaleIntercept", b"words ", "non_finite"),
        ("RescaleIntercept", b"-inf", "non_finite"),
        ("Modality", b"MR", "not_ct"),
        ("Modality", b"CANARY", "not_ct"),
        ("SOPClassUID", b"1.2.840.10008.5.1.4.1.1.7\0", "secondary_capture"),
        ("ImageType", b"ORIGINAL\\PRIMARY\\LOCALIZER ", "localizer"),
        ("ImageType", b"DERIVED\\SECONDARY\\MIP ", "derived_map"),
        ("PhotometricInterpretation", b"RGB ", "secondary_capture"),
        ("PhotometricInterpretation", b"PALETTE COLOR ", "secondary_capture"),
    ]
    shown = {value: value.decode().strip(" \0") or "empty" for _, value, _ in values}
    return [
        Case(FAMILY, f"{name} is {shown[value]}", changed(with_value(name, value)), (refused(reason),))
        for name, value, reason in values
    ]


def _numbers() -> list[Case]:
    numbers: list[tuple[str, int, str]] = [
        ("Rows", 0, "no_pixels"),
        ("Rows", 65535, "unreadable"),
        ("Rows", 33, "unreadable"),
        ("Rows", 31, "unreadable"),
        ("Columns", 35, "unreadable"),
        ("BitsStored", 0, "unreadable"),
        ("BitsStored", 32, "unreadable"),
        ("BitsStored", 8, "hu_implausible"),
        ("BitsAllocated", 8, "unreadable"),
        ("BitsAllocated", 32, "unreadable"),
        ("BitsAllocated", 17, "unreadable"),
        ("SamplesPerPixel", 3, "secondary_capture"),
    ]
    frames = element("NumberOfFrames", b"5 ", b"IS")
    return [
        *(
            Case(FAMILY, f"{name} is {value}", changed(with_number(name, value)), (refused(reason),))
            for name, value, reason in numbers
        ),
        Case(FAMILY, "HighBit lies", changed(with_number("HighBit", 11)), (_OK,)),
        Case(FAMILY, "five frames said, one there", changed(inserted("Rows", frames)), (refused("multi_frame"),)),
        Case(FAMILY, "one frame, said so", changed(inserted("Rows", frames.replace(b"5 ", b"1 "))), (_OK,)),
        Case(FAMILY, "a type of rescale that is no HU", changed(_rescale_type), (refused("derived_map"),)),
    ]


_rescale_type = inserted("PixelData", element("RescaleType", b"OD", b"LO"))


def _slices() -> list[Case]:
    def one(*changes: Change) -> Any:
        return changed(*changes, only={7})

    def twice(root: Path, good: Volume) -> None:
        changed()(root, good)
        (root / "again").write_bytes(files_of(series_of(good), root)[4])

    def gap(root: Path, good: Volume) -> None:
        changed()(root, good)
        (root / "IM0009").unlink()

    def moved(data: bytes) -> bytes:
        _, value, end = place_of(data, "ImagePositionPatient")
        position = data[value:end].decode().split("\\")[:2]
        return with_value("ImagePositionPatient", "\\".join([*position, "-381.4"]).encode())(data)

    cases: list[tuple[str, Any, tuple[str, ...]]] = [
        ("one slice twice, byte for byte", twice, (accepted("copies_dropped", "reoriented"),)),
        ("one slice missing", gap, (refused("missing_slices"),)),
        ("one slice out of place", one(moved), (refused("uneven_spacing"),)),
        (
            "one slice turned",
            one(with_value("ImageOrientationPatient", b"0\\1\\0\\1\\0\\0 ")),
            (refused("mixed_orientation"),),
        ),
        (
            "one slice of another pixel spacing",
            one(with_value("PixelSpacing", b"0.9\\0.9 ")),
            (refused("mixed_sizes"),),
        ),
        ("one slice without a position", one(without("ImagePositionPatient")), (refused("no_geometry"),)),
        ("one slice without pixels", one(without("PixelData")), (refused("missing_slices"),)),
        ("one slice with an intercept of its own", one(with_value("RescaleIntercept", b"-1024.0")), (_OK,)),
        (
            "one slice of another modality",
            one(with_value("Modality", b"MR")),
            (refused("not_ct"), refused("missing_slices")),
        ),
        ("one slice empty", one(lambda data: b""), (refused("missing_slices"), refused("unreadable"))),
        ("one slice of zeros", one(lambda data: bytes(len(data))), (refused("missing_slices"), refused("unreadable"))),
        (
            "one slice only",
            lambda root, good: (root / "IM").write_bytes(files_of(series_of(good), root)[0]),
            (refused("too_few_slices"),),
        ),
    ]
    return [Case(FAMILY, name, write, tuple(sorted(outcomes))) for name, write, outcomes in cases]


def _streams() -> list[Case]:
    def to(uid: Any, is_implicit: bool = False) -> Change:
        def edit(file: pydicom.Dataset) -> None:
            file.file_meta.TransferSyntaxUID = uid
            if uid == ExplicitVRBigEndian:
                file.PixelData = np.frombuffer(file.PixelData, "<i2").byteswap().tobytes()

        return rewritten(edit, is_implicit, uid != ExplicitVRBigEndian)

    private = b"\x09\x00\x10\x00LO\x06\x00CANARY" + b"\x09\x00\x01\x10UN\0\0\x04\0\0\0\xff\xfe\xfd\xfc"
    text = b"\x08\x00\x05\x00CS\x0a\x00ISO_IR 999"
    cases: list[tuple[str, Change, str]] = [
        ("implicit little endian", to(ImplicitVRLittleEndian, is_implicit=True), _OK),
        ("explicit big endian", to(ExplicitVRBigEndian), _OK),
        ("deflated", to(DeflatedExplicitVRLittleEndian), _OK),
        ("no preamble and no file meta", lambda data: data[place_of(data, "ImageType")[0] :], _OK),
        ("junk in the preamble", lambda data: b"II*\0" + b"\xff" * 124 + data[128:], _OK),
        ("length of the file meta lies", _meta_length, _OK),
        ("implicit said, explicit written", _syntax("1.2.840.10008.1.2"), _OK),
        ("big endian said, little endian written", _syntax("1.2.840.10008.1.2.2"), refused("no_pixels")),
        ("deflated said, plain written", _syntax("1.2.840.10008.1.2.1.99"), refused("unreadable")),
        ("JPEG 2000 said, plain pixels", _syntax("1.2.840.10008.1.2.4.90"), refused("unreadable")),
        ("RLE said, plain pixels", _syntax("1.2.840.10008.1.2.5"), refused("unreadable")),
        ("a transfer syntax that nobody knows", _syntax("1.2.3.4.5"), refused("unreadable")),
        ("MPEG said", _syntax("1.2.840.10008.1.2.4.100"), refused("unreadable")),
        ("private elements", inserted("PatientName", private), _OK),
        ("character set unknown", inserted("ImageType", text), _OK),
        ("a name in no character set", with_value("PatientName", b"\xff\xfe\x80\x81CANARY\x1b$B"), _OK),
        ("PixelSpacing as text", with_value("PixelSpacing", b"0.9\\0.8 ", b"LO"), _OK),
        ("PixelSpacing of unknown VR", with_value("PixelSpacing", b"0.9\\0.8 ", b"UN"), _OK),
        ("PixelSpacing of a VR that is none", with_value("PixelSpacing", b"0.9\\0.8 ", b"ZZ"), refused("no_geometry")),
        ("Rows in 32 bits", with_value("Rows", struct.pack("<L", 32), b"UL"), _OK),
        ("a value of odd length", with_value("PixelSpacing", b"0.9\\0.8"), _OK),
        ("an element twice", inserted("Rows", element("PatientID", b"CANARY", b"LO")), _OK),
        (
            "a length far beyond the file",
            inserted("PatientName", b"\x10\0\x10\0UN\0\0\xf0\xff\xff\x7f"),
            refused("unreadable"),
        ),
        ("sequences in sequences, 100 deep", _nested(100), _OK),
        ("sequences in sequences, 5000 deep", _nested(5000), refused("unreadable")),
        ("a sequence that never ends", _nested(1, is_closed=False), refused("unreadable")),
        ("padding behind the pixels", lambda data: data + b"\xfc\xff\xfc\xffOB\0\0\x08\0\0\0" + bytes(8), _OK),
        ("junk behind the pixels", lambda data: data + b"junk" * 50, _OK),
    ]
    # Where nothing of a header can be read, nothing says which files belong together.
    alone = {"deflated said, plain written", "a length far beyond the file", "a sequence that never ends"}
    alone |= {"sequences in sequences, 5000 deep"}
    return [
        Case(FAMILY, name, changed(change), (outcome,) * (18 if name in alone else 1))
        for name, change, outcome in cases
    ]


CASES = [*_missing(), *_values(), *_numbers(), *_slices(), *_streams()]
