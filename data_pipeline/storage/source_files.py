"""What a scan needs of the place where files lie: their list, their headers, and what describes them."""

import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

from data_pipeline.reasons import Reason
from data_pipeline.sources.descriptions.addresses import shown
from data_pipeline.sources.find import Entry, list_files
from data_pipeline.sources.ome_metadata import is_ome_zarr
from data_pipeline.sources.source import Source
from data_pipeline.storage.image_folders import ATTRIBUTES, Objects, folder_entry, gathered
from data_pipeline.storage.staging import staged_headers
from data_pipeline.storage.storage import Storage, absolute, is_remote, open_storage
from mim_scale.errors import SourceError

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

    def images(self) -> Iterator[Entry]:
        """Folders that are one image, among what `entries` gave as files; after it."""
        ...

    def refused(self) -> Mapping[str, tuple[Reason, str]]:
        """Why nothing can be had where the list says, by path; after `entries`."""
        ...

    def urls(self, source: Source) -> tuple[str, ...]:
        """`Source.urls`."""
        ...


def source_files(given: Path | str, urls: Mapping[str, str] | None = None) -> SourceFiles:
    """The files of a folder, of a bucket, or at the addresses of a list.

    Args:
        urls: the addresses, by the names that stand for them; none where the source is no such list.
    """
    if urls:
        return _AtAddresses(str(given), urls)
    if str(given).startswith("file://"):
        raise SourceError(f"{given}: give the path alone, without file://")
    if is_remote(str(given)):
        from data_pipeline.storage.objects import ObjectStorage

        return _InBucket(ObjectStorage(str(given)))
    if "://" in str(given):
        open_storage(str(given))  # says that there is no such storage
    return _InFolder(Path(given))


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

    def images(self) -> Iterator[Entry]:
        return iter(())

    def refused(self) -> Mapping[str, tuple[Reason, str]]:
        return {}

    def urls(self, source: Source) -> tuple[str, ...]:
        return ()


class _Bucket(Storage, Objects, Protocol):
    """A storage that lists what lies below a path."""


class _InBucket:
    def __init__(self, storage: _Bucket) -> None:
        self._storage = storage
        self._marked: dict[str, list[Entry]] = {}
        """Folders with metadata of Zarr in them, and that."""

    @property
    def address(self) -> str:
        return self._storage.url

    def entries(self, paths: Iterable[str] | None) -> Iterator[Entry]:
        """Every object; what lies below a folder named .zarr is one entry.

        Raises:
            SourceError: nothing lies below the address.
        """
        is_empty = True
        for entry in gathered(self._storage.entries()):
            is_empty = False
            folder, _, name = entry.path.rpartition("/")
            if name in ATTRIBUTES:
                self._marked.setdefault(folder, []).append(entry)
            yield entry
        if is_empty:
            raise SourceError(
                f"{self.address}: nothing lies below this address; mend it, or give a list (.csv) that names single "
                "objects"
            )

    def headers(self, batch: list[Entry], below: Callable[[str], Sequence[Entry]]) -> AbstractContextManager[Path]:
        return staged_headers(self._storage, batch, _beside(batch, below))

    def descriptions(
        self, entries: Callable[[], Iterator[Entry]], names: frozenset[str]
    ) -> AbstractContextManager[Path]:
        named = [entry for entry in entries() if posixpath.basename(entry.path) in names]
        return staged_headers(self._storage, named, entries() if named else ())

    def images(self) -> Iterator[Entry]:
        """By what the metadata say: those whose names end in .zarr were one entry from the start.

        Raises:
            SourceError: all below the address is one image.
        """
        image: list[str] = []
        with staged_headers(self._storage, [entry for entries in self._marked.values() for entry in entries]) as root:
            # By parts: what lies below a folder then follows it.
            for parts in sorted(folder.split("/") for folder in self._marked):
                folder = "/".join(parts)
                if (image and parts[: len(image)] == image) or not is_ome_zarr(root / folder):
                    continue
                if not folder:
                    raise SourceError(
                        f"{self.address}: is one OME-Zarr image; name it in a list (.csv), or rename it *.zarr"
                    )
                image = parts
                yield folder_entry(folder, self._storage.below(folder))

    def refused(self) -> Mapping[str, tuple[Reason, str]]:
        return {}

    def urls(self, source: Source) -> tuple[str, ...]:
        return ()


class _AtAddresses:
    def __init__(self, address: str, urls: Mapping[str, str]) -> None:
        from data_pipeline.storage.addresses import AddressStorage

        # One address may hold a signature: its name does not.
        self._address = shown(next(iter(urls))) if is_remote(address) else absolute(address)
        self._listed = urls
        self._urls: dict[str, str] = {}
        self._refused: dict[str, tuple[Reason, str]] = {}
        self._storage = AddressStorage(self._urls)

    @property
    def address(self) -> str:
        return self._address

    def entries(self, paths: Iterable[str] | None) -> Iterator[Entry]:
        """What is at each address, and what stands for those where nothing can be had.

        Raises:
            StorageError: nothing can be had at any of them.
        """
        from data_pipeline.storage.addresses import refuse_all

        for found in self._storage.look(self._listed):
            if found.problem is not None:
                self._refused[found.entries[0].path] = found.problem
            # A file can be listed by itself and with the folder that holds it.
            yield from (entry for entry in found.entries if entry.path not in self._urls)
            self._urls.update(found.urls)
        refuse_all(self._address, list(self._refused.values()), len(self._listed))

    def headers(self, batch: list[Entry], below: Callable[[str], Sequence[Entry]]) -> AbstractContextManager[Path]:
        return staged_headers(self._storage, batch, _beside(batch, below))

    def descriptions(
        self, entries: Callable[[], Iterator[Entry]], names: frozenset[str]
    ) -> AbstractContextManager[Path]:
        return staged_headers(self._storage, ())

    def images(self) -> Iterator[Entry]:
        return iter(())

    def refused(self) -> Mapping[str, tuple[Reason, str]]:
        return self._refused

    def urls(self, source: Source) -> tuple[str, ...]:
        # What is refused has no address that anything could be fetched from, and is not fetched.
        return tuple(self._urls.get(file, "") for file in source.files)


def _beside(batch: Iterable[Entry], below: Callable[[str], Sequence[Entry]]) -> Iterator[Entry]:
    """What lies beside headers that name the files with their data."""
    folders = {posixpath.dirname(entry.path) for entry in batch if entry.path.lower().endswith(_NAMING)}
    return (entry for folder in sorted(folders) for entry in below(folder))
