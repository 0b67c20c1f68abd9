"""Files at addresses of their own, in any number of buckets and on any number of web servers, as a list names them."""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from data_pipeline.reasons import Reason
from data_pipeline.sources.find import Entry
from data_pipeline.storage import objects
from data_pipeline.storage.image_folders import (
    METADATA,
    SUFFIX,
    fetch_image,
    folder_entry,
    gathered,
    is_image_folder,
    stage_metadata,
)
from data_pipeline.storage.objects import ObjectStorage
from data_pipeline.storage.refusals import RefusedObjectError
from data_pipeline.storage.storage import side_by_side
from mim_scale.errors import LostObjectError, StorageError

_WIDTH = 16
"""Addresses asked at once."""
_FIRST_PATIENCE_S = 5.0
_PLAIN = re.compile(r"/[A-Za-z0-9._~-]+(?:/[A-Za-z0-9._~-]+)*")
"""Paths of web addresses that mean the same however they are escaped."""

_FOLDER = "the address of a folder on a web server, which cannot be listed: list the files in it instead"
_IMAGE = "an OME-Zarr folder on a web server, which cannot be listed: download it, or put it into a bucket"
_LOST = "nothing is at its address (404): mend the address or put the file there, the next build looks again"


@dataclass(frozen=True)
class Found:
    """What is at one address.

    entries: a file, an image, or the files below a folder of a bucket; where nothing can be had, what stands for it.
    urls: where they are, where that differs from the list.
    problem: why nothing can be had.
    """

    entries: tuple[Entry, ...]
    urls: Mapping[str, str]
    problem: tuple[Reason, str] | None = None


class AddressStorage:
    """Files by the names that stand for their addresses; as a source see `Storage`.

    Args:
        urls: the address of each name.
    """

    def __init__(self, urls: Mapping[str, str]) -> None:
        self._urls = urls

    @property
    def url(self) -> str:
        """None of them can speak for all."""
        return "the addresses of a list"

    def entries(self) -> Iterator[Entry]:
        """Every file."""
        for found in self.look(self._urls):
            yield from found.entries

    def look(self, names: Mapping[str, str]) -> Iterator[Found]:
        """What is at each address, in their order; what cannot be had at one does not end it.

        Raises:
            StorageError: a bucket or a server cannot be used at all.
        """
        # A wrong host says so at once: one address of each is asked impatiently.
        for name, url in {_base(url): (name, url) for name, url in names.items()}.values():
            _look(name, url, min(_FIRST_PATIENCE_S, objects.PATIENCE_S))
        return side_by_side(lambda item: _look(*item), names.items(), _WIDTH)

    def entry(self, path: str) -> Entry:
        """One file by its name."""
        storage, key = _place(self._urls[path])
        return replace(storage.entry(key), path=path)

    def fetch(self, paths: Sequence[str], folder: Path) -> list[Entry]:
        """Copy files and images to their names below a folder."""
        width = min(_WIDTH, len(paths) or 1)
        return list(side_by_side(lambda path: self._fetch(path, folder), paths, width))

    def head(self, entry: Entry, num_bytes: int) -> bytes:
        """The first bytes of a file."""
        storage, key = _place(self._urls[entry.path])
        return storage.head(replace(entry, path=key), num_bytes)

    def fetch_image_header(self, path: str, folder: Path) -> None:
        """Copy what an image says of itself."""
        storage, key = _place(self._urls[path])
        stage_metadata(storage, key, folder / path)

    def local_path(self, path: str) -> Path | None:
        """Nothing can be read in place."""
        return None

    def _fetch(self, path: str, folder: Path) -> Entry:
        storage, key = _place(self._urls[path])
        if self._urls[path].endswith("/"):
            return replace(fetch_image(storage, key, folder / path), path=path)
        return replace(storage.fetch_one(key, folder, path), path=path)


def _look(name: str, url: str, patience_s: float | None = None) -> Found:
    is_web = url.lower().startswith("http")
    if is_web and name.lower().endswith(SUFFIX):
        return _nothing(name, Reason.UNREADABLE, _IMAGE)
    if is_web and urlsplit(url).path.endswith("/"):
        return _nothing(name, Reason.UNREADABLE, _FOLDER)
    storage, key = _place(url, patience_s)
    try:
        found = None if url.endswith("/") else _file(name, url, storage, key)
        if found is None and not is_web:
            found = _below(name, url.rstrip("/"), storage, key)
    except RefusedObjectError as error:
        return _nothing(name, Reason.IO_ERROR, f"{error.detail}, then run the build again")
    return found or _nothing(name, Reason.IO_ERROR, _LOST)


def _file(name: str, url: str, storage: ObjectStorage, key: str) -> Found | None:
    try:
        return Found((replace(storage.entry(key), path=name),), {name: url})
    except LostObjectError:
        return None


def _below(name: str, url: str, storage: ObjectStorage, key: str) -> Found | None:
    """What lies below a folder of a bucket: one image, or files and images."""
    entries = list(storage.below(key))
    if not entries:
        return None
    if name.lower().endswith(SUFFIX) or {entry.path[len(key) + 1 :] for entry in entries} & {*METADATA}:
        return Found((replace(folder_entry(key, entries), path=name),), {name: f"{url}/"})
    below = [replace(entry, path=f"{name}{entry.path[len(key) :]}") for entry in gathered(entries)]
    urls = {entry.path: f"{url}{entry.path[len(name) :]}{'/' if is_image_folder(entry) else ''}" for entry in below}
    return Found(tuple(below), urls)


def _nothing(name: str, reason: Reason, detail: str) -> Found:
    return Found((Entry(name, -1, detail),), {}, (reason, detail))


def refuse_all(label: str, problems: Sequence[tuple[Reason, str]], num_addresses: int) -> None:
    """Where nothing can be had at any address, that is no matter of single inputs."""
    if len(problems) == num_addresses and len({detail for _, detail in problems}) == 1:
        many = f"none of {num_addresses} addresses can be used: " if num_addresses > 1 else ""
        raise StorageError(f"{label}: {many}{problems[0][1]}")


def _base(url: str) -> str:
    """The bucket or the server of an address, without a user's name."""
    scheme, _, rest = url.partition("://")
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    return f"{scheme.lower()}://{host.rpartition('@')[2]}"


def _place(url: str, patience_s: float | None = None) -> tuple[ObjectStorage, str]:
    """The storage of an address, and the path there."""
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    label = _base(url)
    if scheme.lower() in {"s3", "gs"}:
        return _storage(f"{scheme.lower()}://{host}", label, patience_s), path.rstrip("/")
    if _PLAIN.fullmatch(f"/{path}") and not {".", ".."} & set(path.split("/")):
        return _storage(f"{scheme}://{host}", label, patience_s), path
    # Escapes and queries go as they are written: the library would write them in its own way.
    return _storage(url.partition("#")[0], label, patience_s), ""


@functools.lru_cache(256)
def _storage(url: str, label: str, patience_s: float | None) -> ObjectStorage:
    """Kept by the process: its connections are worth keeping."""
    return ObjectStorage(url, label=label, patience_s=patience_s)
