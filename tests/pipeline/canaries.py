"""An archive with a canary in every place that can hold a name, and a search for canaries in what came out of it."""

import gzip
import hashlib
import io
import itertools
import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pydicom
import pydicom.config
import SimpleITK as sitk
from pydicom.datadict import DicomDictionary, keyword_for_tag
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import JPEG2000Lossless

from tests.pipeline.sources import Series, phantom, write_image, write_series

WORD = "ZQXCANARY"
DATE = "18490713"
TIME = "235947.131719"
UID = "1.2.826.0.1.7777777.913"
PATIENT = f"{WORD}-PID"
NEEDLES = (WORD, DATE, TIME, UID, "1849-07-13")
_GROUPS = {0x0008, 0x0010, 0x0012, 0x0018, 0x0020, 0x0028, 0x0032, 0x0038, 0x0040, 0x0088, 0x0400, 0x4008}
_VALUES = {"DA": DATE, "TM": TIME, "DT": DATE + TIME, "UI": UID, "AS": "077Y"}
_TEXTS = {"PN": "{}^{}", "LO": "{}{}", "SH": "{}{:.4}", "LT": "{}\r\n{}", "ST": "{} {}", "UT": "{} {}", "UC": "{} {}"}
_TEXTS |= {"AE": "{}{:.4}", "CS": "{}{:.4}", "UR": "http://{}/{}"}
_MEANT = {"SpecificCharacterSet", "ImageType", "SOPClassUID", "Modality", "PhotometricInterpretation", "RescaleType"}
_MEANT |= {"FrameType", "SOPInstanceUID", "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "VolumetricProperties"}
_MEANT |= {"VolumeBasedCalculationTechnique", "PixelPresentation", "TimezoneOffsetFromUTC", "LossyImageCompression"}
"""Attributes that decide whether an image is read: they get their canaries in inputs that are refused for it."""


def plant(data: Dataset) -> int:
    """Put a canary into every attribute of text, time or UID that is not needed; returns how many."""
    count = 0
    for tag, (vr, multiplicity, _, is_retired, keyword) in DicomDictionary.items():
        if (
            tag >> 16 not in _GROUPS
            or multiplicity not in {"1", "1-n"}
            or is_retired
            or keyword in _MEANT
            or not keyword
        ):
            continue
        if vr in _VALUES or vr in _TEXTS:
            value = _VALUES.get(vr) or _TEXTS[vr].format(WORD, keyword_for_tag(tag))
            value = value[:16] if vr in {"SH", "AE", "CS"} else value[:64]
            data.add(DataElement(tag, vr, value, validation_mode=pydicom.config.IGNORE))
            count += 1
    return count


def add_nested(data: Dataset) -> None:
    """Canaries in sequences, private blocks, overlays and the file's own header."""
    inner = Dataset()
    inner.PatientID, inner.PatientName, inner.CodeMeaning = f"{WORD}-NEST", f"{WORD}^NEST", f"{WORD} meaning"
    inner.StudyDate, inner.ReferencedSOPInstanceUID = DATE, UID
    outer = Dataset()
    outer.CodeMeaning, outer.RequestedProcedureDescription = f"{WORD} outer", f"{WORD} outer"
    outer.RequestAttributesSequence = Sequence([inner])
    for name in ("RequestAttributesSequence", "OtherPatientIDsSequence", "ContrastBolusAgentSequence"):
        setattr(data, name, Sequence([outer, inner]))
    data.AnatomicRegionSequence = Sequence([outer])
    for group in (0x0009, 0x0019, 0x0029):
        block = data.private_block(group, f"{WORD} CREATOR", create=True)
        block.add_new(0x01, "LO", f"{WORD} private")
        block.add_new(0x02, "UN", f"{WORD} raw".encode())
        block.add_new(0x03, "SQ", Sequence([inner]))
    data.add_new(0x60001500, "LO", f"{WORD} overlay")
    data.add_new(0x60004000, "LT", f"{WORD} overlay comment")
    data.file_meta.SourceApplicationEntityTitle = f"{WORD}AET"[:16]
    data.file_meta.ImplementationVersionName = f"{WORD}V"[:16]
    data.file_meta.PrivateInformationCreatorUID, data.file_meta.PrivateInformation = UID, f"{WORD} meta ".encode()
    data.preamble = (WORD * 20).encode()[:128]


def write_archive(root: Path) -> int:
    """Good and broken inputs of every format; returns how many DICOM attributes hold a canary."""
    with warnings.catch_warnings():
        # pydicom says, with its value, what it finds odd.
        warnings.simplefilter("ignore")
        return _write_archive(root)


def _write_archive(root: Path) -> int:
    folder = root / f"{WORD}^FOLDER" / f"{WORD}_{DATE}"
    count = _dicom_good(folder / "good")
    _dicom_broken(folder)
    _volume_files(root, folder)
    _broken_files(folder)
    _descriptions(root)
    return count


def _each(paths: Iterable[Path]) -> Iterator[Dataset]:
    """Open, let the caller change, write back."""
    for path in paths:
        data = pydicom.dcmread(path)
        yield data
        data.save_as(path)


def _series(folder: Path, seed: int, **tags: Any) -> list[Path]:
    uid = f"{UID}.{seed}"
    tags = {"PatientID": PATIENT, "PatientName": f"{WORD}^{WORD}", "StudyInstanceUID": f"{UID}.9{seed}"} | tags
    paths = write_series(folder, Series(phantom(seed), uid=uid, tags=tags))
    return [path.rename(path.with_name(f"{WORD}{index}")) for index, path in enumerate(paths)]


def _dicom_good(folder: Path) -> int:
    count = 0
    for data in _each(_series(folder, 1)):
        count = plant(data)
        add_nested(data)
    return count


def _dicom_broken(folder: Path) -> None:
    values = {
        "modality": {"Modality": f"{WORD}M"},
        "type": {"ImageType": ["ORIGINAL", "PRIMARY", f"{WORD}T"], "RescaleType": f"{WORD}R"},
        "class": {"SOPClassUID": UID},
        "colour": {"PhotometricInterpretation": f"{WORD}P"},
        "letters": {"SpecificCharacterSet": f"{WORD}C"},
        "map": {"ImageType": ["DERIVED", f"{WORD}2", "MIP"]},
        "size": {"Rows": None},
    }
    for seed, (name, tags) in enumerate(values.items(), start=10):
        _series(folder / f"{WORD}-{name}", seed, **tags)
    for path in _series(folder / "cut", 30):
        path.write_bytes(path.read_bytes()[:-400])
    for data in _each(_series(folder / "codec", 31)):
        data.PixelData = encapsulate([b"\xff\x4f\xff\x51" + WORD.encode() * 20])
        data["PixelData"].VR = "OB"
        data.file_meta.TransferSyntaxUID = JPEG2000Lossless
    for data in _each(_series(folder / "syntax", 32)):
        data.file_meta.TransferSyntaxUID = f"{UID}.4"
    attributes = ("KVP", "SliceThickness", "ImagePositionPatient", "PixelSpacing", "RescaleSlope", "InstanceNumber")
    for seed, name in enumerate((*attributes, "ImageOrientationPatient", "SeriesNumber"), start=40):
        _words_for_numbers(_series(folder / "numbers" / name, seed), name)
    (folder / f"{WORD}.dcm").write_bytes(b"\0" * 128 + b"DICM" + WORD.encode() * 50)
    (folder / f"{WORD}-empty.dcm").write_bytes(b"")


def _words_for_numbers(paths: list[Path], name: str) -> None:
    """Text where numbers belong: pydicom refuses to write it, so it is put into the bytes."""
    marks = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}
    number = "314159265" if name in {"InstanceNumber", "SeriesNumber"} else "3.1415926"
    for data in _each(paths):
        setattr(data, name, [number] * marks[name] if name in marks else number)
    for path in paths:
        path.write_bytes(path.read_bytes().replace(number.encode(), WORD.encode()))


def _volume_files(root: Path, folder: Path) -> None:
    plain = write_image(root / "plain.nii.gz", phantom(2))
    image = nib.load(plain)
    voxels = np.asarray(image.dataobj)
    plain.unlink()
    header = image.header
    header["descrip"], header["aux_file"], header["intent_name"] = f"{WORD} {DATE}", f"{WORD}.aux", f"{WORD}I"
    header["db_name"], header["data_type"] = f"{WORD}DB", WORD
    for code in (2, 4, 6):
        header.extensions.append(nib.nifti1.Nifti1Extension(code, f"{WORD} extension {UID}".encode()))
    subject = root / f"sub-{WORD}" / "ses-1" / "ct"
    subject.mkdir(parents=True)
    nib.save(nib.Nifti1Image(voxels, image.affine, header), subject / f"sub-{WORD}_ct.nii.gz")
    for seed, name in ((3, f"{WORD}.nrrd"), (4, f"{WORD}.mha")):
        path = folder / name
        picture = sitk.GetImageFromArray(phantom(seed))
        for key in ("patient", "Comment", "NRRD_content", "AcquisitionDate", "Name"):
            picture.SetMetaData(key, f"{WORD} {DATE}")
        sitk.WriteImage(picture, str(path))
        raw = path.read_bytes()
        if name.endswith(".nrrd"):
            first, rest = raw.split(b"\n", 1)
            mark = f"\n# {WORD} comment\nkey {WORD}:={WORD}\n".encode()
            path.write_bytes(first + mark + rest)


def _broken_files(folder: Path) -> None:
    good = gzip.compress(WORD.encode() * 100)
    (folder / f"{WORD}-cut.nii.gz").write_bytes(good[:40])
    (folder / f"{WORD}-words.nii").write_bytes(WORD.encode() * 200)
    header = nib.Nifti1Header()
    header.set_data_shape((4, 4, 4))
    header["descrip"], header["datatype"] = WORD, 4444
    (folder / f"{WORD}-type.nii").write_bytes(header.binaryblock + b"\0" * 400)
    (folder / f"{WORD}-a.nrrd").write_text(f"NRRD0004\ntype: {WORD}\ndimension: 3\nsizes: 4 4 4\nencoding: {WORD}\n\n")
    (folder / f"{WORD}-b.nhdr").write_text(
        "NRRD0004\ntype: short\ndimension: 3\nsizes: 4 4 4\nendian: little\nencoding: raw\nspace: scanner-xyz\n"
        f"space directions: ({WORD},0,0) (0,1,0) (0,0,1)\ndata file: {WORD}.raw\n"
    )
    meta = (
        "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = {}\nElementSpacing = {}\nElementDataFile = {}\n"
    )
    (folder / f"{WORD}-c.mha").write_text(meta.format(f"MET_{WORD}", "1 1 1", "LOCAL"))
    (folder / f"{WORD}-d.mhd").write_text(meta.format("MET_SHORT", "1 1 1", f"../{WORD}.raw"))
    (folder / f"{WORD}-e.mhd").write_text(meta.format("MET_SHORT", f"1 {WORD} 1", f"{WORD}.raw"))


def _descriptions(root: Path) -> None:
    lines = f"participant_id\tname\tbirth\nsub-{WORD}\t{WORD} Jane\t1849-07-13\n"
    (root / "participants.tsv").write_text(lines)
    notes = {"Name": WORD, "BIDSVersion": "1.8.0", "Authors": [WORD]}
    (root / "dataset_description.json").write_text(json.dumps(notes))


def digests() -> set[str]:
    """What a name becomes without a key: whoever has a list of names can find it again."""
    texts = [
        PATIENT,
        f"\n{PATIENT}",
        f"mim-scale subject\npatient\n{PATIENT}",
        f"mim-scale subject\npatient\n\n{PATIENT}",
    ]
    for seed in range(1, 60):
        series, study = f"{UID}.{seed}", f"{UID}.9{seed}"
        texts += [series, study, f"{study}\n{PATIENT}\n{series}"]
    kinds = (hashlib.sha256, hashlib.sha1, hashlib.md5)
    return {kind(text.encode()).hexdigest()[:16] for kind, text in itertools.product(kinds, texts)}


def found_in(data: bytes) -> set[str]:
    """Canaries in bytes: as text of one or two bytes a sign, in any case, or as digests without a key."""
    lower = data.lower()
    forms = {needle: (needle.lower().encode(), needle.lower().encode("utf-16-le")) for needle in NEEDLES}
    hits = {needle for needle, spellings in forms.items() if any(form in lower for form in spellings)}
    return hits | {f"digest {digest}" for digest in digests() if digest.encode() in lower}


def found_below(root: Path) -> dict[str, set[str]]:
    """Canaries in names and contents below a folder, Parquet unpacked."""
    hits: dict[str, set[str]] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        data = name.encode("utf-8", "surrogateescape")
        if path.is_file():
            raw = path.read_bytes()
            data += b"\n" + raw
            if raw[:4] == b"PAR1":
                table = pq.read_table(io.BytesIO(raw))
                data += repr((table.schema.metadata, table.to_pylist())).encode()
            elif raw[:2] == b"\x1f\x8b":
                data += gzip.decompress(raw)
        if hit := found_in(data):
            hits[name] = hit
    return hits
