"""Real and nasty DICOM archives end as their description demands: accepted right, or refused for the true reason."""

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from data_pipeline.build.plan import make_tasks
from data_pipeline.build.task import build_volume
from data_pipeline.canonical import canonical
from data_pipeline.deidentify import PseudonymKey
from data_pipeline.reasons import Rejected
from data_pipeline.screen import screen
from data_pipeline.sources.inventory import find_sources
from data_pipeline.sources.read import read_source
from data_pipeline.sources.source import Scan, Source
from mim_scale.config import BuildConfig
from mim_scale.store.volume import Volume
from tests.pipeline.sources import oracle

ARCHIVES = (
    Path(os.environ.get("MIM_SCALE_SHARED_DATA") or Path(__file__).parents[2].parent / "shared" / "data") / "dicom"
)
SYNTAX = "1.2.840.10008.1.2"

pytestmark = pytest.mark.skipif(
    not ARCHIVES.is_dir(),
    reason=f"the DICOM archives are not here: {ARCHIVES}; name their folder by MIM_SCALE_SHARED_DATA",
)


@pytest.fixture
def unpacked(tmp_path: Path) -> Callable[[str], Path]:
    def unpack(name: str) -> Path:
        with zipfile.ZipFile(ARCHIVES / f"{name}.zip") as archive:
            archive.extractall(tmp_path / name)
        return tmp_path / name

    return unpack


def _outcome(root: Path, source: Source, min_slices: int) -> tuple[str, str] | tuple[Volume, tuple[str, ...]]:
    try:
        volume, repairs = canonical(read_source(root, source))
        screen(volume.voxels, min_slices)
    except Rejected as rejected:
        return str(rejected.reason), rejected.detail
    return volume, repairs


def _refusals(root: Path, min_slices: int = 16) -> dict[str, tuple[str, str]]:
    """Reason and detail by the name of each source; none may be accepted."""
    outcomes = {source.name: _outcome(root, source, min_slices) for source in find_sources(root).sources}
    assert all(isinstance(outcome[0], str) for outcome in outcomes.values())
    return outcomes  # type: ignore[return-value]


def _accepted(root: Path, min_slices: int = 16) -> tuple[Volume, tuple[str, ...]]:
    (source,) = find_sources(root).sources
    volume, repairs = _outcome(root, source, min_slices)
    assert isinstance(volume, Volume), repairs
    return volume, repairs  # type: ignore[return-value]


def _scan(root: Path, name: str) -> Scan:
    return read_source(root, next(source for source in find_sources(root).sources if source.name == name))


def _assert_as_simpleitk(volume: Volume, root: Path, air: int | None = None) -> None:
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(root))
    voxels, affine = oracle([Path(name) for name in names])
    if air is not None:
        voxels[voxels == air] = -1024
    np.testing.assert_array_equal(volume.voxels, voxels)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)


def test_uncompressed_series_with_padding_is_accepted(unpacked: Callable[[str], Path]) -> None:
    root = unpacked("crlm1004_ge_liver_41slices")
    volume, repairs = _accepted(root)
    assert volume.shape == (41, 512, 512)
    np.testing.assert_allclose(volume.spacing_mm, (5, 0.796875, 0.796875), atol=1e-6)
    assert "padding_mapped" in repairs
    _assert_as_simpleitk(volume, root)


def test_badly_anonymised_jpeg_2000_series_is_accepted_with_its_overlap(unpacked: Callable[[str], Path]) -> None:
    root = unpacked("siemens_j2k_lossless_20slices")
    volume, repairs = _accepted(root)
    assert volume.shape == (20, 512, 512)
    np.testing.assert_allclose(volume.spacing_mm, (2, 0.9765625, 0.9765625), atol=1e-6)
    assert "overlapping_slices" in repairs
    images = [sitk.ReadImage(str(path)) for path in root.iterdir()]
    images.sort(key=lambda image: image.GetOrigin()[2])
    expected = np.stack([sitk.GetArrayFromImage(image)[0] for image in images])
    np.testing.assert_array_equal(volume.voxels, expected[:, ::-1, ::-1])
    np.testing.assert_allclose(images[0].GetOrigin(), (-249.51, -437.51, -804.5), atol=0.01)


def test_two_series_without_uids_in_two_folders_stay_two(unpacked: Callable[[str], Path]) -> None:
    root = unpacked("siemens_j2k_lossless_20slices")
    shutil.copytree(root, root.parent / "both" / "a")
    shutil.copytree(root, root.parent / "both" / "b")
    assert [len(source.files) for source in find_sources(root.parent / "both").sources] == [20, 20]


def test_derived_secondary_stack_is_accepted_and_recorded_or_too_thin(unpacked: Callable[[str], Path]) -> None:
    root = unpacked("crlm1006_ge_derived_secondary_8slices")
    volume, repairs = _accepted(root, min_slices=8)
    assert volume.shape == (8, 512, 512)
    assert "derived_image_type" in repairs
    ((reason, _),) = _refusals(root).values()
    assert reason == "too_few_slices"


def test_enhanced_ct_equals_the_slices_that_it_was_made_from(unpacked: Callable[[str], Path]) -> None:
    volume, repairs = _accepted(unpacked("constructed_enhanced_ct_6frames_liver"), min_slices=6)
    whole, _ = _accepted(unpacked("crlm1004_ge_liver_41slices"))
    assert volume.shape == (6, 512, 512)
    np.testing.assert_allclose(volume.spacing_mm, (5, 0.796875, 0.796875), atol=1e-6)
    # Feet first in the store: z -285 up to -260.
    first = round((volume.affine[2, 3] - whole.affine[2, 3]) / 5)
    np.testing.assert_allclose(volume.affine[2, 3], -285, atol=1e-6)
    np.testing.assert_array_equal(volume.voxels, whole.voxels[first : first + 6])
    assert "padding_mapped" in repairs


def test_legacy_converted_file_equals_its_three_slices(unpacked: Callable[[str], Path]) -> None:
    root = unpacked("legacy_enhanced_ct_tiny_and_source")
    single, multi = _scan(root, "image/IMG0001.dcm"), _scan(root, "multiframe/mf.dcm")
    assert single.voxels.shape == multi.voxels.shape == (24, 38, 3)
    np.testing.assert_array_equal(single.voxels, multi.voxels)
    np.testing.assert_allclose(single.affine, multi.affine, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(multi.affine[:3, :3], axis=0), (0.7, 0.7, 2.5))
    assert set(np.unique(multi.voxels)) == {0, 1}
    assert {reason for reason, _ in _refusals(root).values()} == {"too_few_slices"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "ge_head_tilt_two_spacings_28slices",
            ("uneven_spacing", "steps between slices from 1.081 to 6.999 mm; slices slide sideways by 18.5 degrees"),
        ),
        ("siemens_tilt_uniform_4slices", ("gantry_tilt", "slices slide sideways by 14.0 degrees")),
        (
            "siemens_tilt_missing_slice_4slices",
            ("missing_slices", "1 of 5 slices missing by their positions; slices slide sideways by 15.5 degrees"),
        ),
        ("ge_secondary_missing_slice_4slices", ("missing_slices", "1 of 5 slices missing by their positions")),
        (
            "siemens_monitoring_same_position_4slices",
            ("repeated_positions", "3 of 4 slices lie where another one lies: 4 acquisitions"),
        ),
        (
            "constructed_j2k_gaps_duplicate_truncated",
            (
                "missing_slices",
                "1 file cannot be decoded (it is cut short); 1 byte-identical copy dropped; "
                "3 of 18 slices missing by their positions",
            ),
        ),
        ("enhanced_ct_perfusion_2frames", ("derived_map", "image type PERFUSION RCBF: not HU of tissue")),
    ],
)
def test_series_that_are_no_regular_volume(
    unpacked: Callable[[str], Path], name: str, expected: tuple[str, str]
) -> None:
    assert set(_refusals(unpacked(name), min_slices=2).values()) == {expected}


def test_descending_numbers_are_ordered_by_position_beside_a_segmentation(unpacked: Callable[[str], Path]) -> None:
    root = unpacked("ge_descending_3slices_plus_seg")
    assert {name: reason for name, (reason, _) in _refusals(root).items()} == {
        "01.dcm": "too_few_slices",
        "liver_seg.dcm": "not_ct",
    }
    (source,) = [source for source in find_sources(root).sources if source.problem is None]
    volume, repairs = _outcome(root, source, 3)
    assert isinstance(volume, Volume)
    assert "overlapping_slices" in repairs
    files = [root / f"{number:02d}.dcm" for number in (3, 2, 1)]
    np.testing.assert_array_equal(volume.voxels, oracle(files)[0])


def test_localizer_captures_and_directories_are_refused_each_with_its_reason(unpacked: Callable[[str], Path]) -> None:
    assert {
        name: reason for name, (reason, _) in _refusals(unpacked("philips_localizer_and_secondary_capture")).items()
    } == {
        "S1000/DIRFILE": "no_pixels",
        "S1000/I10": "localizer",
        "S4010/DIRFILE": "no_pixels",
        "S4010/I10": "secondary_capture",
    }


def test_a_folder_of_single_files_gives_a_reason_for_each(unpacked: Callable[[str], Path]) -> None:
    root = unpacked("pydicom_singles_mixed")
    reasons = {name: reason for name, (reason, _) in _refusals(root).items()}
    assert reasons == {
        # Three encodings of one slice.
        "693_J2KI.dcm": "repeated_positions",
        "CT_small.dcm": "too_few_slices",
        "ExplVR_BigEnd.dcm": "not_ct",
        "J2K_pixelrep_mismatch.dcm": "too_few_slices",
        "MR_small.dcm": "not_ct",
        "SC_rgb_rle.dcm": "secondary_capture",
        "badVR.dcm": "not_ct",
        "bad_sequence.dcm": "too_few_slices",
        "empty_charset_LEI.dcm": "no_pixels",
        "explicit_VR-UN.dcm": "too_few_slices",
        "image_dfl.dcm": "secondary_capture",
        "no_meta.dcm": "unreadable",
        "reportsi.dcm": "not_ct",
        "rtplan.dcm": "not_ct",
        "rtstruct.dcm": "not_ct",
        "zipMR.gz": "unreadable",
    }
    tree = find_sources(root)
    assert sum(len(source.files) for source in tree.sources) + tree.num_ignored == 21


def test_the_tree_of_a_dicomdir_holds_no_volume(unpacked: Callable[[str], Path]) -> None:
    root = unpacked("pydicom_dicomdir_tiny")
    refusals = _refusals(root)
    reasons = {name: reason for name, (reason, _) in refusals.items() if "/CR" not in name and "/MR" not in name}
    assert reasons == {
        "77654033/CT2/17106": "missing_slices",
        "98892001/CT2N/6293": "localizer",
        "98892001/CT5N/2062": "too_few_slices",
    }
    assert {reason for name, (reason, _) in refusals.items() if name not in reasons} == {"not_ct"}
    assert find_sources(root).num_ignored == 1
    # By its content it is known under any name.
    (root / "DICOMDIR").rename(root / "index")
    assert _refusals(root)["index"] == ("no_pixels", "a DICOMDIR: an index of other files, no image")


def _as_volume(path: Path, folder: Path) -> Scan:
    """One slice under two positions, 5 mm apart, read as a series."""
    folder.mkdir()
    shutil.copy(path, folder / "0")
    file = pydicom.dcmread(path)
    directions = np.array(file.ImageOrientationPatient, float).reshape(2, 3)
    file.ImagePositionPatient = list(np.array(file.ImagePositionPatient, float) + 5 * np.cross(*directions))
    file.save_as(folder / "1")
    (source,) = find_sources(folder).sources
    return read_source(folder, source)


LOSSLESS = ("", ".1", ".2", ".1.99", ".4.57", ".4.70", ".4.80", ".4.90", ".5")
LOSSY = {".4.91": 5, ".4.81": 1}
COARSE = {".4.50": 120, ".4.51": 40, ".4.53": 40, ".4.55": 40}
"""Stored with 8 or 12 bits: one or a few of their steps."""


def test_every_transfer_syntax_gives_the_same_slice(unpacked: Callable[[str], Path], tmp_path: Path) -> None:
    root = unpacked("transfer_syntaxes_single_slices")
    plain = _as_volume(root / "CTImage.dcm", tmp_path / "plain")
    assert plain.voxels[..., 0].min() < -1000
    assert np.array_equal(plain.voxels[..., 0], plain.voxels[..., 1])
    seen = set()
    for path in sorted(root.glob("CTImage.dcm_*.dcm")):
        end = path.name.removesuffix(".dcm").rsplit(SYNTAX, 1)[1]
        scan = _as_volume(path, tmp_path / f"as{end}")
        assert np.array_equal(scan.voxels[..., 0], scan.voxels[..., 1])
        difference = int(np.abs(scan.voxels.astype(np.int32) - plain.voxels).max())
        assert difference <= {**LOSSY, **COARSE}.get(end, 0), end
        assert ("lossy_source" in scan.repairs) == (end not in LOSSLESS), end
        single = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[0].T
        tolerance = 0 if end in LOSSLESS else 33 if end == ".4.50" else 3.1
        assert np.abs(np.maximum(scan.voxels[..., 0], -1024) - np.maximum(np.rint(single), -1024)).max() <= tolerance, (
            end
        )
        seen.add(end)
    assert seen == {*LOSSLESS, *LOSSY, *COARSE}


@pytest.mark.parametrize(
    "name", ["CT_small", "J2K_pixelrep_mismatch", "bad_sequence", "explicit_VR-UN", "693_J2KI", "693_J2KR", "693_UNCR"]
)
def test_files_with_careless_headers_decode_as_simpleitk_does(
    unpacked: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    path = unpacked("pydicom_singles_mixed") / f"{name}.dcm"
    scan = _as_volume(path, tmp_path / "pair")
    expected = np.maximum(sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[0].T, -1024)
    np.testing.assert_array_equal(np.maximum(scan.voxels[..., 0], -1024), expected)


def test_lone_slices_are_refused(unpacked: Callable[[str], Path]) -> None:
    root = unpacked("transfer_syntaxes_single_slices")
    refusals = _refusals(root)
    assert {name: reason for name, (reason, _) in refusals.items()} == {
        "CT1_J2KR": "too_few_slices",
        "CT2_J2KR": "too_few_slices",
        "CTImage.dcm": "repeated_positions",
    }
    for name in ("CTImage.dcm", "CT1_J2KR"):
        (root / "alone" / name).mkdir(parents=True)
        shutil.copy(root / name, root / "alone" / name)
    assert set(_refusals(root / "alone").values()) == {("too_few_slices", "a single slice")}


OUTCOMES = {
    "constructed_enhanced_ct_6frames_liver": ["too_few_slices"],
    "constructed_j2k_gaps_duplicate_truncated": ["missing_slices"],
    "crlm1004_ge_liver_41slices": ["accepted"],
    "crlm1006_ge_derived_secondary_8slices": ["too_few_slices"],
    "enhanced_ct_perfusion_2frames": ["derived_map"],
    "ge_descending_3slices_plus_seg": ["not_ct", "too_few_slices"],
    "ge_head_tilt_two_spacings_28slices": ["uneven_spacing"],
    "ge_secondary_missing_slice_4slices": ["missing_slices"],
    "legacy_enhanced_ct_tiny_and_source": ["too_few_slices", "too_few_slices"],
    "philips_localizer_and_secondary_capture": ["localizer", "no_pixels", "no_pixels", "secondary_capture"],
    "pydicom_dicomdir_tiny": ["localizer", "missing_slices", *["not_ct"] * 10, "too_few_slices"],
    "pydicom_singles_mixed": [
        *["no_pixels", *["not_ct"] * 6, "repeated_positions", "secondary_capture", "secondary_capture"],
        *["too_few_slices"] * 4,
        *["unreadable"] * 2,
    ],
    "siemens_j2k_lossless_20slices": ["accepted"],
    "siemens_monitoring_same_position_4slices": ["repeated_positions"],
    "siemens_tilt_missing_slice_4slices": ["missing_slices"],
    "siemens_tilt_uniform_4slices": ["gantry_tilt"],
    "transfer_syntaxes_single_slices": ["repeated_positions", "too_few_slices", "too_few_slices"],
}
"""What a build makes of each archive, with the 16 slices that it asks for unless told otherwise."""


def test_every_archive_has_its_outcomes() -> None:
    assert {path.stem for path in ARCHIVES.glob("*.zip")} == set(OUTCOMES)


@pytest.mark.parametrize("name", OUTCOMES)
def test_every_archive_through_a_build(unpacked: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    root = unpacked(name)
    settings = BuildConfig(source=str(root), store=str(tmp_path / "store"), executor="local", workers=1)
    tasks = make_tasks(root, find_sources(root).sources, settings, PseudonymKey(b"k" * 32))
    results = [build_volume(task) for task in tasks]
    outcomes = [result.rejected[0] if result.rejected else "accepted" for result in results]
    assert sorted(outcomes) == OUTCOMES[name]
    for result in results:
        # What is written says nothing about where it came from.
        text = str(result.values())
        assert not any(word in text for word in (name, "CRLM", "1.3.6.1", "1.2.840", str(root)))
        if result.row is not None:
            assert result.row.spacing_mm in {(5.0, 0.79688, 0.79688), (2.0, 0.97656, 0.97656)}
            assert result.row.manufacturer in {"GE", "Siemens"}
