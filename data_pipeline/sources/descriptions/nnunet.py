"""Raw folders of nnU-Net 2: `dataset.json` names the channels, the files' names say case and channel."""

import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipeline.sources.descriptions.listed import Line, Listed, Role, listed_as, person, role_of_modality
from data_pipeline.sources.descriptions.msd import case_of, channel_names
from data_pipeline.sources.descriptions.place import Place

IMAGES = {"imagesTr": "train", "imagesVal": "val", "imagesTs": "test"}
LABELS = {"labelsTr": "train", "labelsVal": "val", "labelsTs": "test"}
_CASE_AND_CHANNEL = re.compile(r"(.+)_(\d{4})")


def is_nnunet(values: Any) -> bool:
    """Whether a dataset.json is of this form."""
    return isinstance(values, dict) and "channel_names" in values


def read_nnunet(place: Place, values: dict[str, Any], members: Mapping[str, list[str]]) -> dict[str, Listed]:
    """What names and channels say about each file.

    Args:
        members: the files of each folder that is called imagesTr, imagesTs, labelsTr, ...

    Raises:
        SourceError: the description cannot be used as it is.
    """
    roles: dict[int, Role] = {
        number: role_of_modality(name) or "other_modality"
        for number, name in channel_names(place, values["channel_names"], "channel_names").items()
    }
    ending = values.get("file_ending", "")
    if not isinstance(ending, str):
        place.refuse("file_ending is no text")
    entries = dict(_by_folder(place, roles, ending, members))
    if "dataset" not in values:
        return entries
    # Files that are named are what they are named as; test images have no other place than their folder.
    return entries | place.enter(_listed_lines(place, roles, values["dataset"]))


def _by_folder(
    place: Place, roles: dict[int, Role], ending: str, members: Mapping[str, list[str]]
) -> Iterator[tuple[str, Listed]]:
    for folder, split in {**IMAGES, **LABELS}.items():
        for file in members.get(posixpath.join(place.folder, folder), []):
            name = case_of(file)
            if not file.endswith(ending):
                continue
            if folder in LABELS:
                yield file, listed_as("label", person(place.dataset, name), place.dataset, split)
            elif found := _CASE_AND_CHANNEL.fullmatch(name):
                role = roles.get(int(found[2]), "other_modality")
                yield file, listed_as(role, person(place.dataset, found[1]), place.dataset, split)


def _listed_lines(place: Place, roles: dict[int, Role], cases: Any) -> Iterator[Line]:
    if not isinstance(cases, dict):
        place.refuse("dataset is no table of cases")
    for number, (case, parts) in enumerate(cases.items()):
        where = f"case {number} of dataset"
        images = parts.get("images") if isinstance(parts, dict) else None
        if not isinstance(images, list) or not images or not all(isinstance(path, str) for path in images):
            place.refuse(f"{where} has no list of images")
        subject = person(place.dataset, case)
        for channel, path in enumerate(images):
            role = roles.get(channel, "other_modality")
            yield Line(where, path, listed_as(role, subject, place.dataset, "train"))
        label = parts.get("label")
        if not isinstance(label, str):
            place.refuse(f"{where} has no label")
        yield Line(where, label, listed_as("label", subject, place.dataset, "train"))
