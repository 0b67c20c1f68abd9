"""What datasets say of themselves: who, which role, which split; broken ones are one line, look-alikes ignored."""

import json
import os
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.sources.descriptions.find import Described, find_descriptions
from data_pipeline.sources.descriptions.listed import Listed, role_of_modality
from data_pipeline.sources.descriptions.place import below
from mim_scale.errors import SourceError
from tests.pipeline.bad_descriptions import BAD_DESCRIPTIONS, MSD, NNUNET, nnssl, tree
from tests.synthetic import make_dataset


def files_below(root: Path) -> list[str]:
    found = ((Path(folder) / name).relative_to(root).as_posix() for folder, _, names in os.walk(root) for name in names)
    return sorted(found)


def describe(root: Path) -> Described:
    return find_descriptions(root, iter(files_below(root)))


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"never opened")


def say(root: Path, name: str, values: Any) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(values if isinstance(values, str) else json.dumps(values))


def of(described: Described, *files: str) -> tuple[str, str, str | None]:
    """Role, split and reason."""
    listed = described.of(*files)
    assert listed is not None
    return listed.role, listed.split, str(listed.problem[0]) if listed.problem else None


def subject(described: Described, *files: str) -> str | None:
    listed = described.of(*files)
    return listed.subject if listed is not None else None


@pytest.mark.parametrize(
    ("make", "expected"), [case[1:] for case in BAD_DESCRIPTIONS], ids=[c[0] for c in BAD_DESCRIPTIONS]
)
def test_a_bad_description_is_one_line_and_a_look_alike_is_ignored(
    tmp_path: Path, make: Callable[[Path], Path], expected: str | None
) -> None:
    root = make(tmp_path)
    if expected is None:
        assert describe(root).of("Task03_Liver/imagesTr/a.nii.gz") is None
        return
    with pytest.raises(SourceError, match=expected) as caught:
        describe(root)
    message = str(caught.value)
    assert "\n" not in message
    assert "CSV list of the files as the source" in message
    assert "a.nii.gz" not in message


def test_msd(tmp_path: Path) -> None:
    root = tree(tmp_path)
    say(root, "Task03_Liver/dataset.json", MSD)
    put(root, "Task03_Liver/imagesTr/unlisted.nii.gz")
    described = describe(root)
    image, label, test = (f"Task03_Liver/{name}.nii.gz" for name in ("imagesTr/a", "labelsTr/a", "imagesTs/b"))
    assert of(described, image) == ("image", "train", None)
    assert of(described, label) == ("label", "train", "label_map")
    assert of(described, test) == ("image", "test", None)
    assert subject(described, image) == subject(described, label) != subject(described, test)
    assert described.of(image).dataset == "Task03_Liver"  # type: ignore[union-attr]
    assert described.of("Task03_Liver/imagesTr/unlisted.nii.gz") is None
    assert described.found == (("msd", "Task03_Liver/dataset.json"),)


@pytest.mark.parametrize(
    ("modality", "role", "reason"),
    [
        ({"0": "CT"}, "image", None),
        ({"0": "MRI"}, "other_modality", "not_ct"),
        ({"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}, "other_modality", "not_ct"),
        ({"0": "CT", "1": "PET"}, "other_modality", "not_3d"),
        (["CT"], "image", None),
        ("CT", "image", None),
        ({}, "", None),
    ],
)
def test_msd_says_what_is_no_ct(tmp_path: Path, modality: Any, role: str, reason: str | None) -> None:
    root = tree(tmp_path)
    say(root, "Task03_Liver/dataset.json", MSD | {"modality": modality})
    assert of(describe(root), "Task03_Liver/imagesTr/a.nii.gz") == (role, "train", reason)


def test_nnunet_1_lists_the_case_and_stores_one_file_a_channel(tmp_path: Path) -> None:
    put(tmp_path, "T/imagesTr/a_0000.nii.gz", "T/imagesTr/a_0001.nii.gz", "T/labelsTr/a.nii.gz")
    say(tmp_path, "T/dataset.json", MSD | {"modality": {"0": "CT", "1": "PET"}, "test": []})
    described = describe(tmp_path)
    assert of(described, "T/imagesTr/a_0000.nii.gz") == ("image", "train", None)
    assert of(described, "T/imagesTr/a_0001.nii.gz") == ("other_modality", "train", "not_ct")


def test_lists_of_monai_have_several_images_an_entry(tmp_path: Path) -> None:
    put(tmp_path, "pet.nii.gz", "ct.nii.gz", "v.nii.gz")
    lists = {"training": [{"image": ["pet.nii.gz", "ct.nii.gz"]}], "validation": [{"image": "v.nii.gz"}]}
    say(tmp_path, "dataset.json", lists | {"modality": ["PET", "CT"], "labels": {}})
    described = describe(tmp_path)
    assert of(described, "pet.nii.gz") == ("other_modality", "train", "not_ct")
    assert of(described, "ct.nii.gz") == ("image", "train", None)
    assert of(described, "v.nii.gz") == ("other_modality", "val", "not_3d")


def test_nnunet(tmp_path: Path) -> None:
    names = ("imagesTr/c_1_0000", "imagesTr/c_1_0001", "imagesTr/c_1_0002", "labelsTr/c_1", "imagesTs/c_2_0000")
    put(tmp_path, *(f"raw/Dataset001_X/{name}.nii.gz" for name in names), "raw/Dataset001_X/imagesTr/odd.nii.gz")
    put(tmp_path, "raw/Dataset001_X/imagesTr/._c_1_0000.nii.gz")
    say(tmp_path, "raw/Dataset001_X/dataset.json", NNUNET | {"channel_names": {"0": "CT", "1": "noNorm"}})
    described = describe(tmp_path)
    expected = (
        ("image", "train", None),
        ("other_modality", "train", "not_ct"),
        ("other_modality", "train", "not_ct"),
        ("label", "train", "label_map"),
        ("image", "test", None),
    )
    paths = [f"raw/Dataset001_X/{name}.nii.gz" for name in names]
    assert tuple(of(described, path) for path in paths) == expected
    assert len({subject(described, path) for path in paths[:4]}) == 1
    assert len({subject(described, path) for path in paths}) == 2
    assert described.of("raw/Dataset001_X/imagesTr/odd.nii.gz") is None


@pytest.mark.parametrize("prefix", ["", "$nnUNet_raw/Dataset001_X/", "${nnUNet_raw}/Dataset001_X/"])
def test_nnunet_may_name_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    monkeypatch.delenv("nnUNet_raw", raising=False)
    put(tmp_path, "Dataset001_X/ct/one.nii.gz", "Dataset001_X/seg/one.nii.gz", "Dataset001_X/imagesTs/two_0000.nii.gz")
    cases = {"one": {"images": [f"{prefix}ct/one.nii.gz"], "label": f"{prefix}seg/one.nii.gz"}}
    say(tmp_path, "Dataset001_X/dataset.json", NNUNET | {"dataset": cases})
    described = describe(tmp_path)
    assert of(described, "Dataset001_X/ct/one.nii.gz") == ("image", "train", None)
    assert of(described, "Dataset001_X/seg/one.nii.gz") == ("label", "train", "label_map")
    assert of(described, "Dataset001_X/imagesTs/two_0000.nii.gz") == ("image", "test", None)


@pytest.mark.parametrize("form", ["relative", "absolute", "parent", "environment"])
def test_nnssl_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.delenv("nnssl_raw", raising=False)
    put(tmp_path, "raw/Dataset001_X/a.nii.gz", "raw/Dataset001_X/m.nii.gz")
    prefix = {
        "relative": "./",
        "absolute": f"{tmp_path}/raw/Dataset001_X/",
        "parent": "$nnssl_raw/Dataset001_X/",
        "environment": "$nnssl_raw/",
    }[form]
    if form == "environment":
        monkeypatch.setenv("nnssl_raw", str(tmp_path / "raw" / "Dataset001_X"))
    masks = {"anatomy_mask": f"{prefix}m.nii.gz", "anonymization_mask": None}
    say(tmp_path, "raw/Dataset001_X/pretrain_data.json", nnssl(f"{prefix}a.nii.gz", associated_masks=masks))
    # The source may be any folder above, or the dataset's own.
    for root in (tmp_path, tmp_path / "raw", tmp_path / "raw" / "Dataset001_X"):
        described = describe(root)
        image, mask = (
            (tmp_path / "raw/Dataset001_X" / name).relative_to(root).as_posix() for name in ("a.nii.gz", "m.nii.gz")
        )
        assert of(described, image) == ("image", "", None)
        assert of(described, mask) == ("mask", "", "label_map")
        assert subject(described, image) == subject(described, mask) == "d1\ns1"


def test_nnssl_modality(tmp_path: Path) -> None:
    put(tmp_path, "a.nii.gz")
    say(tmp_path, "pretrain_data.json", nnssl("a.nii.gz", modality="T1w"))
    assert of(describe(tmp_path), "a.nii.gz") == ("other_modality", "", "not_ct")


def test_bids(tmp_path: Path) -> None:
    base = "study"
    files = {
        "sub-01/ses-a/ct/sub-01_ses-a_ct.nii.gz": ("image", None),
        "sub-01/anat/sub-01_T1w.nii.gz": ("other_modality", "not_ct"),
        "sub-01/func/sub-01_task-rest_bold.nii.gz": ("other_modality", "not_ct"),
        "sub-01/ct/sub-01_scan.nii.gz": ("", None),
        "rawdata/sub-01/sub-01_CT.nii": ("image", None),
        "derivatives/masks/sub-01/sub-01_dseg.nii.gz": ("label", "label_map"),
        "sourcedata/sub-01/dicom/IM0001": ("", None),
        "sub-02/ct/sub-02_ct.nii.gz": ("image", None),
    }
    put(tmp_path, *(f"{base}/{name}" for name in files), "other/sub-01/sub-01_ct.nii.gz")
    say(tmp_path, f"{base}/participants.tsv", "participant_id\tname\nsub-01\tJane Roe\n")
    described = describe(tmp_path)
    for name, (role, reason) in files.items():
        assert of(described, f"{base}/{name}") == (role, "", reason), name
    people = [subject(described, f"{base}/{name}") for name in files]
    assert len(set(people[:-1])) == 1
    assert len({*people, subject(described, "other/sub-01/sub-01_ct.nii.gz")}) == 3
    assert described.found == (("bids", "other"), ("bids", "study"))
    assert "Jane" not in str(described.datasets)


def test_our_own_store_keeps_its_subjects(tmp_path: Path) -> None:
    store = make_dataset(tmp_path / "archive" / "store")
    described = describe(tmp_path / "archive")
    assert described.found == (("store", "store/dataset.json"),)
    found = {row.key: subject(described, f"store/volumes/{row.key}.zarr") for row in store.rows}
    groups = {row.subject for row in store.rows}
    assert len(set(found.values())) == len(groups)
    assert all(found.values())


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_a_table_says_everything(tmp_path: Path, suffix: str) -> None:
    put(tmp_path, "a.nii.gz", "m.nii.gz", "s/IM1", "s/IM2")
    columns = {
        "Path": ["a.nii.gz", "m.nii.gz", "s"],
        "subject": ["Jane Roe", "Jane Roe", "7"],
        "role": ["image", "Mask", ""],
        "dataset": ["one", "one", None],
        "split": ["test", "", "train"],
    }
    path = tmp_path / f"subjects.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table(columns | {"subject": ["Jane Roe", "Jane Roe", "7"]}), path)
    else:
        mark = "," if suffix == "csv" else "\t"
        rows = [list(columns), *([cell or "" for cell in row] for row in zip(*columns.values(), strict=True))]
        path.write_text("".join(f"{mark.join(row)}\r\n" for row in rows), encoding="utf-8-sig")
    described = describe(tmp_path)
    assert of(described, "a.nii.gz") == ("image", "test", None)
    assert of(described, "m.nii.gz") == ("mask", "", "label_map")
    assert of(described, "s/IM1", "s/IM2") == ("", "train", None)
    assert [subject(described, name) for name in ("a.nii.gz", "m.nii.gz", "s/IM2")] == ["Jane Roe", "Jane Roe", "7"]


def test_semicolons_of_spreadsheets(tmp_path: Path) -> None:
    put(tmp_path, "a.nii.gz")
    (tmp_path / "subjects.csv").write_text("path;subject\na.nii.gz;Jane\n")
    assert subject(describe(tmp_path), "a.nii.gz") == "Jane"


@pytest.mark.parametrize("line", ["./0.nii.gz", "0.nii.gz", "sub\\2.nii", "/sub/", "."])
def test_paths_in_a_table_may_be_spelled_freely(tmp_path: Path, line: str) -> None:
    put(tmp_path, "0.nii.gz", "sub/2.nii")
    (tmp_path / "subjects.csv").write_text(f"path,subject\n{line},Jane Roe\n")
    described = describe(tmp_path)
    named = {name for name in ("0.nii.gz", "sub/2.nii") if subject(described, name)}
    expected = {"0": {"0.nii.gz"}, "s": {"sub/2.nii"}, "": {"0.nii.gz", "sub/2.nii"}}
    assert named == expected[line.strip("./\\")[:1]]


def test_any_slice_may_name_its_series_subject(tmp_path: Path) -> None:
    put(tmp_path, "s/IM1", "s/IM2")
    (tmp_path / "subjects.csv").write_text("path,subject\ns/IM2,Jane\n")
    assert subject(describe(tmp_path), "s/IM1", "s/IM2") == "Jane"


def test_a_table_comes_before_a_dataset_and_the_nearer_before_the_farther(tmp_path: Path) -> None:
    root = tree(tmp_path)
    inner = "Task03_Liver/imagesTr/a.nii.gz"
    say(root, "Task03_Liver/dataset.json", MSD)
    say(root, "pretrain_data.json", nnssl(inner, modality="MRI"))
    assert of(describe(root), inner) == ("image", "train", None)
    (root / "subjects.csv").write_text("path,subject\nTask03_Liver,far\n")
    assert of(describe(root), inner) == ("image", "train", None)
    assert subject(describe(root), inner) == "far"
    (root / "Task03_Liver" / "subjects.csv").write_text("path,subject,role\nimagesTr,near,label\n")
    assert subject(describe(root), inner) == "near"
    assert of(describe(root), inner) == ("label", "train", "label_map")
    assert subject(describe(root), "Task03_Liver/imagesTs/b.nii.gz") == "far"


def test_ten_datasets_in_ten_folders_share_nobody(tmp_path: Path) -> None:
    for number in range(10):
        root = tree(tmp_path)
        folder = tmp_path / "archive" / f"part{number}" / f"Dataset{number:03d}_X"
        folder.parent.mkdir(parents=True)
        (root / "Task03_Liver").rename(folder)
        say(folder, "dataset.json", MSD)
    described = describe(tmp_path / "archive")
    assert len(described.found) == 10
    names = [f"part{n}/Dataset{n:03d}_X/imagesTr/a.nii.gz" for n in range(10)]
    assert len({subject(described, name) for name in names}) == 10


def test_no_description_says_nothing(tmp_path: Path) -> None:
    put(tmp_path, "a.nii.gz")
    assert describe(tmp_path).of("a.nii.gz") is None
    assert "Jane" not in repr(Listed(subject="Jane", dataset="Jane"))


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("CT", "image"),
        ("ceCT", "image"),
        ("CT angiography", "image"),
        ("Computed Tomography", "image"),
        ("PET/CT", "other_modality"),
        ("noNorm", "other_modality"),
        ("direct", "other_modality"),
        ("", ""),
        ("?", ""),
    ],
)
def test_words_for_ct(name: str, role: str) -> None:
    assert role_of_modality(name) == role


_PARTS = st.lists(st.sampled_from(["..", ".", "a", "b c", "", "é", "x.nii.gz", "$x", "C:"]), max_size=8)


@given(_PARTS.map("/".join), st.sampled_from(["", "a", "a/b c", "a/b c/d"]), st.booleans())
def test_no_path_leads_out_of_the_source(written: str, folder: str, is_absolute: bool) -> None:
    written = f"/{written}" if is_absolute else written
    path = below(written, folder, ("/data/source",))
    if path is None:
        return
    assert not path.startswith("/")
    assert ".." not in path.split("/")
    assert posixpath.normpath(path) == path
    assert below(path) == path
    joined = posixpath.normpath(posixpath.join("/root", folder, written.strip("/")))
    assert joined == posixpath.normpath(f"/root/{path}")


@given(_PARTS.map("/".join))
def test_absolute_paths_below_the_source_are_cut_there(written: str) -> None:
    path = below(f"/data/source/{written}", "some/folder", ("/elsewhere", "/data/source"))
    whole = posixpath.normpath(f"/data/source/{written}")
    if whole == "/data/source":
        assert path == "."
    elif whole.startswith("/data/source/"):
        assert path == whole.removeprefix("/data/source/")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just("imagesTr/a.nii.gz"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["training", "test", "modality", "labels", "image", "label", "channel_names", "dataset"])
            | st.sampled_from(
                ["images", "datasets", "subjects", "sessions", "image_path", "associated_masks", "0", "x"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_JSON, st.sampled_from(["dataset.json", "pretrain_data.json"]))
def test_any_json_is_used_refused_in_one_line_or_ignored(tmp_path: Path, values: Any, name: str) -> None:
    root = tree(tmp_path)
    for old in ("dataset.json", "pretrain_data.json"):
        (root / "Task03_Liver" / old).unlink(missing_ok=True)
    say(root, f"Task03_Liver/{name}", values)
    try:
        describe(root)
    except SourceError as error:
        message = str(error)
    else:
        return
    assert re.fullmatch(rf"Task03_Liver/{name}: .*; mend it, or .*", message)


def test_memory_of_a_large_archive_is_small(tmp_path: Path) -> None:
    """10,000 volumes of a described dataset: less than 1 KB each, names and all."""
    import tracemalloc

    names = [f"imagesTr/case_{number:05d}.nii.gz" for number in range(10_000)]
    say(tmp_path, "dataset.json", MSD | {"training": [{"image": name} for name in names], "test": []})
    tracemalloc.start()
    described = find_descriptions(tmp_path, iter(["dataset.json", *names]))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert of(described, names[-1]) == ("image", "train", None)
    assert used / len(names) < 1000
