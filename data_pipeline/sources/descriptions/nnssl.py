"""nnssl's `pretrain_data.json`, read and written: collection, datasets, subjects, sessions, images."""

import json
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_pipeline.sources.descriptions.listed import Line, Listed, Written, listed_as, person, role_of_modality
from data_pipeline.sources.descriptions.place import Place
from mim_scale.commit import write_file

NAME = "pretrain_data.json"
_RAW = "nnssl_raw"
_MASKS = ("anatomy_mask", "anonymization_mask")
_FOLDER = re.compile(r"Dataset\d{3}_.+")
_DEFAULT_COLLECTION = "Dataset001_Archive"


def read_nnssl(place: Place, values: Any) -> dict[str, Listed]:
    """What the collection says about each file.

    Raises:
        SourceError: the description cannot be used as it is.
    """
    return place.enter(nnssl_lines(place, values))


def nnssl_lines(place: Place, values: Any) -> Iterator[Line]:
    """One line for each image and each of its masks.

    Raises:
        SourceError: a level of the collection is missing or of another type.
    """
    number = 0
    for name, dataset in _table(place, values, "datasets", "the collection").items():
        for subject, below in _table(place, dataset, "subjects", "a dataset").items():
            for session in _table(place, below, "sessions", "a subject").values():
                images = session.get("images") if isinstance(session, dict) else None
                if not isinstance(images, list):
                    place.refuse("a session has no list of images")
                for image in images:
                    number += 1
                    yield from _image_lines(place, image, f"image {number}", name, person(name, subject))


def _table(place: Place, values: Any, key: str, what: str) -> dict[str, Any]:
    inner = values.get(key) if isinstance(values, dict) else None
    if not isinstance(inner, dict):
        place.refuse(f"{what} has no table of {key}")
    return inner


def _image_lines(place: Place, image: Any, where: str, dataset: str, subject: str) -> Iterator[Line]:
    path = image.get("image_path") if isinstance(image, dict) else None
    if not isinstance(path, str):
        place.refuse(f"{where} has no image_path")
    modality = image.get("modality") or ""
    if not isinstance(modality, str):
        place.refuse(f"{where} has a modality that is no text")
    yield Line(where, path, listed_as(role_of_modality(modality), subject, dataset))
    masks = image.get("associated_masks") or {}
    if not isinstance(masks, dict):
        place.refuse(f"{where} has associated_masks that are no table")
    for kind in _MASKS:
        mask = masks.get(kind)
        if mask is not None and not isinstance(mask, str):
            place.refuse(f"{where} has a mask whose path is no text")
        if mask:
            yield Line(f"{where}'s {kind}", mask, listed_as("mask", subject, dataset))


def write_nnssl(path: Path, entries: Iterable[Written]) -> None:
    """Replace the file by a collection of these images; paths below $nnssl_raw are written relative to it.

    The collection is called like the folder of the file, where that is called DatasetNNN_NAME as nnssl wants it.
    """
    folder = path.absolute().parent.name
    collection = folder if _FOLDER.fullmatch(folder) else _DEFAULT_COLLECTION
    datasets: dict[str, Any] = {}
    for entry in entries:
        dataset = datasets.setdefault(entry.dataset, _dataset(entry.dataset))
        subject = dataset["subjects"].setdefault(entry.subject, _subject(entry.subject))
        session = subject["sessions"].setdefault(entry.session, _session(entry.session))
        session["images"].append(_image(entry, {image["name"] for image in session["images"]}))
    values = {"collection_index": 1, "collection_name": collection, "datasets": datasets}
    write_file(path, (json.dumps(values, indent=1) + "\n").encode())


def _dataset(name: str) -> dict[str, Any]:
    # nnssl finds a dataset again by its index as text.
    return {"dataset_index": name, "name": name, "dataset_info": {}, "subjects": {}}


def _subject(name: str) -> dict[str, Any]:
    return {"subject_id": name, "subject_info": {}, "sessions": {}}


def _session(name: str) -> dict[str, Any]:
    return {"session_id": name, "session_info": {}, "images": []}


def _image(entry: Written, taken: set[str]) -> dict[str, Any]:
    name = posixpath.basename(entry.path)
    number = 1
    while name in taken:
        number += 1
        name = f"{number}_{posixpath.basename(entry.path)}"
    raw = os.environ.get(_RAW)
    written = entry.path
    if raw and written.startswith(root := posixpath.normpath(raw) + "/"):
        written = f"${_RAW}/{written[len(root) :]}"
    return {
        "name": name,
        "image_path": written,
        "modality": "CT",
        "image_info": {},
        "associated_masks": dict.fromkeys(("anonymization_mask", "anatomy_mask")),
    }
