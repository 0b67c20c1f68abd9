"""What has to be done: one task a source, whose key says when an earlier result still holds; and its cost."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.build.ledger import Ledger
from data_pipeline.build.task import Task
from data_pipeline.deidentify import PseudonymKey
from data_pipeline.sources.source import Source
from data_pipeline.storage.storage import absolute
from mim_scale.config import BuildConfig

PIPELINE_VERSION = 5
"""Raised whenever the same source would give other voxels, another row or reason: old results then count no more."""

_BYTES_PER_VOXEL = 12
"""At the peak, of a file whose numbers are float64: 10.4 measured, 6.0 of float32, 4.0 of int16."""
_BYTES_PER_DICOM_VOXEL = 8
"""4.0 measured; values that do not fit into int16 pass through int32."""
_BYTES_PER_RESAMPLED_VOXEL = 8
"""Of old and new voxels, beside the above: 6.1 measured."""
_BASE_BYTES = 300 * 1024 * 1024
_UNKNOWN_RATIO = 20

_STORED_SHARE = 0.55
"""Stored bytes of a byte of int16 voxels, all levels: a cautious figure until the ledger has a measured one."""
_CPU_S_PER_GB = 30.0
"""CPU seconds for a GB of int16 voxels, likewise: docs/benchmarks has measured ones."""


def settings(config: BuildConfig, key_check: str) -> dict[str, Any]:
    """What every task's result depends on, beside its source; where that lies and who works are not part of it."""
    spacing = list(config.spacing) if config.spacing is not None else None
    return {"spacing": spacing, "pipeline_version": PIPELINE_VERSION, "pseudonym_key": key_check}


def make_tasks(
    root: Path | str,
    sources: Iterable[Source],
    config: BuildConfig,
    pseudonyms: PseudonymKey,
    waivers: dict[str, str] | None = None,
) -> Iterator[Task]:
    """One task for each source, in the sources' order."""
    common = settings(config, pseudonyms.check)
    store = str(Path(config.store).resolve())
    for source in sources:
        source_key = pseudonyms.pseudonym("source", source.name)
        waived = tuple((waivers or {}).get(source_key, "").split())
        yield Task(
            key=pseudonyms.digest([source.version, source.problem, common, waived]),
            root=absolute(str(root)),
            store=store,
            source=source,
            source_key=source_key,
            spacing_mm=config.spacing,
            min_slices=config.min_slices,
            pseudonyms=pseudonyms,
            waived=waived,
            memory_bytes=_memory_bytes(source, config),
        )


def _memory_bytes(source: Source, config: BuildConfig) -> int:
    """What a task is expected to need at most."""
    each = _BYTES_PER_DICOM_VOXEL if source.format == "dicom" else _BYTES_PER_VOXEL
    resampling = _num_voxels(source, config) * _BYTES_PER_RESAMPLED_VOXEL if config.spacing is not None else 0
    return _BASE_BYTES + (source.num_voxels * each + resampling or source.num_bytes * _UNKNOWN_RATIO)


def part_of(task: Task, num_parts: int) -> int:
    """Which of so many job array members does a task: by its key, so that it is the same on every machine. From 1."""
    return int(task.key[:8], 16) % num_parts + 1


@dataclass
class Estimate:
    """What a build has to do and what it takes, from headers alone."""

    num_sources: int = 0
    num_refused: int = 0
    """By their headers."""
    num_done: int = 0
    """Results of earlier builds that still hold."""
    bytes_source: int = 0
    bytes_raw: int = 0
    """Of int16 voxels, of sources that are not refused."""
    raw_to_do: int = 0
    largest_memory_bytes: int = 0
    stored_share: float = _STORED_SHARE
    cpu_s_per_gb: float = _CPU_S_PER_GB
    is_measured: bool = False
    """Whether the two shares above come from this build's own finished tasks."""
    warnings: list[str] = field(default_factory=list)
    """What the store would lose, and what would be built again for another setting."""

    @property
    def bytes_stored(self) -> float:
        """Of the finished store."""
        return self.bytes_raw * self.stored_share

    @property
    def core_hours(self) -> float:
        """Of the work that is left."""
        return self.raw_to_do / 1e9 * self.cpu_s_per_gb / 3600


def estimate(tasks: Iterator[Task], config: BuildConfig, ledger: Ledger) -> Estimate:
    """Add up what a build has to do."""
    found = Estimate()
    stored = raw = 0
    cpu_s = 0.0
    for task in tasks:
        found.num_sources += 1
        found.bytes_source += task.source.num_bytes
        if task.source.problem is not None:
            found.num_refused += 1
            continue
        size = 2 * (_num_voxels(task.source, config) - (task.source.num_voxels if config.spacing else 0))
        found.bytes_raw += size
        found.largest_memory_bytes = max(found.largest_memory_bytes, task.memory_bytes)
        result = ledger.result(task)
        if result is None:
            found.raw_to_do += size
            continue
        found.num_done += 1
        if result.row is not None and result.cpu_s > 0:
            stored, raw, cpu_s = stored + result.row.bytes_stored, raw + result.row.bytes_raw, cpu_s + result.cpu_s
    if raw:
        found.stored_share, found.cpu_s_per_gb, found.is_measured = stored / raw, cpu_s / raw * 1e9, True
    return found


def _num_voxels(source: Source, config: BuildConfig) -> int:
    """Voxels in memory: those of the source, and beside them those of the resampled volume."""
    if config.spacing is None:
        return source.num_voxels
    resampled = source.num_voxels * source.voxel_mm3 / math.prod(config.spacing)
    # A header can hold any number; reading it will say what is wrong.
    return source.num_voxels + (math.ceil(resampled) if 0 < resampled < math.inf else 0)
