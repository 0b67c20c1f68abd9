"""Buckets and web servers, through obstore; its only home. Objects are fetched as listed or not at all."""

import configparser
import hashlib
import os
import random
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError, PreconditionError
from obstore.store import GCSStore, HTTPStore, S3Store

from data_pipeline.sources.find import Entry
from data_pipeline.storage.image_folders import fetch_image, stage_metadata
from data_pipeline.storage.refusals import BrokenObjectError, is_cut, may_pass, no_credentials, refusal
from data_pipeline.storage.storage import side_by_side
from mim_scale.errors import LostObjectError, SourceError, StorageError

PATIENCE_S = 60.0
"""How long a request is tried again while the network or the service fails."""
PAGE = 1000
"""Entries of a listing that are held at once."""
SILENCE_S = 30.0
"""After how long without a byte a request counts as failed."""

_FIRST_TRIES = 2
"""Of the very first request: a wrong address should say so at once."""
_PIECE = 1 << 20
_PART = 8 << 20
"""Bytes of one part of a large upload, at least."""
_MOST_PARTS = 9000
_WIDTH = 16
"""Objects fetched at once."""
_ALIKE = 5
"""Downloads in a row that end at one and the same byte, counted in pieces: then it is not the network."""
_MOST_BREAKS = 20
"""Downloads of one object that get somewhere and break."""
_DIGEST = "sha256"
"""Name of the metadata field that holds an object's SHA-256, in hex."""
_NO_PATH = ("", ".", "..")
_MODES = (AlreadyExistsError, PreconditionError, NotSupportedError)
_REFUSED = (BaseError, FileNotFoundError, ValueError)

Result = TypeVar("Result")


class ObjectStorage:
    """Objects below one address; as a source see `Storage`, as a target `put` and what follows.

    Args:
        url: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, http(s)://HOST/PATH.
        names: paths below it, where it cannot be listed.
        patience_s: how long failures that may pass are waited for; None is PATIENCE_S.
        label: what messages call it, where the address itself names an object; None is the address.

    Raises:
        SourceError: the address names no bucket.
        StorageError: there are no credentials.
    """

    def __init__(
        self,
        url: str,
        names: Iterable[str] | None = None,
        patience_s: float | None = None,
        label: str | None = None,
    ) -> None:
        self.url = url if label is None else label
        self._names = None if names is None else tuple(names)
        self._patience_s = PATIENCE_S if patience_s is None else patience_s
        self._store = _open(url, self._patience_s, 30)
        self._is_web = self._store.__class__ is HTTPStore

    def check(self) -> None:
        """Ask for something, impatiently: a wrong address, bucket or secret shows here.

        Raises:
            StorageError: it cannot be used.
        """
        if self._is_web:
            return
        store = _open(self.url, min(5.0, self._patience_s), _FIRST_TRIES)
        try:
            next(iter(obstore.list(store, chunk_size=1)), None)
        except _REFUSED as error:
            raise refusal(error, self.url) from None

    def entries(self) -> Iterator[Entry]:
        """Every object, a page at a time; empty ones that mark folders are passed over."""
        if self._names is not None:
            yield from side_by_side(self.entry, self._names, _WIDTH)
            return
        if self._is_web:
            raise SourceError(
                f"{self.url}: a web server cannot be listed; give a list (.csv, .tsv or .parquet) whose column path "
                "holds the addresses of its files"
            )
        self.check()
        yield from self._list()

    def listed(self, prefix: str | None) -> dict[str, int]:
        """Sizes of all objects below a path (None: below the address), by path."""
        return {entry.path: entry.size for entry in self._list(prefix)}

    def paths(self, prefix: str) -> Iterator[str]:
        """All objects below a path, a page at a time."""
        return (entry.path for entry in self._list(prefix))

    def below(self, prefix: str) -> Iterator[Entry]:
        """All objects below a path, a page at a time, as they are listed."""
        return self._list(prefix)

    def entry(self, path: str) -> Entry:
        """One object by its path; LostObjectError where there is none."""
        return _entry(self._asked(lambda: self._met(path) if self._is_web else obstore.head(self._store, path)), path)

    def fetch(self, paths: Sequence[str], folder: Path) -> list[Entry]:
        """Copy objects to the same paths below a folder; all that an image needs where a path ends with /."""

        def fetched(path: str) -> Entry:
            if path.endswith("/"):
                return fetch_image(self, path.rstrip("/"), folder / path)
            return self.fetch_one(path, folder, path)

        return list(side_by_side(fetched, paths, min(_WIDTH, len(paths) or 1)))

    def fetch_image_header(self, path: str, folder: Path) -> None:
        """Copy what an image says of itself."""
        stage_metadata(self, path, folder / path)

    def head(self, entry: Entry, num_bytes: int) -> bytes:
        """The first bytes of an object."""
        end = min(num_bytes, entry.size)
        if not end:
            return b""
        try:
            return self._asked(lambda: bytes(self._get(entry, {"range": (0, end)}).bytes()), _MODES[-1:])
        except NotSupportedError:
            # A web server without range requests sends all: the rest is left unread.
            return self._asked(lambda: bytes(next(iter(self._get(entry, {}).stream(end)))[:end]))

    def local_path(self, path: str) -> Path | None:
        """Nothing can be read in place."""
        return None

    def read(self, path: str) -> tuple[bytes, str | None]:
        """A small object and its entity tag; LostObjectError where there is none."""

        def work() -> tuple[bytes, str | None]:
            found = obstore.get(self._store, path)
            return bytes(found.bytes()), found.meta["e_tag"]

        return self._asked(work)

    def digest(self, path: str) -> str | None:
        """The SHA-256 that an object was put with; None where it says none, or is not there."""
        try:
            found = self._asked(lambda: obstore.get(self._store, path, options={"head": True}).attributes)
        except LostObjectError:
            return None
        return found.get(_DIGEST)

    def put(self, path: str, data: bytes | Path, digest: str) -> None:
        """Write an object whole or not at all, with its SHA-256."""
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        part = max(_PART, -(-size // _MOST_PARTS))
        attributes = {_DIGEST: digest}
        self._asked(
            lambda: obstore.put(
                self._store, path, data, attributes=attributes, chunk_size=part, max_concurrency=2,
                use_multipart=size > part,
            )
        )  # fmt: skip

    def replace(self, path: str, data: bytes, digest: str, tag: str | None) -> bool:
        """Write an object if it still is the one with this entity tag (None: if it is not there); False where not."""
        mode: Any = "create" if tag is None else {"e_tag": tag}
        try:
            self._asked(lambda: obstore.put(self._store, path, data, attributes={_DIGEST: digest}, mode=mode), _MODES)
        except (AlreadyExistsError, PreconditionError):
            # Ours, where the answer to an earlier try was lost on the way.
            return self.digest(path) == digest
        except NotSupportedError:
            self.put(path, data, digest)
        return True

    def copy(self, path: str, other: str) -> None:
        """Copy an object inside the storage, metadata included."""
        self._asked(lambda: obstore.copy(self._store, path, other))

    def delete(self, paths: Sequence[str]) -> None:
        """Remove objects."""
        self._asked(lambda: obstore.delete(self._store, list(paths)))

    def _list(self, prefix: str | None = None) -> Iterator[Entry]:
        empty: Entry | None = None
        try:
            for page in obstore.list(self._store, prefix, chunk_size=PAGE):
                for meta in page:
                    entry = _entry(meta, meta["path"])
                    # Editors of buckets mark folders by empty objects, just before what the folders hold.
                    if empty is not None and not entry.path.startswith(empty.path + "/"):
                        yield empty
                    empty = None if entry.size else entry
                    if entry.size:
                        yield entry
        except _REFUSED as error:
            raise refusal(error, self.url) from None
        if empty is not None:
            yield empty

    def _get(self, entry: Entry, options: Any) -> Any:
        if entry.version.startswith(('"', "W/")):
            options = options | {"if_match": entry.version}
        found = obstore.get(self._store, entry.path, options=options)
        if _entry(found.meta, entry.path) != entry:
            raise LostObjectError(f"{self.url}: an object changed since it was listed; look again")
        return found

    def _met(self, path: str) -> Any:
        """What a web server says of a file, by reading: addresses that are signed for that alone refuse HEAD."""
        try:
            return obstore.get(self._store, path, options={"range": (0, 1)}).meta
        except BaseError as error:
            # No ranges; or an empty file, which has no first byte.
            if not isinstance(error, NotSupportedError) and "416" not in str(error):
                raise
        try:
            return obstore.head(self._store, path)
        except _REFUSED:
            return obstore.get(self._store, path).meta

    def fetch_one(self, path: str, folder: Path, name: str) -> Entry:
        """Copy one object to a path of its own below a folder."""
        target = folder / name
        if any(part in _NO_PATH for part in path.split("/") if path):
            raise StorageError(f"{self.url}: a key in it leads out of the folder; rename it")
        ends: list[int] = []
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            return self._asked(lambda: self._download(path, target, ends), ends=ends)
        except OSError as error:
            raise StorageError(
                f"{folder}: an object cannot be staged here ({error.strerror}); make room, or set MIM_SCALE_SCRATCH"
            ) from None

    def _download(self, path: str, target: Path, ends: list[int]) -> Entry:
        """Copy one object; how far a try came that failed is added to `ends`."""
        found = obstore.get(self._store, path)
        entry = _entry(found.meta, path)
        expected = found.attributes.get(_DIGEST)
        digest = hashlib.sha256() if expected else None
        with open(target, "wb") as file:
            try:
                for piece in found.stream(_PIECE):
                    file.write(piece)
                    if digest:
                        digest.update(piece)
            except _REFUSED:
                ends.append(file.tell())
                raise
            size = file.tell()
        if size != entry.size or (digest and digest.hexdigest() != expected):
            raise LostObjectError(f"{self.url}: an object came with other bytes than it was put with; look again")
        return entry

    def _asked(
        self, work: Callable[[], Result], expected: tuple[type[Exception], ...] = (), ends: Sequence[int] = ()
    ) -> Result:
        """Do what asks the storage; obstore repeats single requests, this repeats the whole of it.

        Args:
            ends: how many bytes came before each failure: while some come, the storage is not away.
        """
        until = time.monotonic() + self._patience_s
        wait_s = 0.2
        while True:
            num_before = len(ends)
            try:
                return work()
            except expected:
                raise
            except _REFUSED as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # of this machine's disk
                if num_before < len(ends) <= _MOST_BREAKS and is_cut(error):
                    until = time.monotonic() + self._patience_s
                    if len(ends) >= _ALIKE and len({*ends[-_ALIKE:]}) == 1:
                        line = f"{self.url}: an object breaks off at the same byte each time"
                        raise BrokenObjectError(line) from None
                if not may_pass(error) or time.monotonic() + wait_s > until:
                    raise refusal(error, self.url) from None
            time.sleep(wait_s * random.uniform(0.5, 1.5))
            wait_s = min(2 * wait_s, 10.0)


def _entry(meta: Any, path: str) -> Entry:
    return Entry(path, meta["size"], meta["e_tag"] or meta["last_modified"].isoformat())


def _open(url: str, patience_s: float, tries: int) -> Any:
    parts = urlsplit(url)
    scheme, bucket, prefix = parts.scheme.lower(), parts.netloc, url.split("://", 1)[1].partition("/")[2].strip("/")
    if not bucket:
        raise SourceError(
            f"{url}: names no {'bucket' if scheme in {'s3', 'gs'} else 'host'}; give {scheme}://NAME/PATH"
        )
    # The whole of a large object may take long; silence may not.
    client: dict[str, Any] = {
        "allow_http": True,
        "connect_timeout": timedelta(seconds=5),
        "read_timeout": timedelta(seconds=SILENCE_S),
        "timeout": timedelta(hours=2),
    }
    if bundle := os.environ.get("AWS_CA_BUNDLE"):
        client["root_certificate"] = _read(bundle)
    backoff = {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2}
    retry: Any = {"max_retries": tries, "backoff": backoff, "retry_timeout": timedelta(seconds=patience_s)}
    options: dict[str, Any] = {"client_options": client, "retry_config": retry}
    try:
        if scheme == "s3":
            return S3Store(bucket, prefix=prefix or None, **options, **_aws_credentials(url))
        if scheme == "gs":
            return GCSStore(bucket, prefix=prefix or None, **options)
        return HTTPStore(url, **options)
    except _REFUSED as error:
        raise refusal(error, url) from None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as error:
        raise StorageError(f"{path}: AWS_CA_BUNDLE cannot be read ({error.strerror}); mend the variable") from None


def _aws_credentials(url: str) -> dict[str, Any]:
    """What the environment does not hold itself: keys of the user's profile. Instances of EC2 have their own source.

    Raises:
        StorageError: there are no credentials anywhere.
    """
    in_environment = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SKIP_SIGNATURE")
    containers = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
    if any(os.environ.get(name) for name in (*in_environment, *containers)):
        return {}
    profiles = configparser.ConfigParser(interpolation=None)
    profiles.read(Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or Path.home() / ".aws" / "credentials"))
    profile = os.environ.get("AWS_PROFILE") or "default"
    names = {"access_key_id": "aws_access_key_id", "secret_access_key": "aws_secret_access_key"}
    names["session_token"] = "aws_session_token"
    found = {name: value for name, key in names.items() if (value := profiles.get(profile, key, fallback=""))}
    if found:
        return found
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() != "true" and _is_instance():
        return {}
    raise no_credentials(url)


def _is_instance() -> bool:
    """Whether something answers where EC2 hands out credentials."""
    place = urlsplit(os.environ.get("AWS_METADATA_ENDPOINT") or "http://169.254.169.254")
    try:
        socket.create_connection((place.hostname or "", place.port or 80), timeout=1).close()
    except OSError:
        return False
    return True
