"""What has to be done: one task a source, with a key that says when an earlier result still holds."""

import math
from pathlib import Path
from typing import Any

from data_pipeline.build.task import Task
from data_pipeline.sources.source import Source
from mim_scale.commit import sha256_values
from mim_scale.config import BuildConfig

PIPELINE_VERSION = 2
"""Raised whenever the same source would give other voxels, another row or reason: old results then count no more."""

_BYTES_PER_VOXEL = 20
"""Five times a float32: the file's numbers, their HU, the volume, its coarser levels, what the encoder holds."""
_BASE_BYTES = 300 * 1024 * 1024
_UNKNOWN_RATIO = 20


def settings(config: BuildConfig) -> dict[str, Any]:
    """What the result depends on; kept in the store. Where the source lies and who does the work are not part of it."""
    spacing = list(config.spacing) if config.spacing is not None else None
    return {"spacing": spacing, "min_slices": config.min_slices, "pipeline_version": PIPELINE_VERSION}


def make_tasks(root: Path, sources: tuple[Source, ...], config: BuildConfig) -> list[Task]:
    """One task for each source, in the sources' order."""
    return [_task(root, source, config) for source in sources]


def _task(root: Path, source: Source, config: BuildConfig) -> Task:
    identity = [_identity(root, file) for file in source.files]
    file_bytes = sum(max(size, 0) for _, size, _ in identity)
    voxels_bytes = _num_voxels(source, config) * _BYTES_PER_VOXEL or file_bytes * _UNKNOWN_RATIO
    return Task(
        key=sha256_values([identity, settings(config)]),
        root=str(root.resolve()),
        store=str(Path(config.store).resolve()),
        source=source,
        spacing_mm=config.spacing,
        min_slices=config.min_slices,
        memory_bytes=_BASE_BYTES + voxels_bytes,
    )


def tree_digest(root: Path, files: list[str], config: BuildConfig) -> str:
    """Digest of names, sizes and times below a source folder, and of the settings."""
    return sha256_values([[_identity(root, file) for file in files], settings(config)])


def _identity(root: Path, file: str) -> tuple[str, int, int]:
    """Name, size and time; -1 where the file is out of reach."""
    try:
        stat = (root / file).stat()
    except OSError:
        return file, -1, -1
    return file, stat.st_size, stat.st_mtime_ns


def _num_voxels(source: Source, config: BuildConfig) -> int:
    """Voxels in memory: those of the source, and beside them those of the resampled volume."""
    if config.spacing is None:
        return source.num_voxels
    resampled = source.num_voxels * source.voxel_mm3 / math.prod(config.spacing)
    # A header can hold any number; reading it will say what is wrong.
    return source.num_voxels + (math.ceil(resampled) if 0 < resampled < math.inf else 0)
