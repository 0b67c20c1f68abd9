"""Small volumes and stores for tests, made in memory and written by the real write path. Seeded."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mim_scale.commit import sealed
from mim_scale.config import LevelConfig, PlanConfig
from mim_scale.store.array_store import pyramid, write_volume
from mim_scale.store.dataset import RECORD, Dataset, commit_dataset, volume_folder
from mim_scale.store.foreground import foreground_bits
from mim_scale.store.geometry import Size3, Spacing3
from mim_scale.store.manifest import HU_EDGES, QuarantineRow, Row
from mim_scale.store.volume import AIR_HU, Volume, content_hash, hu_histogram, volume_key, voxel_hash

SMALL_SHAPES: tuple[Size3, ...] = ((40, 64, 56), (64, 64, 64), (70, 50, 66), (20, 72, 80))
"""Edges that are no multiple of a chunk, one that needs padding to a 48 box, one exact."""


def make_volume(shape: Size3 = (40, 64, 56), seed: int = 0, spacing_mm: Spacing3 = (2.5, 0.8, 0.8)) -> Volume:
    """A body of soft tissue with a bone, a lung and noise, in air."""
    random = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    centre = random.uniform(-0.2, 0.2, 3)
    body = (y - centre[1]) ** 2 + (x - centre[2]) ** 2 < 0.7
    bone = (y + 0.4) ** 2 + (x - centre[0]) ** 2 < 0.04
    lung = (z - centre[0]) ** 2 + y**2 + (x - 0.4) ** 2 < 0.1
    hu = np.full(shape, float(AIR_HU))
    hu[body] = 40.0
    hu[body & lung] = -800.0
    hu[bone] = 700.0
    noise = random.normal(0.0, 20.0, shape) * body
    return Volume(np.clip(np.rint(hu + noise), AIR_HU, 3000).astype(np.int16), spacing_mm, make_affine(spacing_mm))


def make_affine(spacing_mm: Spacing3, origin: tuple[float, float, float] = (-100.0, -90.0, -80.0)) -> np.ndarray:
    """An untilted affine in the store's orientation: (x, y, z, 1) -> RAS mm."""
    affine = np.diag([spacing_mm[2], spacing_mm[1], spacing_mm[0], 1.0])
    affine[:3, 3] = origin
    return affine


def store_volume(path: Path, volume: Volume, subject: str = "subject-0") -> Row:
    """Write a volume into a dataset's folder and return its manifest row; the dataset is not committed yet."""
    content = content_hash(volume)
    key = volume_key(content)
    bytes_stored = write_volume(volume_folder(path, key), volume)
    return Row(
        key=key,
        subject=subject,
        group=subject,
        study="",
        series="",
        content_hash=content,
        voxel_hash=voxel_hash(volume),
        shape=volume.shape,
        spacing_mm=volume.spacing_mm,
        affine=tuple(volume.affine.ravel().tolist()),
        hu_min=int(volume.voxels.min()),
        hu_max=int(volume.voxels.max()),
        hu_mean=float(volume.voxels.mean()),
        hu_histogram=hu_histogram(volume.voxels, HU_EDGES),
        foreground=foreground_bits(pyramid(volume)[-1]),
        bytes_raw=volume.voxels.nbytes,
        bytes_stored=bytes_stored,
        bytes_source=volume.voxels.nbytes,
        source_format="nifti",
        source_key=key[::-1],
    )


def make_dataset(
    path: Path,
    shapes: Sequence[Size3] = SMALL_SHAPES,
    seed: int = 0,
    subjects: Sequence[str] | None = None,
    quarantine: Sequence[QuarantineRow] = (),
) -> Dataset:
    """A committed dataset with one volume for each shape, each of its own subject unless `subjects` says otherwise."""
    names = subjects or [f"subject-{index}" for index in range(len(shapes))]
    rows = [
        store_volume(path, make_volume(shape, seed=seed * 1000 + index), subject)
        for index, (shape, subject) in enumerate(zip(shapes, names, strict=True))
    ]
    commit_dataset(path, sorted(rows, key=lambda row: row.key), quarantine, {"source": "synthetic", "seed": seed})
    return Dataset.open(path)


def change_record(path: Path, **values: Any) -> None:
    """Replace values of a dataset's record by others, under a digest that holds."""
    record = json.loads((path / RECORD).read_bytes())
    record = {name: value for name, value in (record | values).items() if name != "digest" and value is not None}
    (path / RECORD).write_bytes(sealed(record)[0])


def make_plan_config(
    box: int | Size3 = 48, view: int = 24, token: int = 4, views: tuple[int, int] = (3, 2)
) -> PlanConfig:
    """Three nested levels: octants, then tokens."""
    return PlanConfig(
        box=box,
        view=view,
        token=token,
        levels=(
            LevelConfig(hidden_ratio=0.5, cells=2),
            LevelConfig(hidden_ratio=0.6, views=views[0]),
            LevelConfig(hidden_ratio=0.5, views=views[1]),
        ),
    )
