"""OME-Zarr images in a bucket: many objects, one source; of them its metadata for a scan, and level 0 for a task."""

import posixpath
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from data_pipeline.reasons import Rejected
from data_pipeline.sources.find import Entry
from data_pipeline.sources.ome_metadata import level_of
from data_pipeline.storage.storage import side_by_side

SUFFIX = ".zarr"
METADATA = ("zarr.json", ".zattrs", ".zgroup", ".zarray")
"""Names of the files that say what an image is."""
ATTRIBUTES = METADATA[:2]
"""Of these, those that say whether it is one."""
_VERSION = "folder "
"""Before the version of an entry that stands for a folder."""
_WIDTH = 16


class Objects(Protocol):
    """What is asked of a bucket."""

    def below(self, prefix: str) -> Iterator[Entry]:
        """All objects below a path."""
        ...

    def fetch_one(self, path: str, folder: Path, name: str) -> Entry:
        """Copy one object to a path of its own below a folder."""
        ...


def is_image_folder(entry: Entry) -> bool:
    """Whether an entry stands for a folder that is one image."""
    return entry.version.startswith(_VERSION)


def gathered(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Entries as a bucket lists them, where what lies below a folder named .zarr is one."""
    image, parts = "", _Parts()
    for entry in entries:
        folders = posixpath.dirname(entry.path).split("/")
        depth = next((at for at, name in enumerate(folders, 1) if name.lower().endswith(SUFFIX)), 0)
        folder = "/".join(folders[:depth])
        if image and folder != image:
            yield parts.entry(image)
            parts = _Parts()
        image = folder
        if folder:
            parts.add(folder, entry)
        else:
            yield entry
    if image:
        yield parts.entry(image)


def folder_entry(folder: str, entries: Iterable[Entry]) -> Entry:
    """One entry for all objects below a folder."""
    parts = _Parts()
    for entry in entries:
        parts.add(folder, entry)
    return parts.entry(folder)


def stage_metadata(objects: Objects, folder: str, target: Path) -> list[Entry]:
    """Copy what an image says of itself to a folder of this machine; all of its objects come back."""
    entries = list(objects.below(folder))
    target.mkdir(parents=True, exist_ok=True)
    _fetch(objects, folder, target, [name for name in _names(folder, entries) if name in METADATA])
    if level := _level(target):
        _fetch(objects, folder, target, [f"{level}/{name}" for name in METADATA], {*_names(folder, entries)})
    return entries


def fetch_image(objects: Objects, folder: str, target: Path) -> Entry:
    """Copy an image, metadata and level 0, to a folder of this machine; what stands for it in a listing comes back."""
    entries = stage_metadata(objects, folder, target)
    if level := _level(target):
        names = _names(folder, entries)
        _fetch(objects, folder, target, [name for name in names if name.startswith(f"{level}/")])
    return folder_entry(folder, entries)


class _Parts:
    """The objects of a folder, added up."""

    def __init__(self) -> None:
        self._size = 0
        self._digest = sha256()

    def add(self, folder: str, entry: Entry) -> None:
        self._size += entry.size
        self._digest.update(repr((entry.path[len(folder) :], entry.size, entry.version)).encode())

    def entry(self, folder: str) -> Entry:
        return Entry(folder, self._size, _VERSION + self._digest.hexdigest())


def _names(folder: str, entries: Iterable[Entry]) -> list[str]:
    return [entry.path[len(folder) + 1 :] for entry in entries]


def _level(target: Path) -> str:
    """The path of level 0; empty where the metadata name none: reading them will say so."""
    try:
        return level_of(target)
    except Rejected:
        return ""


def _fetch(
    objects: Objects, folder: str, target: Path, names: Iterable[str], there: frozenset[str] | set[str] | None = None
) -> None:
    wanted = [name for name in names if there is None or name in there]
    for _ in side_by_side(lambda name: objects.fetch_one(f"{folder}/{name}", target, name), wanted, _WIDTH):
        pass
