"""Walk a source folder, and say of each file what it is, from its name and its header; nothing vanishes in silence."""

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.reasons import Reason, Rejected, reading_failed
from data_pipeline.sources.archives import is_archive
from data_pipeline.sources.dicom_series import header_facts, is_dicom
from data_pipeline.sources.itk import detached_files
from data_pipeline.sources.itk import header_size as itk_size
from data_pipeline.sources.nifti import header_size as nifti_size
from data_pipeline.sources.ome_metadata import header_size as zarr_size
from data_pipeline.sources.ome_metadata import is_ome_zarr, stored_files
from data_pipeline.sources.source import Format
from mim_scale.commit import sha256_values
from mim_scale.errors import SourceError

FACTS_VERSION = 5
"""Raised whenever the same file would give other facts: kept ones then count no more."""

_FORMATS: tuple[tuple[str, Format], ...] = (
    (".nii", "nifti"),
    (".nii.gz", "nifti"),
    (".nrrd", "nrrd"),
    (".nhdr", "nrrd"),
    (".mha", "mha"),
    (".mhd", "mha"),
)
_NO_IMAGE_SUFFIXES = frozenset(
    {".csv", ".tsv", ".txt", ".json", ".md", ".rst", ".yaml", ".yml", ".toml", ".xml", ".html", ".htm", ".pdf", ".log"}
    | {".xls", ".xlsx", ".parquet", ".py", ".sh", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".sha256", ".md5"}
)
_NO_IMAGE_NAMES = frozenset({"dicomdir", "license", "licence", "readme", "changelog", "version", "notice", "makefile"})


_SIZE_OF = {"nifti": nifti_size, "nrrd": itk_size, "mha": itk_size, "ome_zarr": zarr_size}


@dataclass(frozen=True, slots=True)
class Entry:
    """One file as listed."""

    path: str
    """Relative to the source folder, with / on every system."""
    size: int
    """Bytes; -1 for what is no file."""
    version: str
    """Changes when the content does: the time of the last change, or what an object store says."""


def list_files(root: Path, paths: Iterable[str] | None = None) -> Iterator[Entry]:
    """Every file below a folder; folders that are links are entered once, a folder that is one image is one entry.

    Args:
        paths: only these files, and what lies below these folders; relative to the root.

    Raises:
        SourceError: the folder is missing, or one below it cannot be read.
    """
    if not root.is_dir():
        state = "is a file" if root.exists() else "does not exist"
        raise SourceError(f"{root}: {state}; give the folder that holds the scans")
    seen: set[str] = set()
    for path in ["."] if paths is None else paths:
        if (root / path).is_dir():
            yield from _below(root, path, seen)
        else:
            yield _entry(root, path)


def _below(root: Path, start: str, seen: set[str]) -> Iterator[Entry]:
    links: list[str] = []
    for folder, folders, names in os.walk(root / start, onerror=_refuse_folder):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        relative = PurePosixPath(os.path.relpath(folder, root).replace(os.sep, "/"))
        if is_ome_zarr(Path(folder)):
            folders.clear()
            yield _image_entry(root, str(relative))
            continue
        folders.sort()
        links += [os.path.join(folder, name) for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in names:
            yield _entry(root, str(relative / name))
    # After all that lies here under its own name: a folder is known by that, not by a link to it.
    for link in sorted(links):
        yield from _below(root, os.path.relpath(link, root), seen)


def _image_entry(root: Path, folder: str) -> Entry:
    """A folder that is one image, with the sizes and times of the files that it is read from."""
    parts = [_entry(root, f"{folder}/{name}") for name in stored_files(root / folder)]
    version = sha256_values([[part.path, part.size, part.version] for part in parts])
    return Entry(folder, sum(max(part.size, 0) for part in parts), version)


def read_facts(root: Path, file: str) -> dict[str, Any]:
    """What a file is, as plain JSON values: its kind (ignored, volume, dicom, unknown) and what its header says."""
    path = root / file
    if path.is_dir():
        return _volume_facts(root, file, "ome_zarr")
    if _is_no_image(file):
        return {"kind": "ignored"}
    problem = _no_file(path)
    if problem is not None:
        return {"kind": "unknown", "problem": (Reason.UNREADABLE, problem)}
    kind = _format(file)
    if kind is not None:
        return _volume_facts(root, file, kind)
    refusal = _probe(path)
    if refusal is not None:
        return {"kind": "unknown", "problem": refusal}
    facts = header_facts(path)
    return {"kind": "dicom", "group": facts.group, "dicom": facts.values(), "problem": facts.problem}


def _entry(root: Path, file: str) -> Entry:
    """Size and time of a file; -1 where it is out of reach."""
    try:
        found = (root / file).stat()
    except OSError:
        return Entry(file, -1, "")
    return Entry(file, found.st_size, str(found.st_mtime_ns))


def _refuse_folder(error: OSError) -> None:
    """Without this a folder that cannot be read would vanish, and its volumes with it."""
    raise SourceError(
        f"{error.filename}: cannot be read ({error.strerror}); give access to it, or take it out of the source"
    ) from None


def _format(file: str) -> Format | None:
    lower = file.lower()
    return next((kind for suffix, kind in _FORMATS if lower.endswith(suffix)), None)


def _volume_facts(root: Path, file: str, kind: Format) -> dict[str, Any]:
    try:
        count, voxel_mm3 = _SIZE_OF[kind](root / file)
    except Rejected:
        count, voxel_mm3 = 0, 0.0  # reading it will say what is wrong
    extra = detached_files(root, file) if kind in {"nrrd", "mha"} else ()
    return {"kind": "volume", "format": kind, "num_voxels": count, "voxel_mm3": voxel_mm3, "extra": list(extra)}


def _no_file(path: Path) -> str | None:
    """What a name stands for that is no regular file, and would block or fail whoever opens it; None for a file."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno not in {errno.ENOENT, errno.ELOOP, errno.ENOTDIR}:
            _refuse_folder(error)
        return "a link to something that is not there"
    return None if stat.S_ISREG(mode) else "a pipe, a socket or a device, no file"


def _is_no_image(file: str) -> bool:
    name = PurePosixPath(file.lower())
    return (
        any(part.startswith(".") for part in name.parts)
        or name.suffix in _NO_IMAGE_SUFFIXES
        or name.name in _NO_IMAGE_NAMES
    )


def _probe(path: Path) -> tuple[Reason, str] | None:
    """Why a file is no DICOM file; None where it is one."""
    try:
        if path.stat().st_size == 0:
            return Reason.UNREADABLE, "the file is empty"
        if is_dicom(path):
            return None
        if is_archive(path):
            return Reason.ARCHIVE, "an archive or a compressed file: unpack it into the source folder"
        return Reason.UNREADABLE, "neither DICOM nor a volume file by its name"
    except OSError as error:
        failed = reading_failed(error, "the file cannot be opened")
        return failed.reason, failed.detail
