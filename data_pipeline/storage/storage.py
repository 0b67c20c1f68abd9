"""Where inputs lie: a folder, a bucket or a web server behind one small protocol; a folder is read in place.

Credentials come from the usual environment: AWS_* (also AWS_ENDPOINT_URL, AWS_REGION, AWS_PROFILE), GOOGLE_*.
"""

import itertools
import os
import posixpath
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from data_pipeline.sources.find import Entry, list_files
from mim_scale.errors import LostObjectError, SourceError

SCHEMES = ("s3://", "gs://", "http://", "https://")
"""How the addresses of what is no folder start."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Storage(Protocol):
    """Files below one address, for reading."""

    @property
    def url(self) -> str:
        """The address, as the user gave it."""
        ...

    def entries(self) -> Iterator[Entry]:
        """Every file, a page at a time: no more than one page is held, whatever their number."""
        ...

    def entry(self, path: str) -> Entry:
        """One file by its path; LostObjectError where there is none."""
        ...

    def fetch(self, paths: Sequence[str], folder: Path) -> list[Entry]:
        """Copy files to the same paths below a folder, side by side; failures that may pass are tried again.

        Args:
            paths: of files; that of a folder that is one image ends with /.

        Returns:
            What was copied, in the same order: with `Source.version` it shows whether it is what was listed.

        Raises:
            LostObjectError: one is gone, or changed while it was copied.
            StorageError: the storage refuses, cannot be reached, or the folder's disk is full.
        """
        ...

    def head(self, entry: Entry, num_bytes: int) -> bytes:
        """The first bytes of a file: as many as asked for, or all that it has; raises like `fetch`."""
        ...

    def fetch_image_header(self, path: str, folder: Path) -> None:
        """Copy what a folder that is one image says of itself to the same path below a folder."""
        ...

    def local_path(self, path: str) -> Path | None:
        """Where the file can be read in place; None where it must be fetched."""
        ...


class LocalFolder:
    """A folder of this machine."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def url(self) -> str:
        """The folder's path."""
        return str(self._root)

    def entries(self) -> Iterator[Entry]:
        """Every file; SourceError where the folder is missing or one below it cannot be read."""
        return list_files(self._root)

    def entry(self, path: str) -> Entry:
        """One file by its path."""
        try:
            found = (self._root / path).stat()
        except OSError as error:
            raise LostObjectError(f"{self._root}: a file cannot be read ({error.strerror}); look again") from None
        return Entry(path, found.st_size, str(found.st_mtime_ns))

    def fetch(self, paths: Sequence[str], folder: Path) -> list[Entry]:
        """Copy files; seldom needed, as they can be read in place."""
        entries = [self.entry(path) for path in paths]
        for entry in entries:
            target = folder / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._root / entry.path, target)
            if self.entry(entry.path) != entry:
                raise LostObjectError(f"{self._root}: a file changed while it was copied; start again")
        return entries

    def head(self, entry: Entry, num_bytes: int) -> bytes:
        """The first bytes of a file."""
        with open(self._root / entry.path, "rb") as file:
            return file.read(num_bytes)

    def fetch_image_header(self, path: str, folder: Path) -> None:
        """Nothing to do: it is read in place."""

    def local_path(self, path: str) -> Path | None:
        """The file itself."""
        return self._root / path


def is_remote(address: str) -> bool:
    """Whether an address names a bucket or a web server, not a folder."""
    return address.lower().startswith(SCHEMES)


def absolute(address: str) -> str:
    """An address that means the same to every process: a folder's is made absolute, links followed."""
    return address if is_remote(address) else os.path.realpath(address)


def open_storage(url: str, names: Iterable[str] | None = None, patience_s: float | None = None) -> Storage:
    """The storage at an address: a path, file://, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, or http(s)://HOST/PATH.

    Args:
        names: paths below it, where it cannot be listed: a web server's, from a table.
        patience_s: how long a request is tried again while the network or the service fails; None is a minute.

    Raises:
        SourceError: the address is of no known kind.
        StorageError: there are no credentials for it.
    """
    if is_remote(url):
        from data_pipeline.storage.objects import ObjectStorage

        return ObjectStorage(url, names, patience_s)
    if url.startswith("file://"):
        return LocalFolder(Path(url.removeprefix("file://")))
    if "://" in url:
        scheme = url.partition("://")[0]
        raise SourceError(
            f"{scheme}:// is no storage that can be read; use a folder, s3://, gs://, http:// or https://"
        )
    return LocalFolder(Path(url))


def by_folder(entries: Iterable[Entry], at_least: int = 1000) -> Iterator[list[Entry]]:
    """Entries in groups that are small enough to be staged, and that do not part the files of one folder.

    A folder of more than 50 times as many is parted all the same.
    """
    group: list[Entry] = []
    for _, members in itertools.groupby(entries, lambda entry: posixpath.dirname(entry.path)):
        for entry in members:
            group.append(entry)
            if len(group) >= 50 * at_least:
                yield group
                group = []
        if len(group) >= at_least:
            yield group
            group = []
    if group:
        yield group


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item], width: int) -> Iterator[Result]:
    """Results in the items' order, so many at work at once; items are taken no sooner. The first error ends it."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(width) as pool:
        try:
            for item in items:
                if len(waiting) >= 2 * width:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(work, item))
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def scratch_folder() -> Path:
    """Where files are staged: $MIM_SCALE_SCRATCH, else below the system's folder for temporary files."""
    named = os.environ.get("MIM_SCALE_SCRATCH")
    if named:
        return Path(named)
    import tempfile

    return Path(tempfile.gettempdir()) / f"mim-scale-scratch-{os.getuid()}"
