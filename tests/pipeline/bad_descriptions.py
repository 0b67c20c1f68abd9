"""Descriptions that are broken, or only look like one: how each is made, and what must come of it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Make = Callable[[Path], Path]

MSD: dict[str, Any] = {
    "name": "Liver",
    "tensorImageSize": "3D",
    "modality": {"0": "CT"},
    "labels": {"0": "background", "1": "liver"},
    "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
    "test": ["./imagesTs/b.nii.gz"],
}
NNUNET: dict[str, Any] = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1},
    "numTraining": 1,
    "file_ending": ".nii.gz",
}


def nnssl(path: str = "imagesTr/a.nii.gz", **image: Any) -> dict[str, Any]:
    """A collection of one image."""
    images = [{"name": "a", "image_path": path, "modality": "CT", **image}]
    subjects = {"s1": {"subject_id": "s1", "sessions": {"ses-1": {"session_id": "ses-1", "images": images}}}}
    datasets = {"d1": {"dataset_index": "d1", "name": "d1", "subjects": subjects}}
    return {"collection_index": 1, "collection_name": "Dataset001_X", "datasets": datasets}


def tree(tmp_path: Path) -> Path:
    """A source with one dataset folder: two images and a label that nobody reads."""
    root = tmp_path / "source"
    for name in ("imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "imagesTs/b.nii.gz"):
        file = root / "Task03_Liver" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"never opened")
    return root


def _holding(name: str, content: Any) -> Make:
    """The source with one more file in the dataset's folder, or at the root where the name starts with /."""

    def make(tmp_path: Path) -> Path:
        root = tree(tmp_path)
        path = root / name.lstrip("/") if name.startswith("/") else root / "Task03_Liver" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return root

    return make


def _msd(**changed: Any) -> Make:
    return _holding("dataset.json", {key: value for key, value in (MSD | changed).items() if value is not None})


def _parquet(columns: dict[str, list[Any]]) -> Make:
    def make(tmp_path: Path) -> Path:
        root = tree(tmp_path)
        pq.write_table(pa.table(columns), root / "subjects.parquet")
        return root

    return make


def _unreadable_link(tmp_path: Path) -> Path:
    root = tree(tmp_path)
    (root / "pretrain_data.json").symlink_to(root / "pretrain_data.json")
    return root


def _two_subjects_in_bids(tmp_path: Path) -> Path:
    root = tree(tmp_path)
    for name in ("sub-01_ct.nii.gz", "sub-02_ct.nii.gz"):
        file = root / "bids" / "sub-01" / "ct" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"never opened")
    return root


def _damaged_manifest(tmp_path: Path) -> Path:
    root = _holding("dataset.json", {"format": "mim-scale dataset", "format_version": 2})(tmp_path)
    (root / "Task03_Liver" / "manifest.parquet").write_bytes(b"PAR1 cut off")
    return root


_BOTH = [{"image": "imagesTr/a.nii.gz"}, {"image": "imagesTs/b.nii.gz", "label": "imagesTr/a.nii.gz"}]
_NAMES_TWICE = b'{"datasets": {"d": {"subjects": {"s": {"sessions": {}}, "s": {"sessions": {}}}}}}'
_MSD_NAME = r"^Task03_Liver/dataset\.json: "
_NNSSL_NAME = r"^Task03_Liver/pretrain_data\.json: "
_CSV_NAME = r"^subjects\.csv: "

BAD_DESCRIPTIONS: list[tuple[str, Make, str | None]] = [
    # Refused in one line: the pattern that the SourceError matches.
    ("msd, no JSON", _holding("dataset.json", b"{'training': ["), _MSD_NAME + r"is no JSON \(line 1\)"),
    ("msd, not UTF-8", _holding("dataset.json", b'{"name": "Stra\xdfe"}'), _MSD_NAME + "is no UTF-8 text"),
    ("msd, training is no list", _msd(training=7), _MSD_NAME + "training is no list"),
    ("msd, an entry without image", _msd(training=[{"label": "x"}]), _MSD_NAME + r"training\[0\] has no image"),
    ("msd, an entry of numbers", _msd(training=[3]), _MSD_NAME + r"training\[0\] has no image"),
    ("msd, an image that is a number", _msd(training=[{"image": 3}]), _MSD_NAME + r"training\[0\].image is no path"),
    ("msd, an empty list of images", _msd(training=[{"image": []}]), _MSD_NAME + r"training\[0\].image is no path"),
    ("msd, a file that is not there", _msd(test=["./imagesTs/c.nii.gz"]), _MSD_NAME + r"test\[0\] ?.*names neither"),
    ("msd, a path out of the source", _msd(test=["../../../etc/passwd"]), _MSD_NAME + ".*leads out of it"),
    ("msd, an image in two splits", _msd(test=["imagesTr/a.nii.gz"]), _MSD_NAME + ".*second split"),
    ("msd, an image that is a label", _msd(training=_BOTH, test=[]), _MSD_NAME + ".*gives a second role"),
    ("msd, modality is a number", _msd(modality=1), _MSD_NAME + "modality is no table of names"),
    ("msd, a channel named x", _msd(modality={"x": "CT"}), _MSD_NAME + "modality has a channel"),
    ("msd, nested without end", _holding("dataset.json", b"[" * 200_000), _MSD_NAME + "is nested too deeply"),
    ("msd, a zero byte in a path", _msd(test=["imagesTs/b\0.nii.gz"]), _MSD_NAME + ".*names neither"),
    (
        "nnU-Net, channel_names is a list of numbers",
        _holding("dataset.json", NNUNET | {"channel_names": [1]}),
        _MSD_NAME + "channel_names is no table of names",
    ),
    (
        "nnU-Net, file_ending is a number",
        _holding("dataset.json", NNUNET | {"file_ending": 7}),
        _MSD_NAME + "file_ending is no text",
    ),
    (
        "nnU-Net, a case without images",
        _holding("dataset.json", NNUNET | {"dataset": {"a": {"label": "labelsTr/a.nii.gz"}}}),
        _MSD_NAME + "case 0 of dataset has no list of images",
    ),
    (
        "nnU-Net, a case without label",
        _holding("dataset.json", NNUNET | {"dataset": {"a": {"images": ["imagesTr/a.nii.gz"]}}}),
        _MSD_NAME + "case 0 of dataset has no label",
    ),
    ("nnssl, no JSON", _holding("pretrain_data.json", b"{"), _NNSSL_NAME + "is no JSON"),
    ("nnssl, a list", _holding("pretrain_data.json", []), _NNSSL_NAME + "the collection has no table of datasets"),
    (
        "nnssl, a dataset without subjects",
        _holding("pretrain_data.json", {"datasets": {"d": {}}}),
        _NNSSL_NAME + "a dataset has no table of subjects",
    ),
    (
        "nnssl, a session without images",
        _holding("pretrain_data.json", {"datasets": {"d": {"subjects": {"s": {"sessions": {"1": {}}}}}}}),
        _NNSSL_NAME + "a session has no list of images",
    ),
    ("nnssl, one subject twice", _holding("pretrain_data.json", _NAMES_TWICE), _NNSSL_NAME + "gives one name twice"),
    ("nnssl, no such image", _holding("pretrain_data.json", nnssl("c.nii.gz")), _NNSSL_NAME + "image 1 names neither"),
    (
        "nnssl, an image elsewhere",
        _holding("pretrain_data.json", nnssl("$nnssl_raw/../../../x.nii.gz")),
        _NNSSL_NAME + "image 1 names neither .*leads out",
    ),
    (
        "nnssl, a mask that is not there",
        _holding("pretrain_data.json", nnssl(associated_masks={"anatomy_mask": "no.nii.gz"})),
        _NNSSL_NAME + "image 1's anatomy_mask names neither",
    ),
    (
        "nnssl, masks are a list",
        _holding("pretrain_data.json", nnssl(associated_masks=["a"])),
        _NNSSL_NAME + "image 1 has associated_masks that are no table",
    ),
    (
        "nnssl, a modality that is a number",
        _holding("pretrain_data.json", nnssl(modality=7)),
        _NNSSL_NAME + "image 1 has a modality that is no text",
    ),
    ("nnssl, a link to itself", _unreadable_link, r"^pretrain_data\.json: cannot be read"),
    ("table, no columns", _holding("/subjects.csv", b"file,person\nx,y\n"), _CSV_NAME + "line 2 lacks a path"),
    (
        "table, no subject",
        _holding("/subjects.csv", b"path,subject\nTask03_Liver,\n"),
        _CSV_NAME + "line 2 lacks a path or a subject",
    ),
    (
        "table, a path that is not there",
        _holding("/subjects.csv", b"path,subject\nTask03_Liver,x\nTask04,y\n"),
        _CSV_NAME + "line 3 names neither a file nor a folder below",
    ),
    (
        "table, two subjects for one path",
        _holding("/subjects.csv", b"path,subject\nTask03_Liver,x\n./Task03_Liver/,y\n"),
        _CSV_NAME + "line 3 gives a second subject",
    ),
    (
        "table, a path with a comma",
        _holding("/subjects.csv", b"path,subject\nTask03_Liver,Roe, Jane\n"),
        _CSV_NAME + "line 2 has 3 cells under 2 columns",
    ),
    (
        "table, an unknown role",
        _holding("/subjects.csv", b"path,subject,role\nTask03_Liver,x,picture\n"),
        _CSV_NAME + "line 2 has an unknown role",
    ),
    (
        "table, an unknown split",
        _holding("/subjects.csv", b"path,subject,split\nTask03_Liver,x,holdout\n"),
        _CSV_NAME + "line 2 has an unknown split",
    ),
    (
        "table, one column twice",
        _holding("/subjects.csv", b"path,path,subject\na,b,c\n"),
        _CSV_NAME + "has two columns of one name",
    ),
    (
        "table, not UTF-8",
        _holding("/subjects.csv", "path,subject\nTask03_Liver,Weiß\n".encode("utf-16")),
        _CSV_NAME + "not readable as CSV",
    ),
    ("table, an open quote", _holding("/subjects.csv", b'path,subject\n"a,b\n'), _CSV_NAME + "not readable as CSV"),
    ("Parquet, cut off", _holding("/subjects.parquet", b"PAR1"), r"^subjects\.parquet: not readable as Parquet"),
    (
        "Parquet, paths are numbers with a point",
        _parquet({"path": [0.5], "subject": ["x"]}),
        r"^subjects\.parquet: row 1 has a path that is no text",
    ),
    ("BIDS, a file in another's folder", _two_subjects_in_bids, "^bids: a file that BIDS names as one subject's"),
    ("store, a damaged manifest", _damaged_manifest, _MSD_NAME + r"its manifest\.parquet cannot be read"),
    # Texts of something else: ignored.
    ("dataset.json of something else", _holding("dataset.json", {"images": [], "annotations": []}), None),
    ("dataset.json that is a list", _holding("dataset.json", [1, 2]), None),
    ("dataset.json, broken, with no dataset beside it", _holding("notes/dataset.json", b"{"), None),
    ("dataset.json in a hidden copy", _holding("._dataset.json", b"\0\5\26\7"), None),
    ("subjects.csv of a study, not at the root", _holding("subjects.csv", b"id,age\n1,70\n"), None),
    ("participants.tsv with names", _holding("participants.tsv", b"participant_id\tname\nsub-01\tJane\n"), None),
    ("dataset_description.json, broken", _holding("dataset_description.json", b"{"), None),
]
"""(name, how to make the source below an empty folder, pattern of the SourceError or None where it is ignored)."""

assert os.sep == "/"
