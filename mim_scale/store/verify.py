"""Is every committed byte still there and as it was."""

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from mim_scale.commit import TEMPORARY
from mim_scale.errors import DamagedError
from mim_scale.store.array_store import folder_bytes, pyramid
from mim_scale.store.dataset import (
    FINGERPRINTS,
    QUARANTINE,
    RECORD,
    VOLUMES,
    Dataset,
    read_record,
    read_table,
    volume_folder,
)
from mim_scale.store.foreground import foreground_bits
from mim_scale.store.geometry import whole_box
from mim_scale.store.manifest import HU_EDGES, Row, iter_fingerprints
from mim_scale.store.raw_check import raw_faults
from mim_scale.store.volume import Volume, content_hash, hu_histogram, voxel_hash


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it was committed."""

    key: str
    """The volume's key; empty where it is the dataset itself."""
    level: int
    """-1 where it is not one level."""
    detail: str
    """One line."""
    file: str = ""
    """Relative to the dataset's folder, where it is one file."""


def verify(
    path: Path,
    deep: bool = False,
    progress: Callable[[int, int], None] | None = None,
    *,
    share: float = 1.0,
    seed: int = 0,
    workers: int | None = None,
) -> list[Problem]:
    """Everything that is wrong with a dataset; an empty list is a clean bill.

    Every byte is read: records and tables against their hashes, metadata byte for byte, chunks against their checksums.

    Args:
        deep: Also decode every chunk of every level, and compare with the manifest's hashes and statistics.
        progress: Called with (volumes done, volumes to check).
        share: Of the volumes, above 0 and up to 1: `sampled` says which; records and tables are always checked.
        seed: Which volumes a share means.
        workers: Threads; one a core by default.

    Raises:
        StoreError: there is no dataset to verify at that path.
    """
    try:
        read_record(path)
    except DamagedError as error:
        return [Problem("", -1, str(error), RECORD)]
    try:
        dataset = Dataset.open(path)
    except DamagedError as error:
        return [Problem("", -1, str(error))]
    problems = _check_tables(dataset)
    rows = sampled(dataset.rows, share, seed)
    results = _in_order(lambda row: volume_problems(dataset, row, deep), rows, workers or len(os.sched_getaffinity(0)))
    for done, found in enumerate(results, start=1):
        problems += found
        if progress is not None:
            progress(done, len(rows))
    return problems


def sampled(rows: Sequence[Row], share: float, seed: int) -> tuple[Row, ...]:
    """A share of the volumes, at least one, in their order; the same for the same keys and seed."""
    if share >= 1:
        return tuple(rows)
    ranks = sorted(hashlib.sha256(f"{seed}\n{row.key}".encode()).hexdigest() for row in rows)
    last = ranks[max(1, math.ceil(share * len(rows))) - 1]
    return tuple(row for row in rows if hashlib.sha256(f"{seed}\n{row.key}".encode()).hexdigest() <= last)


def strangers(path: Path) -> list[str]:
    """What lies in a dataset's folder of volumes and is no volume of its manifest: no damage, but nobody reads it."""
    known = {volume_folder(path, row.key).name for row in Dataset.open(path).rows}
    names = (path / VOLUMES).iterdir() if (path / VOLUMES).is_dir() else ()
    return sorted(file.name for file in names if file.name not in known and not file.name.startswith(TEMPORARY))


def _in_order(work: Callable[[Row], list[Problem]], rows: Iterable[Row], workers: int) -> Iterator[list[Problem]]:
    """The result of each row, by threads that stay a little ahead of whoever asks: reading files lets others work."""
    waiting = iter(rows)
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future[list[Problem]]] = deque()
        try:
            for row in waiting:
                ahead.append(pool.submit(work, row))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _check_tables(dataset: Dataset) -> list[Problem]:
    """The tables that opening a dataset does not read."""
    problems = []
    try:
        dataset.quarantine  # noqa: B018  # read here, so that damage shows here
    except DamagedError as error:
        problems.append(Problem("", -1, str(error), QUARANTINE))
    try:
        read_table(dataset.path, dataset.record, FINGERPRINTS, _walk)
    except DamagedError as error:
        problems.append(Problem("", -1, str(error), FINGERPRINTS))
    return problems


def _walk(table: Path) -> int:
    return sum(1 for _ in iter_fingerprints(table))


def volume_problems(dataset: Dataset, row: Row, deep: bool) -> list[Problem]:
    """Everything that is wrong with one volume; `deep` as in `verify`."""
    folder = volume_folder(dataset.path, row.key)
    found = [
        _problem(dataset, row, fault.level, fault.what, fault.file) for fault in islice(raw_faults(folder, row), _MOST)
    ]
    if not found and (size := folder_bytes(folder)) != row.bytes_stored:
        found = [_problem(dataset, row, -1, f"{size} bytes on disk, {row.bytes_stored} were committed")]
    return found or (_check_voxels(dataset, row) if deep else [])


_MOST = 100
"""Faults of one volume that are told: one whose bytes are all wrong must not fill the memory."""


def _problem(dataset: Dataset, row: Row, level: int, what: str, file: str = "") -> Problem:
    folder = volume_folder(dataset.path, row.key).relative_to(dataset.path)
    return Problem(row.key, level, f"volume {row.key}: {what}; build this volume again", str(folder / file))


def _check_voxels(dataset: Dataset, row: Row) -> list[Problem]:
    """What decoding shows: voxels, coarser levels and the manifest's numbers against each other."""
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
    voxels = voxel_hash(volume)
    if content_hash(volume, voxels) != row.content_hash:
        return [_problem(dataset, row, 0, "its voxels are not those that were committed")]
    levels = pyramid(volume)
    statistics = _statistics(volume, voxels, row) | {"foreground": foreground_bits(levels[-1]) == row.foreground}
    wrong = [name for name, holds in statistics.items() if not holds]
    if wrong:
        problems.append(_problem(dataset, row, 0, f"the manifest says another {', '.join(wrong)} than its voxels"))
    return problems + [
        _problem(dataset, row, level, f"level {level} is no mean of level 0")
        for level, expected in enumerate(levels)
        if not np.array_equal(expected, found[level])
    ]


def _statistics(volume: Volume, voxels: str, row: Row) -> dict[str, bool]:
    """Whether each number of the manifest that follows from the voxels is the one that does."""
    mean = float(volume.voxels.sum(dtype=np.int64)) / volume.voxels.size
    return {
        "voxel_hash": voxels == row.voxel_hash,
        "bytes_raw": volume.voxels.nbytes == row.bytes_raw,
        "hu_min": int(volume.voxels.min()) == row.hu_min,
        "hu_max": int(volume.voxels.max()) == row.hu_max,
        "hu_mean": math.isclose(mean, row.hu_mean, rel_tol=1e-9, abs_tol=1e-6),
        "hu_histogram": hu_histogram(volume.voxels, HU_EDGES) == row.hu_histogram,
    }
