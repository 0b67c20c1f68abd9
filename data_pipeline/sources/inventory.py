"""What a source folder holds: every file listed once, every header read once, files put together into sources.

Lists live in a private SQLite file that ends with the process, so memory stays flat however many files there are. What
headers said is kept in the user's cache folder: a scan that was interrupted, or the build after it, reads only what is
new or has changed.
"""

import contextlib
import json
import os
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from data_pipeline.reasons import PASSING, Reason
from data_pipeline.sources.descriptions.find import READ, Described, find_descriptions, listing_of
from data_pipeline.sources.dicom_series import DicomFacts, sources_of
from data_pipeline.sources.find import FACTS_VERSION, Entry, read_facts
from data_pipeline.sources.source import Source
from data_pipeline.storage.source_files import source_files
from data_pipeline.storage.storage import absolute
from mim_scale.commit import sha256_values
from mim_scale.errors import SourceError

_COLUMNS = "(path BLOB PRIMARY KEY, size INTEGER, version TEXT, grp TEXT, facts TEXT)"
_BATCH = 1000
_ENOUGH_FOR_A_POOL = 2000
"""Headers to read from which on processes pay for their start."""

Looked = Callable[[int, int], None]


class Inventory:
    """The sources of one folder.

    Args:
        given: folder tree with volume files and DICOM files of any name, or a list of files (CSV, TSV, Parquet, or
            nnssl's pretrain_data.json): then only what it names counts; or the address of a bucket, or of one file.
        kept: where headers are kept between runs; None keeps nothing.
    """

    def __init__(self, given: Path | str, kept: Path | None = None) -> None:
        listing = self._listing = listing_of(given)
        urls = listing.urls if listing else None
        self._files = source_files(listing.root if listing and not urls else given, urls)
        self.notes: tuple[str, ...] = ()
        """What a user should know about the scan, a line each."""
        self.described = Described()
        """What descriptions or the list say; once headers are read."""
        # An empty name is a private file of SQLite's own that is gone with the connection.
        self._lists = sqlite3.connect("")
        self._lists.executescript(
            f"CREATE TABLE files {_COLUMNS} WITHOUT ROWID;"
            "CREATE TABLE sources (name BLOB PRIMARY KEY, source BLOB) WITHOUT ROWID;"
        )
        self._cache = self._open_cache(kept) if kept is not None else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lists.close()
        if self._cache is not None:
            self._cache.close()

    @property
    def address(self) -> str:
        """What all files lie below, for workers on any machine: an absolute path, or an URL."""
        return self._files.address

    def list_files(self) -> str:
        """List every file; a digest of names, sizes and times comes back.

        Raises:
            SourceError: the folder is missing, or one below it cannot be read.
        """
        digest = sha256()

        def rows() -> Iterator[tuple[bytes, int, str]]:
            for entry in self._files.entries(self._listing.paths if self._listing is not None else None):
                yield os.fsencode(entry.path), entry.size, entry.version

        self._lists.executemany("INSERT INTO files (path, size, version) VALUES (?, ?, ?)", rows())
        self._gather_images()
        self._note_refused()
        for row in self._lists.execute("SELECT path, size, version FROM files ORDER BY path"):
            digest.update(repr(row).encode())
        return digest.hexdigest()

    def read_headers(self, looked: Looked | None = None, workers: int = 1) -> None:
        """Read the headers that are not known yet, and put files together into sources.

        Raises:
            SourceError: nothing is an image, or a dataset description cannot be used.
        """
        self._take_known()
        pending = self._count("files WHERE facts IS NULL")
        done = 0
        with contextlib.ExitStack() as stack:
            # spawn: the parent has threads, and a forked copy of their locks can hang.
            pool = (
                stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
                if pending > _ENOUGH_FOR_A_POOL and workers > 1
                else None
            )
            while batch := self._entries_of(f"WHERE facts IS NULL ORDER BY path LIMIT {_BATCH}"):
                names = [entry.path for entry in batch]
                with self._files.headers(batch, self._below) as root:
                    read = partial(read_facts, root)
                    found = pool.map(read, names, chunksize=50) if pool is not None else map(read, names)
                    self._note(zip(names, found, strict=True))
                done += len(batch)
                if looked is not None:
                    looked(done, pending)
        self._group()

    @property
    def num_sources(self) -> int:
        """Inputs; each ends as a row of the manifest or of the quarantine."""
        return self._count("sources")

    @property
    def num_files(self) -> int:
        """Files below the folder."""
        return self._count("files")

    @property
    def num_ignored(self) -> int:
        """Files that are no images by their name: tables, texts, hidden files."""
        return self._count("""files WHERE facts = '{"kind": "ignored"}'""")

    def sources(self) -> Iterator[Source]:
        """Every source, by name."""
        for (packed,) in self._lists.execute("SELECT source FROM sources ORDER BY name"):
            values = json.loads(zlib.decompress(packed))
            problem = values.pop("problem")
            source = Source(
                **values | {"files": tuple(values["files"])},
                problem=(Reason(problem[0]), problem[1]) if problem else None,
            )
            yield replace(source, urls=self._files.urls(source))

    def _count(self, what: str) -> int:
        count: int = self._lists.execute(f"SELECT COUNT(*) FROM {what}").fetchone()[0]
        return count

    def _open_cache(self, kept: Path) -> sqlite3.Connection | None:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not kept.exists():
                # It holds names of files: for the eyes of its owner only.
                os.close(os.open(kept, os.O_CREAT | os.O_RDWR, 0o600))
            cache = sqlite3.connect(kept, timeout=60)
            if cache.execute("PRAGMA user_version").fetchone()[0] != FACTS_VERSION:
                cache.executescript(f"DROP TABLE IF EXISTS facts; PRAGMA user_version = {FACTS_VERSION};")
            cache.execute(f"CREATE TABLE IF NOT EXISTS facts {_COLUMNS} WITHOUT ROWID")
        except (OSError, sqlite3.Error) as error:
            self._without_cache(error)
            return None
        return cache

    def _without_cache(self, error: Exception) -> None:
        self._cache = None
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        self.notes = (f"headers are not kept for the next run: the cache folder cannot be used ({reason})",)

    def _take_known(self) -> None:
        """Facts of files that have not changed since their header was read."""
        if self._cache is None:
            return
        update = "UPDATE files SET grp = ?, facts = ? WHERE path = ? AND size = ? AND version = ?"
        try:
            known = self._cache.execute("SELECT grp, facts, path, size, version FROM facts")
            while rows := known.fetchmany(_BATCH):
                self._lists.executemany(update, rows)
        except sqlite3.Error as error:
            self._without_cache(error)

    def _gather_images(self) -> None:
        """One entry for a folder that proved to be an image when all of it was listed."""
        for entry in self._files.images():
            # What lies below a folder sorts behind its name and /, and before its name and 0.
            bounds = [os.fsencode(entry.path + end) for end in "/0"]
            self._lists.execute("DELETE FROM files WHERE path > ? AND path < ?", bounds)
            row = (os.fsencode(entry.path), entry.size, entry.version)
            self._lists.execute("INSERT INTO files (path, size, version) VALUES (?, ?, ?)", row)

    def _note_refused(self) -> None:
        """What a list names and nobody can have: that is known without a header."""
        for name, problem in self._files.refused().items():
            facts = json.dumps({"kind": "unknown", "problem": problem})
            self._lists.execute("UPDATE files SET grp = '', facts = ? WHERE path = ?", (facts, os.fsencode(name)))

    def _note(self, found: Iterable[tuple[str, dict[str, Any]]]) -> None:
        rows = []
        lasting = []
        for name, facts in found:
            path = os.fsencode(name)
            problem = facts.get("problem")
            rows.append((facts.get("group", ""), json.dumps(facts), path))
            if not problem or problem[0] not in PASSING:
                lasting.append(path)
        self._lists.executemany("UPDATE files SET grp = ?, facts = ? WHERE path = ?", rows)
        if self._cache is None:
            return
        copies = [
            self._lists.execute("SELECT path, size, version, grp, facts FROM files WHERE path = ?", (path,)).fetchone()
            for path in lasting
        ]
        try:
            with self._cache:
                self._cache.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?, ?)", copies)
        except sqlite3.Error as error:
            self._without_cache(error)

    def _group(self) -> None:
        described = self.described = self._described() if self._listing is None else self._listing.described
        owned = self._add_volumes(described)
        query = (
            "SELECT grp, path, size, version, facts FROM files WHERE grp != '' OR facts LIKE '{\"kind\": \"dicom\"%' "
            "ORDER BY grp, path"
        )
        for group, members in groupby(self._lists.execute(query), key=lambda row: row[0]):
            rows = (row for row in members if row[1] not in owned)
            # What belongs to no series stands alone, so it is never gathered in memory.
            batches: Iterable[list[Any]] = ([row] for row in rows) if not group else iter([list(rows)])
            for batch in batches:
                self._add_series(batch, described)
        self._refuse_no_image()

    def _described(self) -> Described:
        with self._files.descriptions(self._all, READ) as root:
            try:
                return find_descriptions(root, self._names())
            except SourceError as error:
                raise SourceError(str(error).replace(str(root), self._files.address)) from None

    def _all(self) -> Iterator[Entry]:
        for path, size, version in self._lists.execute("SELECT path, size, version FROM files"):
            yield Entry(os.fsdecode(path), size, version)

    def _entries_of(self, where: str, values: tuple[Any, ...] = ()) -> list[Entry]:
        rows = self._lists.execute(f"SELECT path, size, version FROM files {where}", values)
        return [Entry(os.fsdecode(path), size, version) for path, size, version in rows]

    def _below(self, folder: str) -> list[Entry]:
        """Files below a folder, for headers that name their data files."""
        start = os.fsencode(folder and f"{folder}/")
        return self._entries_of("WHERE substr(path, 1, ?) = ? LIMIT 100000", (len(start), start))

    def _names(self) -> Iterator[str]:
        for (path,) in self._lists.execute("SELECT path FROM files ORDER BY path"):
            yield os.fsdecode(path)

    def _add_volumes(self, described: Described) -> set[bytes]:
        """Sources of one file, or of a header and the data files it names; those data files come back."""
        owned: set[bytes] = set()
        query = 'SELECT path, size, version, facts FROM files WHERE facts LIKE \'{"kind": "volume"%\' ORDER BY path'
        for path, size, version, text in self._lists.execute(query):
            facts = json.loads(text)
            name = os.fsdecode(path)
            extra = [os.fsencode(file) for file in facts["extra"]]
            owned.update(extra)
            entries = [Entry(name, size, version), *self._entries(extra)]
            source = Source(
                name,
                facts["format"],
                tuple(entry.path for entry in entries),
                facts["num_voxels"],
                _problem(facts),
                facts["voxel_mm3"],
            )
            self._add(source, entries, described)
        query = 'SELECT path, size, version, facts FROM files WHERE facts LIKE \'{"kind": "unknown"%\' ORDER BY path'
        for path, size, version, text in self._lists.execute(query):
            if path not in owned:
                name = os.fsdecode(path)
                source = Source(name, "unknown", (name,), problem=_problem(json.loads(text)))
                self._add(source, [Entry(name, size, version)], described)
        return owned

    def _entries(self, paths: list[bytes]) -> list[Entry]:
        found = [
            self._lists.execute("SELECT path, size, version FROM files WHERE path = ?", (path,)).fetchone()
            for path in paths
        ]
        return [Entry(os.fsdecode(path), size, version) for path, size, version in filter(None, found)]

    def _add_series(self, rows: list[Any], described: Described) -> None:
        entries = {os.fsdecode(path): Entry(os.fsdecode(path), size, version) for _, path, size, version, _ in rows}
        facts = {os.fsdecode(row[1]): DicomFacts.from_values(json.loads(row[4])["dicom"]) for row in rows}
        for source in sources_of(facts):
            self._add(source, [entries[file] for file in source.files], described)

    def _add(self, source: Source, entries: list[Entry], described: Described) -> None:
        listed = described.of(*source.files)
        problem = source.problem
        subject = ""
        if listed is not None:
            subject = listed.subject or ""
            problem = listed.problem or problem
        source = replace(
            source,
            problem=problem,
            subject=subject,
            version=sha256_values([[entry.path, entry.size, entry.version] for entry in entries]),
            num_bytes=sum(max(entry.size, 0) for entry in entries),
        )
        packed = zlib.compress(json.dumps(asdict(source)).encode(), 1)
        self._lists.execute("INSERT INTO sources VALUES (?, ?)", (os.fsencode(source.name), packed))

    def _refuse_no_image(self) -> None:
        """A folder of texts is a mistake, not an archive."""
        for source in self.sources():
            if source.format != "unknown" or (source.problem is not None and source.problem[0] in PASSING):
                return
        raise SourceError(
            f"{self.address}: no image among {self.num_files} files; expected .nii .nii.gz .nrrd .nhdr .mha .mhd, "
            "OME-Zarr folders or DICOM files"
        )


def _problem(facts: dict[str, Any]) -> tuple[Reason, str] | None:
    problem = facts.get("problem")
    return (Reason(problem[0]), problem[1]) if problem else None


@dataclass(frozen=True)
class Tree:
    """What a small source folder holds, in memory."""

    sources: tuple[Source, ...]
    """Sorted by name."""
    num_ignored: int


def find_sources(root: Path, looked: Looked | None = None) -> Tree:
    """List a folder and read its headers, keeping nothing on disk.

    Raises:
        SourceError: the folder is missing, something below it is out of reach, or nothing in it is an image.
    """
    with Inventory(root) as inventory:
        inventory.list_files()
        inventory.read_headers(looked)
        return Tree(tuple(inventory.sources()), inventory.num_ignored)


def kept_headers(root: Path | str) -> Path:
    """Where the headers of a source are kept between runs: in the user's own cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "mim-scale" / "headers" / f"{sha256(os.fsencode(absolute(str(root)))).hexdigest()[:16]}.sqlite"
