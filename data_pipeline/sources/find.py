"""Walk a source folder, and say of each file what it is, from its name and its header; nothing vanishes in silence."""

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.reasons import Reason, Rejected, reading_failed
from data_pipeline.sources.archives import is_archive
from data_pipeline.sources.dicom_series import header_facts, is_dicom
from data_pipeline.sources.itk import detached_files
from data_pipeline.sources.itk import header_size as itk_size
from data_pipeline.sources.nifti import header_size as nifti_size
from data_pipeline.sources.source import Format
from mim_scale.errors import SourceError

FACTS_VERSION = 3
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


@dataclass(frozen=True, slots=True)
class Entry:
    """One file as listed."""

    path: str
    """Relative to the source folder, with / on every system."""
    size: int
    """Bytes; -1 for what is no file."""
    version: str
    """Changes when the content does: the time of the last change, or what an object store says."""


def list_files(root: Path) -> Iterator[Entry]:
    """Every file below a folder; folders that are links are entered once.

    Raises:
        SourceError: the folder is missing, or one below it cannot be read.
    """
    if not root.is_dir():
        state = "is a file" if root.exists() else "does not exist"
        raise SourceError(f"{root}: {state}; give the folder that holds the scans")
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, onerror=_refuse_folder, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        relative = PurePosixPath(os.path.relpath(folder, root).replace(os.sep, "/"))
        for name in names:
            yield _entry(root, str(relative / name))


def read_facts(root: Path, file: str) -> dict[str, Any]:
    """What a file is, as plain JSON values: its kind (ignored, volume, dicom, unknown) and what its header says."""
    if _is_no_image(file):
        return {"kind": "ignored"}
    path = root / file
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
        count, voxel_mm3 = nifti_size(root / file) if kind == "nifti" else itk_size(root / file)
    except (Rejected, RuntimeError):
        count, voxel_mm3 = 0, 0.0  # reading it will say what is wrong
    extra = detached_files(root, file) if kind != "nifti" else ()
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
