"""One source into one stored volume: the unit of work that every executor runs, anywhere, any number of times.

What comes back is a small record, never voxels. Running a task twice, or in two places at once, leaves the same store.
"""

import base64
import resource
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.canonical import canonical
from data_pipeline.deidentify import Acquisition, Identity, PseudonymKey, face_risk
from data_pipeline.reasons import Reason, Rejected, reading_failed
from data_pipeline.screen import screen
from data_pipeline.sources.read import read_source
from data_pipeline.sources.source import Source
from data_pipeline.storage.staging import staged
from data_pipeline.volume_fingerprint import volume_fingerprint
from mim_scale.errors import StorageError, StoreError
from mim_scale.store.array_store import pyramid, write_volume
from mim_scale.store.dataset import volume_folder
from mim_scale.store.foreground import foreground_bits
from mim_scale.store.geometry import Spacing3
from mim_scale.store.manifest import HU_EDGES, Row
from mim_scale.store.volume import Volume, content_hash, hu_histogram, volume_key, voxel_hash

_DECIMALS = 5
"""Of spacing and affine in mm."""


@dataclass(frozen=True)
class Task:
    """What a worker needs to know."""

    key: str
    """Digest of the source's files and of the settings: equal key, equal result."""
    root: str = field(repr=False)
    store: str
    source: Source
    source_key: str
    spacing_mm: Spacing3 | None
    min_slices: int
    pseudonyms: PseudonymKey
    waived: tuple[str, ...]
    """Reasons that the user lets pass for this source."""
    memory_bytes: int
    """What the task is expected to need at most."""


@dataclass(frozen=True)
class TaskResult:
    """What became of a task: a manifest row and a volume fingerprint, or a reason and a detail."""

    key: str
    source_key: str
    source_format: str
    min_slices: int
    """What was asked for when this was decided."""
    cpu_s: float = 0.0
    row: Row | None = None
    fingerprint: bytes = b""
    rejected: tuple[str, str] | None = None

    def values(self) -> dict[str, Any]:
        """As plain JSON values."""
        row = None
        if self.row is not None:
            row = asdict(self.row) | {"foreground": base64.b64encode(self.row.foreground).decode()}
        return asdict(self) | {"row": row, "fingerprint": base64.b64encode(self.fingerprint).decode()}

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> "TaskResult":
        """From what `values` gave; KeyError, TypeError or ValueError where it is something else."""
        row, rejected = values["row"], values["rejected"]
        if row is not None:
            tuples = ("shape", "spacing_mm", "affine", "hu_histogram", "flags", "repairs")
            foreground = base64.b64decode(row["foreground"])
            row = Row(**row | {name: tuple(row[name]) for name in tuples} | {"foreground": foreground})
        return cls(
            **values
            | {
                "row": row,
                "fingerprint": base64.b64decode(values["fingerprint"]),
                "rejected": (str(rejected[0]), str(rejected[1])) if rejected else None,
            }
        )

    def holds_for(self, min_slices: int) -> bool:
        """Whether the same task would end alike if so many slices were asked for."""
        if self.row is not None:
            return min(self.row.shape) >= min_slices
        is_about_slices = self.rejected is not None and self.rejected[0] == Reason.TOO_FEW_SLICES
        return min_slices == self.min_slices or not is_about_slices


@dataclass(frozen=True)
class _Prepared:
    volume: Volume
    repairs: tuple[str, ...]
    flags: tuple[str, ...]
    identity: Identity
    acquisition: Acquisition


def build_volume(task: Task) -> TaskResult:
    """Read, bring to the store's conventions, screen, write.

    Raises:
        StoreError: the store cannot be written; the build cannot go on.
        StorageError: the source's storage cannot be used, or the disk for staging is full; the same.
    """
    before = _cpu_s()
    try:
        prepared = _prepare(task)
    except Rejected as rejected:
        return _rejected(task, rejected, before)
    except StorageError:
        # What this input met, every other one would meet: the build stops, and goes on when it is started again.
        raise
    except MemoryError:
        return died(task, "the machine has too little free memory for it")
    except Exception as error:
        # A reader met an input that nobody foresaw: that input is set aside, the others go on.
        return _rejected(task, reading_failed(error, "reading it failed"), before)
    row = _write(task, prepared)
    fingerprint = volume_fingerprint(prepared.volume)
    return TaskResult(
        task.key, task.source_key, task.source.format, task.min_slices, _cpu_s() - before, row, fingerprint
    )


def died(task: Task, detail: str) -> TaskResult:
    """The result of a task whose worker did not survive it."""
    return TaskResult(
        task.key, task.source_key, task.source.format, task.min_slices, rejected=(Reason.WORKER_DIED, detail)
    )


def _rejected(task: Task, rejected: Rejected, before: float) -> TaskResult:
    found = (str(rejected.reason), rejected.detail)
    return TaskResult(task.key, task.source_key, task.source.format, task.min_slices, _cpu_s() - before, rejected=found)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _prepare(task: Task) -> _Prepared:
    if task.source.problem is not None:
        raise Rejected(*task.source.problem)
    source = task.source
    is_image = source.format == "ome_zarr"
    with staged(task.root, source.files, source.version, source.num_bytes, source.urls, is_image) as root:
        scan = read_source(root, source)
    volume, repairs = canonical(scan, task.spacing_mm)
    flags = set(scan.acquisition.flags)
    flags.update(screen(volume.voxels, task.min_slices, task.waived))
    if face_risk(volume):
        flags.add("face_likely")
    return _Prepared(_rounded(volume), repairs, tuple(sorted(flags)), scan.identity, scan.acquisition)


def _rounded(volume: Volume) -> Volume:
    """Geometry as the content hash takes it: without this, volumes of one key could have other bytes."""
    z_mm, y_mm, x_mm = (round(step, _DECIMALS) for step in volume.spacing_mm)
    return Volume(volume.voxels, (z_mm, y_mm, x_mm), np.round(volume.affine, _DECIMALS) + 0.0)


def _write(task: Task, prepared: _Prepared) -> Row:
    volume = prepared.volume
    same_voxels = voxel_hash(volume)
    content = content_hash(volume, same_voxels)
    key = volume_key(content)
    folder = volume_folder(Path(task.store), key)
    levels = pyramid(volume)
    try:
        # A folder of this name may stand there already: nobody vouches for its bytes, so it is replaced.
        stored = write_volume(folder, volume, levels)
    except OSError as error:
        raise StoreError(f"{task.store}: cannot be written ({error.strerror or error}); make room, run again") from None
    voxels = volume.voxels
    patient = _pseudonym(task, "patient", prepared.identity.patient)
    subject = patient or task.pseudonyms.pseudonym("volume", content)
    return Row(
        key=key,
        subject=subject,
        group=subject,
        study=_pseudonym(task, "study", prepared.identity.study),
        series=_pseudonym(task, "series", prepared.identity.series),
        content_hash=content,
        voxel_hash=same_voxels,
        shape=volume.shape,
        spacing_mm=volume.spacing_mm,
        affine=tuple(float(number) for number in volume.affine.ravel()),
        hu_min=int(voxels.min()),
        hu_max=int(voxels.max()),
        hu_mean=float(voxels.sum(dtype=np.int64)) / voxels.size,
        hu_histogram=hu_histogram(voxels, HU_EDGES),
        foreground=foreground_bits(levels[-1]),
        bytes_raw=voxels.nbytes,
        bytes_stored=stored,
        bytes_source=task.source.num_bytes,
        source_format=task.source.format,
        source_key=task.source_key,
        manufacturer=prepared.acquisition.manufacturer,
        model=prepared.acquisition.model,
        kernel=prepared.acquisition.kernel,
        slice_thickness_mm=prepared.acquisition.slice_thickness_mm,
        tube_kv=prepared.acquisition.tube_kv,
        flags=prepared.flags,
        repairs=prepared.repairs,
    )


def _pseudonym(task: Task, kind: str, name: str) -> str:
    return task.pseudonyms.pseudonym(kind, name) if name else ""
