"""What a scan needs of the place where files lie: their list, their headers, and what describes them."""

import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from data_pipeline.sources.find import Entry, list_files
from data_pipeline.storage.staging import staged_headers
from data_pipeline.storage.storage import Storage, absolute, is_remote, open_storage

_IMAGE_FOLDER = ".zarr"
_NAMING = (".nhdr", ".mhd")
"""Headers that name the files with their data."""


class SourceFiles(Protocol):
    """The files of one source."""

    @property
    def address(self) -> str:
        """For workers on any machine: an absolute path, or an URL."""
        ...

    def entries(self, paths: Iterable[str] | None) -> Iterator[Entry]:
        """Every file, or only those paths and what lies below them; a folder that is one image is one entry."""
        ...

    def headers(self, batch: list[Entry], below: Callable[[str], Sequence[Entry]]) -> AbstractContextManager[Path]:
        """A folder in which the headers of these files can be read.

        Args:
            below: gives the files below a folder.
        """
        ...

    def descriptions(
        self, entries: Callable[[], Iterator[Entry]], names: frozenset[str]
    ) -> AbstractContextManager[Path]:
        """A folder in which files of these names can be read, and in which all others have their place.

        Args:
            entries: gives all files, again whenever it is called.
        """
        ...


def source_files(given: Path | str) -> SourceFiles:
    """The files of a folder or of a bucket."""
    return _InBucket(open_storage(str(given))) if is_remote(str(given)) else _InFolder(Path(given))


class _InFolder:
    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def address(self) -> str:
        return absolute(str(self._root))

    def entries(self, paths: Iterable[str] | None) -> Iterator[Entry]:
        return list_files(self._root, paths)

    def headers(self, batch: list[Entry], below: Callable[[str], Sequence[Entry]]) -> AbstractContextManager[Path]:
        return nullcontext(self._root)

    def descriptions(
        self, entries: Callable[[], Iterator[Entry]], names: frozenset[str]
    ) -> AbstractContextManager[Path]:
        return nullcontext(self._root)


class _InBucket:
    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    @property
    def address(self) -> str:
        return self._storage.url

    def entries(self, paths: Iterable[str] | None) -> Iterator[Entry]:
        """Every object; what lies below a folder named .zarr is one entry, which no reader takes yet."""
        image, size, digest = "", 0, sha256()
        for entry in self._storage.entries():
            folders = posixpath.dirname(entry.path).split("/")
            depth = next((at for at, name in enumerate(folders, 1) if name.lower().endswith(_IMAGE_FOLDER)), 0)
            folder = "/".join(folders[:depth])
            if image and folder != image:
                yield Entry(image, size, digest.hexdigest())
                size, digest = 0, sha256()
            image = folder
            if not folder:
                yield entry
                continue
            size += entry.size
            digest.update(repr(entry).encode())
        if image:
            yield Entry(image, size, digest.hexdigest())

    def headers(self, batch: list[Entry], below: Callable[[str], Sequence[Entry]]) -> AbstractContextManager[Path]:
        folders = {posixpath.dirname(entry.path) for entry in batch if entry.path.lower().endswith(_NAMING)}
        return staged_headers(self._storage, batch, (entry for folder in sorted(folders) for entry in below(folder)))

    def descriptions(
        self, entries: Callable[[], Iterator[Entry]], names: frozenset[str]
    ) -> AbstractContextManager[Path]:
        named = [entry for entry in entries() if posixpath.basename(entry.path) in names]
        return staged_headers(self._storage, named, entries() if named else ())
