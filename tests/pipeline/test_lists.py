"""Lists of files: as a source themselves, and written for nnssl or a later build and read back."""

import json
from pathlib import Path

import pytest

from data_pipeline.commands.export_list import export_list
from data_pipeline.sources.descriptions.find import is_listing, read_listing
from data_pipeline.sources.descriptions.place import Place
from mim_scale.errors import SourceError
from tests.pipeline.sources import Series, phantom, write_image, write_series
from tests.pipeline.test_descriptions import describe, of, put, subject


def test_a_list_is_a_source_itself(tmp_path: Path) -> None:
    put(tmp_path, "ct/a.nii.gz", "ct/b.nii.gz", "ct/s/IM1", "not listed.nii.gz")
    path = tmp_path / "list.csv"
    path.write_text("path,subject,split\nct/a.nii.gz,x,train\nct/s,,test\nct/s/IM1,,test\n")
    listing = read_listing(path)
    assert is_listing(path)
    assert listing.root == tmp_path
    assert listing.paths == ("ct/a.nii.gz", "ct/s")
    assert subject(listing.described, "ct/a.nii.gz") == "x"
    assert of(listing.described, "ct/s/IM1") == ("", "test", None)
    assert subject(listing.described, "ct/s/IM1") is None


def test_a_list_may_lie_elsewhere(tmp_path: Path) -> None:
    put(tmp_path, "archive/one/a.nii.gz", "archive/two/b.nii.gz", "lists/keep")
    path = tmp_path / "lists" / "list.csv"
    path.write_text(f"path\n{tmp_path}/archive/one/a.nii.gz\n../archive/two/b.nii.gz\n")
    listing = read_listing(path)
    assert (listing.root, listing.paths) == (tmp_path / "archive", ("one/a.nii.gz", "two/b.nii.gz"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path\n", "lists nothing"),
        ("path\na.nii.gz\nb.nii.gz\n", "line 3 names neither a file nor a folder"),
        ("file\na.nii.gz\n", "line 2 lacks a path"),
        ("path,subject\na.nii.gz,x\na.nii.gz,y\n", "line 3 gives a second subject"),
        ("", "lists nothing"),
    ],
)
def test_a_bad_list_is_refused(tmp_path: Path, text: str, words: str) -> None:
    put(tmp_path, "a.nii.gz")
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(SourceError, match=f"list.csv: {words}"):
        read_listing(tmp_path / "list.csv")
    with pytest.raises(SourceError, match="does not exist"):
        read_listing(tmp_path / "other.csv")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Real small files: two of one person, one of another, a label, a DICOM series, one that a header refuses."""
    root = tmp_path / "raw" / "Dataset007_Archive"
    for seed, name in enumerate(("a.nii.gz", "b.nii.gz", "sub/a.nii.gz")):
        write_image(root / name, phantom(seed))
    write_image(root / "m.nii.gz", phantom(9))
    write_series(root / "series", Series(phantom(3)))
    write_series(root / "mr", Series(phantom(4), tags={"Modality": "MR"}))
    lines = [
        "path,subject,role",
        "a.nii.gz,Jane Roe,",
        "sub/a.nii.gz,Jane Roe,",
        "m.nii.gz,Jane Roe,mask",
        "b.nii.gz,Joe,",
    ]
    (root / "subjects.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("is_raw_set", [False, True])
def test_nnssl_there_and_back(archive: Path, monkeypatch: pytest.MonkeyPatch, is_raw_set: bool) -> None:
    monkeypatch.delenv("nnssl_raw", raising=False)
    if is_raw_set:
        monkeypatch.setenv("nnssl_raw", f"{archive.parent}/")
    assert export_list(archive, archive / "pretrain_data.json") == 0
    text = (archive / "pretrain_data.json").read_text()
    assert "Roe" not in text
    assert ("$nnssl_raw/Dataset007_Archive/a.nii.gz" in text) == is_raw_set
    values = json.loads(text)
    # What nnssl 1 reads without a default, and that it finds a dataset again by its index.
    assert set(values) == {"collection_index", "collection_name", "datasets"}
    assert values["collection_name"] == "Dataset007_Archive"
    count = 0
    for key, dataset in values["datasets"].items():
        assert key == str(dataset["dataset_index"])
        for name, person in dataset["subjects"].items():
            assert name == person["subject_id"]
            for session in person["sessions"].values():
                assert len({image["name"] for image in session["images"]}) == len(session["images"])
                for image in session["images"]:
                    assert set(image) == {"name", "image_path", "modality", "image_info", "associated_masks"}
                    assert set(image["associated_masks"]) == {"anatomy_mask", "anonymization_mask"}
                    count += 1
    assert count == 3
    (archive / "subjects.csv").unlink()
    described = describe(archive)
    a, b, again = (subject(described, name) for name in ("a.nii.gz", "b.nii.gz", "sub/a.nii.gz"))
    assert a == again != b
    assert None not in (a, b)
    listing = read_listing(archive / "pretrain_data.json")
    assert (listing.root, listing.paths) == (archive, ("a.nii.gz", "b.nii.gz", "sub/a.nii.gz"))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_there_and_back(archive: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "lists" / f"list.{suffix}"
    assert export_list(archive, path) == 0
    assert b"Roe" not in path.read_bytes()
    listing = read_listing(path)
    # The refused series is not listed: its header would be refused again.
    assert listing.root == archive
    assert listing.paths == ("a.nii.gz", "b.nii.gz", "m.nii.gz", "series", "sub/a.nii.gz")
    described = listing.described
    assert subject(described, "a.nii.gz") == subject(described, "sub/a.nii.gz") != subject(described, "b.nii.gz")
    assert of(described, "m.nii.gz") == ("mask", "", "label_map")
    # The series has its patient in its own header.
    assert subject(described, "series/IM0001") is None


def test_a_list_of_no_known_form_is_refused(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="choose one of them"):
        export_list(archive, tmp_path / "list.xlsx")
    only_dicom = tmp_path / "dicom"
    write_series(only_dicom, Series(phantom(3)))
    with pytest.raises(SourceError, match="holds none of them"):
        export_list(only_dicom, tmp_path / "pretrain_data.json")


def test_a_description_is_read_from_any_root_spelling(tmp_path: Path) -> None:
    put(tmp_path, "real/a.nii.gz")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    place = Place(tmp_path / "link", "list", "", {"a.nii.gz"})
    for written in (f"{tmp_path}/real/a.nii.gz", f"{tmp_path}/link/a.nii.gz", "a.nii.gz"):
        assert place.find(written, "line 1") == "a.nii.gz"
