"""`dataset.json` of the Medical Segmentation Decathlon, of nnU-Net 1, and of MONAI's lists in the same form."""

import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipeline.sources.descriptions.listed import (
    NOT_CT,
    SEVERAL,
    Line,
    Listed,
    listed_as,
    person,
    role_of_modality,
)
from data_pipeline.sources.descriptions.place import Place, below

_LISTS = {"training": "train", "validation": "val", "test": "test"}
_MARKS = frozenset({"modality", "tensorImageSize", "numTraining", "labels", "numTest", "test"})
_SUFFIX = re.compile(r"(\.nii\.gz|\.nii|\.nrrd|\.nhdr|\.mha|\.mhd|\.[^.]*)$", re.IGNORECASE)


def is_msd(values: Any) -> bool:
    """Whether a dataset.json is of this form."""
    return isinstance(values, dict) and "training" in values and bool(_MARKS & values.keys())


def read_msd(place: Place, values: dict[str, Any]) -> dict[str, Listed]:
    """What the training, validation and test lists say about each file.

    Raises:
        SourceError: the description cannot be used as it is.
    """
    modalities = channel_names(place, values.get("modality"), "modality")
    return place.enter(_lines(place, values, modalities))


def channel_names(place: Place, values: Any, key: str) -> dict[int, str]:
    """Names by channel number."""
    if values is None:
        return {}
    if isinstance(values, str):
        return {0: values}
    if isinstance(values, list):
        values = {str(index): name for index, name in enumerate(values)}
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values.values()):
        place.refuse(f"{key} is no table of names")
    try:
        return {int(number): name for number, name in values.items()}
    except ValueError:
        place.refuse(f"{key} has a channel whose number is no number")


def case_of(path: str) -> str:
    """The name of a case: the file's, without suffix."""
    return _SUFFIX.sub("", posixpath.basename(path.replace("\\", "/")))


def _lines(place: Place, values: dict[str, Any], modalities: dict[int, str]) -> Iterator[Line]:
    for name, split in _LISTS.items():
        entries = values.get(name, [])
        if not isinstance(entries, list):
            place.refuse(f"{name} is no list")
        for index, entry in enumerate(entries):
            where = f"{name}[{index}]"
            pair = {"image": entry} if isinstance(entry, str) else entry
            if not isinstance(pair, dict) or "image" not in pair:
                place.refuse(f"{where} has no image")
            images = _paths(place, pair["image"], f"{where}.image")
            subject = person(place.dataset, case_of(images[0]))
            yield from _images(place, images, f"{where}.image", modalities, Listed("", subject, place.dataset, split))
            labels = _paths(place, pair["label"], f"{where}.label") if pair.get("label") else []
            for label in labels:
                yield Line(f"{where}.label", label, listed_as("label", subject, place.dataset, split))


def _paths(place: Place, written: Any, where: str) -> list[str]:
    paths = [written] if isinstance(written, str) else written
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
        place.refuse(f"{where} is no path")
    return paths


def _images(place: Place, images: list[str], where: str, modalities: dict[int, str], said: Listed) -> Iterator[Line]:
    if len(images) == 1 and not _is_there(place, images[0]):
        # nnU-Net 1 writes the case here and stores one file a channel beside it.
        channels = [(number, _channel_file(images[0], number)) for number in modalities or {0: ""}]
        present = [(number, path) for number, path in channels if _is_there(place, path)]
        if present:
            yield from (Line(where, path, _one(modalities.get(number, ""), said)) for number, path in present)
            return
    if len(images) > 1:
        yield from (Line(where, path, _one(modalities.get(number, ""), said)) for number, path in enumerate(images))
        return
    roles = {role_of_modality(name) for name in modalities.values()}
    if len(modalities) < 2 or len(roles) == 1:
        yield Line(where, images[0], _one(next(iter(modalities.values()), ""), said))
    else:
        yield Line(where, images[0], Listed("other_modality", said.subject, said.dataset, said.split, SEVERAL))


def _one(modality: str, said: Listed) -> Listed:
    role = role_of_modality(modality)
    problem = NOT_CT if role == "other_modality" else None
    return Listed(role, said.subject, said.dataset, said.split, problem)


def _is_there(place: Place, written: str) -> bool:
    path = below(written.replace("\\", "/"), place.folder)
    return path is not None and place.is_there(path)


def _channel_file(path: str, number: int) -> str:
    suffix = _SUFFIX.search(posixpath.basename(path))
    ending = suffix[0] if suffix else ""
    return f"{path[: len(path) - len(ending)]}_{number:04d}{ending}"
