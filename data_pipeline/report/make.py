"""From a store to its report: numbers first, then the rows and pictures of the volumes that are shown."""

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.report.numbers import Numbers, Progress, collect, manifest
from data_pipeline.report.page import Contents, Picture, page
from data_pipeline.report.thumbnails import thumbnail
from data_pipeline.report.volume_table import Listed
from mim_scale.commit import write_file
from mim_scale.errors import DamagedError
from mim_scale.store.dataset import Dataset
from mim_scale.store.manifest import Row

MOST_LISTED = 2000
"""Volumes in the page's table."""
MOST_OUTLIERS = 48
"""Outliers with pictures."""


@dataclass(frozen=True)
class Made:
    """What came of it."""

    num_volumes: int
    num_refused: int
    num_outliers: int
    num_pictures: int
    num_bytes: int
    damaged: tuple[str, ...]
    """One line for each volume that could not be drawn."""


class Watcher(Protocol):
    """Is told how far it is."""

    def rows(self, done: int, total: int) -> None:
        """So many rows of the manifest were read."""

    def pictures(self, done: int, total: int) -> None:
        """So many volumes were drawn."""


def as_json(path: Path, progress: Progress | None = None) -> dict[str, Any]:
    """The numbers of the report as plain values.

    Raises:
        StoreError: there is no store at that path.
    """
    numbers = collect(path, progress)
    unusual = {outlier.index for outlier in numbers.outliers}
    keys = {i: row.key for i, row in enumerate(manifest(path, numbers.record)) if i in unusual}
    return numbers.as_json(keys)


def make_report(
    path: Path,
    out: Path,
    leakage: dict[str, Any] | None = None,
    num_sample: int = 24,
    seed: int = 0,
    watcher: Watcher | None = None,
) -> Made:
    """Write the report of a store.

    Args:
        out: The page's file.
        leakage: A certificate of `data leakage`.
        num_sample: Volumes that are drawn beside the outliers; 0 leaves out all pictures.
        seed: Of the sample.

    Raises:
        StoreError: there is no store at that path.
    """
    numbers = collect(path, watcher.rows if watcher else None)
    drawn = sorted(random.Random(seed).sample(range(numbers.num_volumes), min(num_sample, numbers.num_volumes)))
    unusual = [outlier.index for outlier in numbers.outliers]
    rows = _rows_at(path, numbers, {*drawn, *unusual[:MOST_LISTED]})
    artist = _Artist(Dataset(path, numbers.record, ()), watcher.pictures if watcher else None)
    wanted = [*unusual[:MOST_OUTLIERS], *drawn] if num_sample else []
    pictures = artist.draw([rows[i] for i in dict.fromkeys(wanted)])
    why = {outlier.index: outlier.why for outlier in numbers.outliers}

    def shown(index: int) -> Picture:
        image, problem = pictures.get(rows[index].key, ("", ""))
        return Picture(rows[index], image, problem, why.get(index, ()))

    contents = Contents(
        numbers,
        _listed(numbers, rows),
        [shown(index) for index in unusual[:MOST_OUTLIERS]],
        [shown(index) for index in drawn],
        leakage,
    )
    data = page(contents).encode()
    write_file(out, data)
    return Made(numbers.num_volumes, numbers.num_refused, len(unusual), len(pictures), len(data), tuple(artist.damaged))


def _rows_at(path: Path, numbers: Numbers, indices: set[int]) -> dict[int, Row]:
    """Rows by their place: those asked for, and the first others as long as there is room in the table."""
    rows: dict[int, Row] = {}
    room = MOST_LISTED - len(indices)
    for index, row in enumerate(manifest(path, numbers.record)):
        if index in indices or room > 0:
            rows[index] = row
            room -= index not in indices
    return rows


def _listed(numbers: Numbers, rows: dict[int, Row]) -> list[Listed]:
    scores = {outlier.index: outlier.score for outlier in numbers.outliers}
    distances = numbers.columns["HU histogram distance"]
    found = [Listed(rows[i], float(distances[i]), scores.get(i, math.nan)) for i in sorted(rows)]
    return sorted(found, key=lambda listed: (math.isnan(listed.score), -listed.score if listed.score > 0 else 0.0))


class _Artist:
    """Draws volumes, one after another; damaged ones are told, and the others are drawn."""

    def __init__(self, dataset: Dataset, progress: Progress | None) -> None:
        self._dataset = dataset
        self._progress = progress
        self.damaged: list[str] = []

    def draw(self, rows: list[Row]) -> dict[str, tuple[str, str]]:
        """(data URI, or what is wrong) of each volume, by key."""
        found = {}
        for done, row in enumerate(rows, 1):
            try:
                found[row.key] = (thumbnail(self._dataset.reader(row), row), "")
            except DamagedError as error:
                self.damaged.append(str(error))
                found[row.key] = ("", str(error))
            if self._progress is not None:
                self._progress(done, len(rows))
        return found
