"""How many stored bytes `data verify` checks in a CPU second, fast and deep, files in the page cache."""

import argparse
import os
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.codecs import example
from mim_scale.store.array_store import pyramid, write_volume
from mim_scale.store.dataset import Dataset, commit_dataset, volume_folder
from mim_scale.store.foreground import foreground_bits
from mim_scale.store.manifest import HU_EDGES, Row
from mim_scale.store.verify import verify
from mim_scale.store.volume import Volume, content_hash, hu_histogram, volume_key, voxel_hash

ROUNDS = 5


def main() -> None:
    """Print one line a measurement: the median and the range of ROUNDS rounds after one that is not counted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, help="measure this store, not one made of copies of an example volume")
    parser.add_argument("--volumes", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.store or make_store(Path(folder) / "store", options.volumes)
        rows = Dataset.open(path).rows
        stored = sum(row.bytes_stored for row in rows)
        print(f"{platform.machine()}, {os.cpu_count()} cores; {len(rows)} volumes, {stored / 1e6:.0f} MB stored")
        for deep, workers in ((False, 1), (False, 2), (False, 4), (True, 2)):
            rounds = [_round(path, stored, deep, workers) for _ in range(ROUNDS + 1)][1:]
            cpu, wall = ([one[side] for one in rounds] for side in (0, 1))
            print(f"{'deep' if deep else 'fast'}, {workers} threads: {_told(cpu)} GB a CPU second, ", end="")
            print(f"{_told(wall)} GB a second", flush=True)
        print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")


def make_store(path: Path, num_volumes: int) -> Path:
    """A store of copies of one CT that differ in one voxel."""
    voxels = example()
    rows = []
    for number in range(num_volumes):
        voxels[0, 0, 0] = number
        rows.append(_store(path, Volume(voxels, (2.5, 0.7, 0.7), np.diag([0.7, 0.7, 2.5, 1.0])), f"subject-{number}"))
    commit_dataset(path, sorted(rows, key=lambda row: row.key), [], {})
    return path


def _store(path: Path, volume: Volume, subject: str) -> Row:
    content, voxels = content_hash(volume), volume.voxels
    key = volume_key(content)
    stored = write_volume(volume_folder(path, key), volume)
    return Row(
        key=key,
        **dict.fromkeys(("subject", "group"), subject),
        **dict.fromkeys(("study", "series"), ""),
        content_hash=content,
        voxel_hash=voxel_hash(volume),
        shape=volume.shape,
        spacing_mm=volume.spacing_mm,
        affine=tuple(volume.affine.ravel().tolist()),
        hu_min=int(voxels.min()),
        hu_max=int(voxels.max()),
        hu_mean=float(voxels.mean()),
        hu_histogram=hu_histogram(voxels, HU_EDGES),
        foreground=foreground_bits(pyramid(volume)[-1]),
        bytes_raw=voxels.nbytes,
        bytes_stored=stored,
        bytes_source=voxels.nbytes,
        source_format="nifti",
        source_key=key[::-1],
    )


def _round(path: Path, stored: int, deep: bool, workers: int) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    assert verify(path, deep, workers=workers) == []
    return stored / (time.process_time() - cpu) / 1e9, stored / (time.perf_counter() - wall) / 1e9


def _told(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
