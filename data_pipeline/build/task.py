"""One source into one stored volume: the unit of work that every executor runs, anywhere, any number of times.

What comes back is a small record, never voxels. Running a task twice, or in two places at once, leaves the same store.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.canonical import canonical
from data_pipeline.reasons import Reason, Rejected, reading_failed
from data_pipeline.screen import screen
from data_pipeline.sources.read import read_source
from data_pipeline.sources.source import Source
from data_pipeline.subjects import pseudonym
from mim_scale.errors import StoreError
from mim_scale.store.array_store import write_volume
from mim_scale.store.dataset import volume_folder
from mim_scale.store.geometry import Spacing3
from mim_scale.store.manifest import QuarantineRow, Row
from mim_scale.store.volume import Volume, content_hash, volume_key

_DECIMALS = 5
"""Of spacing and affine in mm."""


@dataclass(frozen=True)
class Task:
    """What a worker needs to know."""

    key: str
    """Digest of the source's files and of the settings: equal key, equal result."""
    root: str
    store: str
    source: Source
    spacing_mm: Spacing3 | None
    min_slices: int
    memory_bytes: int
    """What the task is expected to need at most."""


@dataclass(frozen=True)
class TaskResult:
    """What became of a task: a manifest row, or a reason and a detail."""

    key: str
    row: Row | None = None
    rejected: tuple[str, str] | None = None

    def quarantine_row(self, source: Source) -> QuarantineRow:
        """The row of a rejected source."""
        reason, detail = self.rejected or ("", "")
        return QuarantineRow(source.key, source.format, reason, detail)

    def values(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> "TaskResult":
        """From what `values` gave; KeyError, TypeError or ValueError where it is something else."""
        row, rejected = values["row"], values["rejected"]
        if row is not None:
            tuples = ("shape", "spacing_mm", "affine", "repairs")
            row = Row(**row | {name: tuple(row[name]) for name in tuples})
        return cls(str(values["key"]), row, (str(rejected[0]), str(rejected[1])) if rejected else None)


def build_volume(task: Task) -> TaskResult:
    """Read, bring to the store's conventions, screen, write.

    Raises:
        StoreError: the store cannot be written; the build cannot go on.
    """
    try:
        volume, repairs, patient = _prepare(task)
    except Rejected as rejected:
        return TaskResult(task.key, rejected=(rejected.reason, rejected.detail))
    except MemoryError:
        return died(task, "the machine has too little free memory for it")
    except Exception as error:
        # A reader met an input that nobody foresaw: that input is set aside, the others go on.
        failed = reading_failed(error, "reading it failed")
        return TaskResult(task.key, rejected=(failed.reason, failed.detail))
    return TaskResult(task.key, row=_write(task, volume, repairs, patient))


def died(task: Task, detail: str) -> TaskResult:
    """The result of a task whose worker did not survive it."""
    return TaskResult(task.key, rejected=(Reason.WORKER_DIED, detail))


def _prepare(task: Task) -> tuple[Volume, tuple[str, ...], str | None]:
    scan = read_source(Path(task.root), task.source)
    volume, repairs = canonical(scan, task.spacing_mm)
    screen(volume.voxels, task.min_slices)
    return _rounded(volume), repairs, pseudonym("patient", scan.patient) if scan.patient else None


def _rounded(volume: Volume) -> Volume:
    """Geometry as the content hash takes it: without this, volumes of one key could have other bytes."""
    z_mm, y_mm, x_mm = (round(step, _DECIMALS) for step in volume.spacing_mm)
    return Volume(volume.voxels, (z_mm, y_mm, x_mm), np.round(volume.affine, _DECIMALS) + 0.0)


def _write(task: Task, volume: Volume, repairs: tuple[str, ...], patient: str | None) -> Row:
    content = content_hash(volume)
    key = volume_key(content)
    folder = volume_folder(Path(task.store), key)
    try:
        # A folder of this name may stand there already: nobody vouches for its bytes, so it is replaced.
        stored = write_volume(folder, volume)
    except OSError as error:
        raise StoreError(f"{task.store}: cannot be written ({error.strerror or error}); make room, run again") from None
    voxels = volume.voxels
    return Row(
        key=key,
        subject=patient or pseudonym("volume", content),
        content_hash=content,
        shape=volume.shape,
        spacing_mm=volume.spacing_mm,
        affine=tuple(float(number) for number in volume.affine.ravel()),
        hu_min=int(voxels.min()),
        hu_max=int(voxels.max()),
        hu_mean=float(voxels.sum(dtype=np.int64)) / voxels.size,
        bytes_raw=voxels.nbytes,
        bytes_stored=stored,
        source_format=task.source.format,
        repairs=repairs,
    )
