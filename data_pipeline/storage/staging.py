"""Files of a remote source on this machine's disk while somebody reads them: headers for a scan, all for a task.

A folder of files is held by a lock that the system lets go of when the process ends, so leftovers of killed ones are
told from folders in use, and removed.
"""

import fcntl
import functools
import io
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from data_pipeline.reasons import Reason, Rejected
from data_pipeline.sources.dicom_header import read_header
from data_pipeline.sources.find import Entry
from data_pipeline.storage.image_folders import is_image_folder
from data_pipeline.storage.refusals import BrokenObjectError
from data_pipeline.storage.storage import Storage, is_remote, open_storage, scratch_folder, side_by_side
from mim_scale.commit import sha256_values
from mim_scale.errors import LostObjectError, StorageError

_PREFIX = "mim-scale-"
_FIRST_BYTES = (1 << 16, 1 << 20)
"""Read of a file until its header is whole; after the last, all of it."""
_WIDTH = 32
"""Headers fetched at once: each is a wait for the network, hardly any work."""
_WHOLE_SUFFIXES = (".json", ".csv", ".tsv", ".parquet", ".txt", ".zattrs")
"""Descriptions of data sets: there is no first part of them that would do."""
_LARGEST_DESCRIPTION = 1 << 28


@contextmanager
def staged(
    address: str,
    files: Sequence[str],
    version: str,
    num_bytes: int = 0,
    urls: Sequence[str] = (),
    is_image: bool = False,
) -> Iterator[Path]:
    """A folder that holds these files of a source at these paths; removed at the end. A local source is its own folder.

    Args:
        address: of the source: a folder, or an URL.
        version: `Source.version`, the digest of what was listed.
        num_bytes: of the files; looked for on the disk before anything is fetched.
        urls: `Source.urls`: the files' own addresses, where they have such.
        is_image: whether the one file is a folder that is an image.

    Raises:
        Rejected: a file is gone, or is not the one that was listed.
        StorageError: the storage cannot be used, or the disk is full: the next source would fare no better.
    """
    if not urls and not is_remote(address):
        yield Path(address)
        return
    with _held_folder(num_bytes) as folder:
        try:
            entries = _fetch(address, files, urls, is_image, folder)
        except BrokenObjectError:
            raise Rejected(Reason.IO_ERROR, "a file breaks off at the same byte whenever it is fetched") from None
        except LostObjectError:
            raise Rejected(Reason.IO_ERROR, "a file is gone since it was listed; the next build looks again") from None
        if sha256_values([[entry.path, entry.size, entry.version] for entry in entries]) != version:
            raise Rejected(Reason.IO_ERROR, "a file changed since it was listed; the next build reads it anew")
        yield folder


@contextmanager
def staged_headers(storage: Storage, entries: Sequence[Entry], beside: Iterable[Entry] = ()) -> Iterator[Path]:
    """A folder with a file of the right name and size for each entry, of which only what the header takes is there.

    Descriptions of data sets are there in full. The rest of the others is a hole: it takes no room and reads as zeros.

    Args:
        beside: files of which only the name and the size matter.

    Raises:
        LostObjectError: a file is gone, or is another than was listed.
        StorageError: the storage cannot be used, or the disk is full.
    """
    local = storage.local_path("")
    if local is not None:
        yield local
        return
    with _held_folder() as folder:
        for entry in beside:
            if not is_image_folder(entry):
                _write(folder, entry, b"")
        for _ in side_by_side(lambda entry: _stage_header(storage, entry, folder), entries, _WIDTH):
            pass
        yield folder


def header_of(storage: Storage, entry: Entry) -> bytes:
    """The first bytes of a file, as many as its header takes; all of it where that cannot be told."""
    whole = _rule(entry)
    for size in _FIRST_BYTES if whole is not None else ():
        first = storage.head(entry, size)
        if len(first) == entry.size or (whole is not None and whole(first)):
            return first
    return storage.head(entry, entry.size)


def remove_leftovers() -> None:
    """Delete staged files of processes that were killed; folders in use are left alone."""
    for folder in scratch_folder().glob(f"{_PREFIX}*"):
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


@contextmanager
def _held_folder(num_bytes: int = 0) -> Iterator[Path]:
    """A private folder in the scratch folder, locked while it is in use."""
    _clean_once()
    root = scratch_folder()
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        free = shutil.disk_usage(root).free
        if num_bytes > free:
            raise StorageError(
                f"{root}: {free / 1e9:.1f} GB are free and {num_bytes / 1e9:.1f} GB are to be staged; make room, or "
                "set MIM_SCALE_SCRATCH to a larger disk"
            )
        folder, descriptor = _locked_folder(root)
    except OSError as error:
        raise StorageError(
            f"{root}: files cannot be staged here ({error.strerror}); set MIM_SCALE_SCRATCH to another folder"
        ) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _locked_folder(root: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        # Somebody who cleans up can come between the two calls: then the folder is gone, and another is made.
        with suppress(FileNotFoundError, BlockingIOError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                folder.stat()
            except OSError:
                os.close(descriptor)
                raise
            return folder, descriptor


@functools.cache
def _clean_once() -> None:
    remove_leftovers()


def _fetch(address: str, files: Sequence[str], urls: Sequence[str], is_image: bool, folder: Path) -> list[Entry]:
    if urls:
        from data_pipeline.storage.addresses import AddressStorage

        return AddressStorage(dict(zip(files, urls, strict=True))).fetch(files, folder)
    return _opened(address).fetch([f"{file}/" for file in files] if is_image else files, folder)


@functools.lru_cache(4)
def _opened(address: str) -> Storage:
    """Kept by the process: its connections are worth keeping."""
    return open_storage(address)


def _stage_header(storage: Storage, entry: Entry, folder: Path) -> None:
    if is_image_folder(entry):
        storage.fetch_image_header(entry.path, folder)
        return
    _write(folder, entry, header_of(storage, entry))


def _write(folder: Path, entry: Entry, first: bytes) -> None:
    target = folder / entry.path
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "wb") as file:
            file.write(first)
            file.truncate(entry.size)
    except OSError as error:
        raise StorageError(
            f"{folder}: a header cannot be staged here ({error.strerror}); make room, or set MIM_SCALE_SCRATCH"
        ) from None


def _rule(entry: Entry) -> Callable[[bytes], bool] | None:
    """How to tell whether a header is whole in the first bytes of a file; None where all of the file is wanted."""
    name = entry.path.lower()
    if name.endswith(_WHOLE_SUFFIXES) and entry.size <= _LARGEST_DESCRIPTION:
        return None
    if name.endswith((".nii", ".nii.gz")):
        return _has_nifti
    if name.endswith((".nrrd", ".nhdr")):
        return lambda first: b"\n\n" in first or b"\r\n\r\n" in first
    if name.endswith((".mha", ".mhd")):
        return lambda first: b"\n" in first[first.find(b"ElementDataFile") :] and b"ElementDataFile" in first
    return _has_dicom


def _has_nifti(first: bytes) -> bool:
    """Whether the bytes reach to the voxels, extensions included."""
    if first[:2] == b"\x1f\x8b":
        try:
            first = zlib.decompressobj(wbits=31).decompress(first, _FIRST_BYTES[-1])
        except zlib.error:
            return True  # damaged: more of it would not help
    if len(first) < 544:
        return False
    for order in "<>":
        if struct.unpack(f"{order}i", first[:4]) == (540,):
            return bool(struct.unpack(f"{order}q", first[168:176])[0] <= len(first))
        if struct.unpack(f"{order}i", first[:4]) == (348,):
            return bool(struct.unpack(f"{order}f", first[108:112])[0] <= len(first))
    return True  # no NIfTI: the reader will say so


def _has_dicom(first: bytes) -> bool:
    """Whether the bytes reach to the pixels, or are not DICOM at all."""
    starts = {b"\x02\x00", b"\x08\x00", b"\x00\x02", b"\x00\x08"}
    if first[128:132] != b"DICM" and first[:2] not in starts:
        return True
    try:
        _, start = read_header(io.BytesIO(first), [])
    except Exception:
        return False
    return bool(start)
