"""Is every committed byte still there and as it was; and what does a dataset hold, in numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mim_scale.errors import DamagedError, StoreError
from mim_scale.store.array_format import NUM_LEVELS, group_metadata
from mim_scale.store.array_store import folder_bytes, pyramid
from mim_scale.store.dataset import QUARANTINE, Dataset, read_record, read_table, volume_folder
from mim_scale.store.geometry import whole_box
from mim_scale.store.manifest import Row, read_quarantine
from mim_scale.store.volume import Volume, content_hash


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it was committed."""

    key: str
    """The volume's key; empty where it is the dataset itself."""
    level: int
    """-1 where it is not one level."""
    detail: str
    """One line."""


def verify(path: Path, deep: bool = False, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
    """Everything that is wrong with a dataset; an empty list is a clean bill.

    Args:
        deep: Decode every chunk of every level and compare with the content hashes; otherwise look at records, tables,
            folders, sizes and metadata only.
        progress: Called with (volumes done, volumes in all).

    Raises:
        StoreError: there is no dataset to verify at that path.
    """
    try:
        read_record(path)
        dataset = Dataset.open(path)
        read_table(path, dataset.record, QUARANTINE, read_quarantine)
    except DamagedError as error:
        return [Problem("", -1, str(error))]
    problems: list[Problem] = []
    for done, row in enumerate(dataset.rows, start=1):
        found = _check_files(dataset, row)
        if not found and deep:
            found = _check_voxels(dataset, row)
        problems += found
        if progress is not None:
            progress(done, len(dataset.rows))
    return problems


def _check_files(dataset: Dataset, row: Row) -> list[Problem]:
    folder = volume_folder(dataset.path, row.key)
    if not folder.is_dir():
        return [Problem(row.key, -1, f"volume {row.key}: its folder is missing; build this volume again")]
    reader = dataset.reader(row)
    try:
        if reader.metadata() != group_metadata(row.shape, row.spacing_mm, row.affine):
            return [Problem(row.key, -1, f"volume {row.key}: its metadata contradicts the manifest; build it again")]
        for level in range(NUM_LEVELS):
            reader.open_level(level)
    except StoreError as error:
        return [Problem(row.key, -1, str(error))]
    size = folder_bytes(folder)
    if size != row.bytes_stored:
        detail = f"volume {row.key}: {size} bytes on disk, {row.bytes_stored} were committed; build this volume again"
        return [Problem(row.key, -1, detail)]
    return []


def _check_voxels(dataset: Dataset, row: Row) -> list[Problem]:
    reader = dataset.reader(row)
    problems, found = [], []
    for level, shape in enumerate(reader.level_shapes):
        try:
            found.append(reader.read_box(level, whole_box(shape)))
        except DamagedError as error:
            problems.append(Problem(row.key, level, str(error)))
    if problems:
        return problems
    volume = Volume(found[0], row.spacing_mm, np.array(row.affine).reshape(4, 4))
    if content_hash(volume) != row.content_hash:
        detail = f"volume {row.key}: its voxels are not those that were committed; build this volume again"
        return [Problem(row.key, 0, detail)]
    return [
        Problem(row.key, level, f"volume {row.key}: level {level} is no mean of level 0; build this volume again")
        for level, expected in enumerate(pyramid(volume))
        if not np.array_equal(expected, found[level])
    ]


def stats(path: Path) -> dict[str, Any]:
    """What a dataset holds, as plain numbers: counts, bytes, and quantiles over volumes.

    Raises:
        StoreError: there is no dataset at that path.
    """
    dataset = Dataset.open(path)
    rows = dataset.rows
    bytes_raw, bytes_stored = sum(row.bytes_raw for row in rows), sum(row.bytes_stored for row in rows)
    return {
        "path": str(path),
        "fingerprint": dataset.fingerprint,
        "num_volumes": len(rows),
        "num_subjects": len({row.subject for row in rows}),
        "num_quarantined": len(dataset.quarantine),
        "quarantine_reasons": _counts([row.reason for row in dataset.quarantine]),
        "source_formats": _counts([row.source_format for row in rows]),
        "repairs": _counts([repair for row in rows for repair in row.repairs]),
        "bytes_raw": bytes_raw,
        "bytes_stored": bytes_stored,
        "compression_ratio": bytes_raw / bytes_stored,
        "shape": _by_axis([row.shape for row in rows]),
        "spacing_mm": _by_axis([row.spacing_mm for row in rows]),
        "hu": {
            "min": min(row.hu_min for row in rows),
            "max": max(row.hu_max for row in rows),
            "mean": _quantiles([row.hu_mean for row in rows]),
        },
    }


def _counts(names: Sequence[str]) -> dict[str, int]:
    return {name: names.count(name) for name in sorted(set(names))}


def _by_axis(triples: Sequence[tuple[float, float, float]]) -> dict[str, dict[str, float]]:
    return {axis: _quantiles([triple[i] for triple in triples]) for i, axis in enumerate("zyx")}


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    names = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}
    return {name: round(float(np.quantile(values, at)), 4) for name, at in names.items()}
