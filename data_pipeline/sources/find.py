"""Walk a source folder: every file becomes part of a source, or is counted as ignored; nothing vanishes in silence."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_pipeline.reasons import PASSING, Reason, Rejected, reading_failed
from data_pipeline.sources.dicom_series import group_series, is_dicom
from data_pipeline.sources.itk import detached_files
from data_pipeline.sources.itk import header_size as itk_size
from data_pipeline.sources.nifti import header_size as nifti_size
from data_pipeline.sources.source import Format, Source
from mim_scale.errors import SourceError

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


@dataclass(frozen=True)
class Tree:
    """What a source folder holds."""

    sources: tuple[Source, ...]
    """Sorted by name."""
    num_ignored: int
    """Files that are no images by their name: tables, texts, DICOMDIR."""


def find_files(root: Path) -> list[str]:
    """Every visible file below a folder, relative, sorted; folders that are links are entered once.

    Raises:
        SourceError: the folder is missing, or one below it cannot be read.
    """
    if not root.is_dir():
        state = "is a file" if root.exists() else "does not exist"
        raise SourceError(f"{root}: {state}; give the folder that holds the scans")
    return sorted(_walk(root))


def _walk(root: Path) -> Iterator[str]:
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, onerror=_refuse_folder, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = PurePosixPath(os.path.relpath(folder, root).replace(os.sep, "/"))
        for name in names:
            if not name.startswith("."):
                yield str(relative / name)


def _refuse_folder(error: OSError) -> None:
    """Without this a folder that cannot be read would vanish, and its volumes with it."""
    raise SourceError(
        f"{error.filename}: cannot be read ({error.strerror}); give access to it, or take it out of the source"
    ) from None


def find_sources(root: Path, progress: Callable[[int, int], None] | None = None) -> Tree:
    """Read the headers below a folder and say what is there.

    Args:
        root: folder tree with .nii .nii.gz .nrrd .nhdr .mha .mhd files and DICOM files of any name.
        progress: called with (files looked at, files).

    Raises:
        SourceError: the folder is missing, something below it is out of reach, or nothing in it is an image.
    """
    files = find_files(root)
    no_files = {file: problem for file in files if not _is_no_image(file) and (problem := _no_file(root / file))}
    formats = {file: _format(file) for file in files}
    sources = [
        Source(file, formats[file] or "unknown", (file,), problem=(Reason.UNREADABLE, problem))
        for file, problem in no_files.items()
    ]
    sources += [_volume_file(root, file, kind) for file, kind in formats.items() if kind and file not in no_files]
    owned = {file for source in sources for file in source.files}
    rest = [file for file in files if file not in owned]
    ignored = [file for file in rest if _is_no_image(file)]
    dicom: list[str] = []
    to_probe = sorted(set(rest) - set(ignored))
    for count, file in enumerate(to_probe, start=1):
        if progress is not None:
            progress(count, len(to_probe))
        refusal = _probe(root / file)
        if refusal is None:
            dicom.append(file)
        else:
            sources.append(Source(file, "unknown", (file,), problem=refusal))
    sources += group_series(root, dicom)
    if all(source.format == "unknown" and not _may_pass(source) for source in sources):
        raise SourceError(
            f"{root}: no image among {len(files)} files; expected .nii .nii.gz .nrrd .nhdr .mha .mhd or DICOM files"
        )
    return Tree(tuple(sorted(sources, key=lambda source: source.name)), len(ignored))


def _format(file: str) -> Format | None:
    lower = file.lower()
    return next((kind for suffix, kind in _FORMATS if lower.endswith(suffix)), None)


def _volume_file(root: Path, file: str, kind: Format) -> Source:
    try:
        count, voxel_mm3 = nifti_size(root / file) if kind == "nifti" else itk_size(root / file)
    except (Rejected, RuntimeError):
        count, voxel_mm3 = 0, 0.0  # reading it will say what is wrong
    extra = detached_files(root, file) if kind != "nifti" else ()
    return Source(file, kind, (file, *extra), count, voxel_mm3=voxel_mm3)


def _no_file(path: Path) -> str | None:
    """What a name stands for that is no regular file, and would block or fail whoever opens it; None for a file."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno not in {errno.ENOENT, errno.ELOOP, errno.ENOTDIR}:
            _refuse_folder(error)
        return "a link to something that is not there"
    return None if stat.S_ISREG(mode) else "a pipe, a socket or a device, no file"


def _may_pass(source: Source) -> bool:
    return source.problem is not None and source.problem[0] in PASSING


def _is_no_image(file: str) -> bool:
    name = PurePosixPath(file.lower())
    return name.suffix in _NO_IMAGE_SUFFIXES or name.name in _NO_IMAGE_NAMES


def _probe(path: Path) -> tuple[Reason, str] | None:
    """Why a file is no DICOM file; None where it is one."""
    try:
        if path.stat().st_size == 0:
            return Reason.UNREADABLE, "the file is empty"
        return None if is_dicom(path) else (Reason.UNREADABLE, "neither DICOM nor a volume file by its name")
    except OSError as error:
        failed = reading_failed(error, "the file cannot be opened")
        return failed.reason, failed.detail
