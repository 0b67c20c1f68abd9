"""Nobody is named: what leaves a header, under which key, and which images may show a face."""

import json
import os
import pickle
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from data_pipeline import vocabulary
from data_pipeline.deidentify import (
    Acquisition,
    Identity,
    PseudonymKey,
    acquisition_of_dicom,
    deidentification_record,
    face_risk,
)
from data_pipeline.pseudonym_key import VARIABLE, load_key, own_key_path
from mim_scale.errors import SourceError
from mim_scale.store.volume import Volume
from tests.pipeline import canaries

ROOT = Path(__file__).parents[2]


def _header(**values: object) -> Dataset:
    data = Dataset()
    for name, value in values.items():
        setattr(data, name, value)
    return data


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GE MEDICAL SYSTEMS", "GE"),
        ("Siemens Healthineers", "Siemens"),
        ("Philips Medical Systems, Inc.", "Philips"),
        ("TOSHIBA_MEC", "Toshiba"),
        ("Canon Medical Systems", "Canon"),
        ("United Imaging Healthcare", "United Imaging"),
        ("GERRIT", "other"),
        (canaries.WORD, "other"),
        (" ", ""),
    ],
)
def test_makers(text: str, expected: str) -> None:
    assert vocabulary.manufacturer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("LightSpeed16", "LightSpeed 16"),
        ("LightSpeed QX/i", "LightSpeed QX/i"),
        ("Discovery CT750 HD", "Discovery CT750 HD"),
        ("SOMATOM Definition AS+", "SOMATOM Definition AS+"),
        ("SOMATOM go.Top", "SOMATOM go Top"),
        ("Biograph40_mCT 4R", "Biograph 40 mCT"),
        ("Emotion 16 (2010)", "Emotion 16"),
        ("iCT 256", "iCT 256"),
        ("IQon - Spectral CT", "IQon Spectral CT"),
        ("Aquilion/CX", "Aquilion CX"),
        ("uCT760", "uCT 760"),
        ("Eclipse 1.5T", "other"),
        (canaries.WORD, "other"),
        # Anything beside a known name is left behind: words, dates in pieces, serial numbers.
        (f"LightSpeed {canaries.WORD} 19560304", "LightSpeed"),
        ("LightSpeed 12/8/64", "LightSpeed 12"),
        ("Mr. Miller", "other"),
        ("", ""),
    ],
)
def test_models(text: str, expected: str) -> None:
    assert vocabulary.model(text) == expected


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        *(([name], name) for name in ("STANDARD", "BONEPLUS", "STD+", "SOFT TISSUE", "B30f", "Br40d", "Hr38", "D30s")),
        *(([name], name) for name in ("C", "YA", "EB", "FC01", "FC86", "FC08-H", "B_SOFT_B", "11")),
        (["I31f", "3"], "I31f\\3"),
        ([" Br38f ", ""], "Br38f"),
        ([], ""),
        *(
            (parts, "other")
            for parts in ([canaries.WORD], ["12", "08", "64"], ["19560304"], ["JD56"], ["Br38f", "DOE"])
        ),
    ],
)
def test_kernels(parts: list[str], expected: str) -> None:
    assert vocabulary.kernel(parts) == expected


def test_words_of_models_are_spelt_in_one_way() -> None:
    words = vocabulary._FAMILIES | vocabulary._VARIANTS
    assert len({word.upper() for word in words}) == len(words)


@pytest.mark.parametrize(
    "text", ["CT Schädel nativ", "TÊTE", "cráneo", "HEAD_NECK", "1A PLAIN HEAD", "头部CT", "C-Spine"]
)
def test_words_for_heads(text: str) -> None:
    assert vocabulary.names_head(text)
    assert acquisition_of_dicom(_header(ProtocolName=text)).flags == ("face_likely",)


@pytest.mark.parametrize("text", ["CT CHEST", "CT CAP W CONTRAST", "Abdomen", "PARTIALBODY", "INTERFACE", ""])
def test_words_for_other_parts(text: str) -> None:
    assert not vocabulary.names_head(text)


def test_an_acquisition_is_what_the_list_allows() -> None:
    header = _header(
        Manufacturer="SIEMENS",
        ManufacturerModelName="Sensation 64",
        ConvolutionKernel=["I31f", "3"],
        SliceThickness="1.5",
        KVP="120",
        ContrastBolusAgent=f"{canaries.WORD} 370",
        BodyPartExamined="CHEST",
        PatientName=canaries.WORD,
    )
    expected = Acquisition("Siemens", "Sensation 64", "I31f\\3", 1.5, 120.0, ("contrast_agent",))
    assert acquisition_of_dicom(header) == expected


def test_canaries_in_every_attribute_leave_flags_alone() -> None:
    header = Dataset()
    count = canaries.plant(header)
    assert count > 200
    acquisition = acquisition_of_dicom(header)
    assert (acquisition.manufacturer, acquisition.model, acquisition.kernel) == ("other", "other", "other")
    assert not canaries.found_in(repr(acquisition).encode())


@pytest.mark.parametrize(("name", "value"), [("SliceThickness", "650.2"), ("SliceThickness", "-1"), ("KVP", "0")])
def test_numbers_out_of_range_are_not_passed_on(name: str, value: str) -> None:
    acquisition = acquisition_of_dicom(_header(**{name: value}))
    assert (acquisition.slice_thickness_mm, acquisition.tube_kv) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"BurnedInAnnotation": "YES"}, True),
        ({"BurnedInAnnotation": "NO", "ImageType": ["DERIVED", "SECONDARY"]}, False),
        ({"ImageType": ["DERIVED", "PRIMARY", "AXIAL"]}, True),
        ({"ImageType": ["ORIGINAL", "SECONDARY"]}, True),
        ({"ConversionType": "WSD"}, True),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"]}, False),
        ({}, False),
    ],
)
def test_burned_in_text(values: dict[str, object], expected: bool) -> None:
    assert ("burned_in_text_possible" in acquisition_of_dicom(_header(**values)).flags) is expected


def test_contrast_agents_and_faces_by_code() -> None:
    code = _header(CodeMeaning="Head and Neck")
    header = _header(ContrastBolusAgentSequence=Sequence([code]), AnatomicRegionSequence=Sequence([code]))
    assert acquisition_of_dicom(header).flags == ("contrast_agent", "face_likely")
    assert acquisition_of_dicom(_header(ContrastBolusAgent="NONE", RecognizableVisualFeatures="YES")).flags == (
        "face_likely",
    )


def _grid(shape: tuple[int, int, int], mm: float) -> list[NDArray[np.float64]]:
    """Distances from the middle, in mm, along each axis."""
    return list(np.meshgrid(*(mm * (np.arange(size) - size / 2) for size in shape), indexing="ij"))


def _volume(voxels: NDArray[np.int16], mm: float) -> Volume:
    return Volume(voxels, (mm, mm, mm), np.diag([mm, mm, mm, 1.0]))


@pytest.mark.parametrize("mm", [1.0, 2.5])
def test_a_brain_in_its_skull_is_a_face_risk(mm: float) -> None:
    shape = (int(120 / mm), int(220 / mm), int(220 / mm))
    _, y, x = _grid(shape, mm)
    radius = np.hypot(y / 95, x / 75)
    head = np.select([radius < 0.9, radius < 1], [35, 900], -1000).astype(np.int16)
    assert face_risk(_volume(head, mm))
    opened = np.where((y > 0) & (np.abs(x) < 30), np.minimum(head, 60), head).astype(np.int16)
    assert not face_risk(_volume(opened, mm))


def test_an_airway_in_a_small_body_is_a_face_risk_and_a_chest_is_none() -> None:
    _, y, x = _grid((40, 200, 200), 2.5)
    for size, expected in ((60, True), (180, False)):
        body = np.hypot(y / size, x / size) < 1
        voxels = np.select([np.hypot(y - 20, x) < 10, np.hypot(y + 20, x) < 12, body], [-1000, 600, 40], -1000)
        assert face_risk(_volume(voxels.astype(np.int16), 2.5)) is expected


SHARED = Path(os.environ.get("MIM_SCALE_SHARED_DATA", ROOT.parent / "shared" / "data")) / "ct"


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real CT in MIM_SCALE_SHARED_DATA or ../shared/data")
def test_real_heads_are_found_and_real_limbs_are_not() -> None:
    from data_pipeline.canonical import canonical
    from data_pipeline.sources.nifti import read_nifti

    heads = [*sorted((SHARED / "openkbp").glob("kbp_00*_ct.nii.gz")), SHARED / "misc/dicom2stl_ct_head_26slices.nii.gz"]
    others = [*sorted((SHARED / "sts").glob("*_ct.nii.gz")), *sorted((SHARED / "misc").glob("totalseg*"))]
    for paths, expected in ((heads, True), (others, False)):
        found = {path.name: face_risk(canonical(read_nifti(path), None)[0]) for path in paths}
        assert set(found.values()) == {expected}, found


def test_an_identity_cannot_be_sent_or_shown() -> None:
    identity = Identity(canaries.WORD, canaries.UID, canaries.UID)
    assert not canaries.found_in(repr(identity).encode())
    with pytest.raises(TypeError, match="pseudonym"):
        pickle.dumps(identity)


def test_pseudonyms_depend_on_key_kind_and_name_and_on_nothing_else() -> None:
    one, other = PseudonymKey(b"1" * 32), PseudonymKey(b"2" * 32)
    values = {key.pseudonym(kind, name) for key in (one, other) for kind in "ab" for name in "xy"}
    assert len(values) == 8
    assert one.pseudonym("patient", "Ä") == PseudonymKey(b"1" * 32).pseudonym("patient", "Ä")
    assert one.check != other.check
    assert b"1111" not in repr(one).encode()


def test_the_record_says_what_was_done_and_what_was_not() -> None:
    key = PseudonymKey(b"1" * 32)
    record = deidentification_record(key)
    assert [code["code_value"] for code in record["method_codes"]] == ["113100", "113105"]
    assert [code["code_value"] for code in record["not_applied"]] == ["113101", "113102"]
    # Without clean pixels nobody may say YES (PS3.3 C.7.1.1).
    assert record["patient_identity_removed"] == "NO"
    assert record["key_check"] == key.check
    assert key.secret.hex() not in json.dumps(record)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv(VARIABLE, raising=False)
    return tmp_path


def test_the_own_key_is_made_once_for_its_owner_alone(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys: list[PseudonymKey] = []
    threads = [threading.Thread(target=lambda: keys.append(load_key())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8
    assert set(keys) == {load_key()}
    path = own_key_path()
    assert path.is_relative_to(home)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == [path.name]
    assert len(keys[0].secret) == 32
    assert capsys.readouterr() == ("", "")


def test_a_named_file_goes_before_the_variable_and_that_before_the_own_key(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        (home / name).write_text(f"{name}0" * 32 + "\n")
        (home / name).chmod(0o600)
    monkeypatch.setenv(VARIABLE, str(home / "b"))
    assert load_key(home / "a").secret[0] == 0xA0
    assert load_key().secret[0] == 0xB0
    assert not own_key_path().exists()


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        ("a0" * 32, 0o644, "chmod 600"),
        ("a0" * 32, 0o640, "chmod 600"),
        ("", 0o600, "64 hex digits"),
        ("a0" * 31, 0o600, "64 hex digits"),
        ("secret word " * 20, 0o600, "64 hex digits"),
        (None, 0o600, "cannot be read"),
    ],
)
def test_files_that_are_no_key_are_refused_in_one_line(home: Path, text: str | None, mode: int, words: str) -> None:
    path = home / "key"
    if text is not None:
        path.write_text(text)
        path.chmod(mode)
    with pytest.raises(SourceError, match=words) as error:
        load_key(path)
    assert "\n" not in str(error.value)
    assert not text or text not in str(error.value)
    assert not own_key_path().exists()
