"""Ten thousand volumes through scan, build, restart and verify: time, memory of the driver, and a projection.

    python -m benchmarks.scale [--volumes 10000] [--folder /tmp/scale] [--keep]

The corpus: boxes of 40 to 64 voxels cut from real CT (the example volumes), as NIfTI and as DICOM series, every
fiftieth a copy of an earlier one, every fortieth with a fault.
"""

import argparse
import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from data_pipeline.canonical import canonical
from data_pipeline.example_data import default_cache
from data_pipeline.sources.inventory import find_sources
from data_pipeline.sources.read import read_source
from mim_scale.store.dataset import Dataset, read_record

_COPY_EVERY = 50
_FAULT_EVERY = 40
_FAULTS = ("empty", "cut", "label", "no header", "constant")
_FULL_VOXELS = 512 * 512 * 300


@dataclass
class Phase:
    """One command."""

    name: str
    wall_s: float
    cpu_s: float
    """Of the command and all its children."""
    driver_mb: float
    """Largest resident memory of the command itself."""


def main() -> None:
    """Make the corpus, run the commands, print a table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--volumes", type=int, default=10_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--keep", action="store_true", help="leave corpus and store where they are")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="mim-scale-scale-"))
    source, store = folder / "source", folder / "store"
    os.environ["XDG_CACHE_HOME"], os.environ["XDG_CONFIG_HOME"] = str(folder / "cache"), str(folder / "config")
    shutil.rmtree(store, ignore_errors=True)
    if not source.is_dir():
        make_corpus(options.cache, source, options.volumes)
    phases = [
        run("scan", "scan", source),
        run("scan again", "scan", source),
        run("plan", "plan", source, store),
        run("build", "build", source, store, "--executor", "local"),
        run("restart, finished", "build", source, store, "--executor", "local"),
        run("verify", "verify", store),
        run("scan against the store", "scan", source, "--store", store),
    ]
    report(phases, store, options.volumes)
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)


def make_corpus(cache: Path, source: Path, count: int) -> None:
    """Boxes of real CT with copies and faults among them, a hundred to a folder."""
    random = np.random.default_rng(0)
    scans = list(_real_volumes(cache))
    for index in range(count):
        path = source / f"{index // 100:04d}" / f"{index:06d}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        if index and index % _COPY_EVERY == 0:
            earlier = index - 1 - int(random.integers(1, 30))
            shutil.copy(source / f"{earlier // 100:04d}" / f"{earlier:06d}.nii.gz", path)
            continue
        voxels = _box(scans[index % len(scans)], random)
        fault = _FAULTS[index // _FAULT_EVERY % len(_FAULTS)] if index % _FAULT_EVERY == 7 else ""
        _write(path, voxels, fault)


def _real_volumes(cache: Path) -> Iterator[NDArray[np.int16]]:
    for found in find_sources(cache).sources:
        volume, _ = canonical(read_source(cache, found))
        if min(volume.shape) >= 64:
            yield volume.voxels


def _box(scan: NDArray[np.int16], random: np.random.Generator) -> NDArray[np.int16]:
    """A box with tissue and air in it."""
    while True:
        size = random.integers(40, 65, 3)
        start = [int(random.integers(0, length - side + 1)) for length, side in zip(scan.shape, size, strict=True)]
        box = scan[tuple(slice(at, at + side) for at, side in zip(start, size, strict=True))]
        if box.min() < -300 and box.max() > 200 and np.mean(box > -200) > 0.2:
            return box


def _write(path: Path, voxels: NDArray[np.int16], fault: str) -> None:
    data = {"label": (voxels > 0).astype(np.uint8), "constant": np.full_like(voxels, -1000)}.get(fault, voxels)
    image = nib.Nifti1Image(data.transpose(2, 1, 0), np.diag([-0.8, -0.8, 2.5, 1.0]))
    packed = gzip.compress(image.to_bytes(), 1)
    packed = {"empty": b"", "cut": packed[: len(packed) // 2], "no header": b"x" * 400}.get(fault, packed)
    path.write_bytes(packed)


def run(name: str, verb: str, *values: object) -> Phase:
    """One verb in a process of its own, its memory watched."""
    command = [sys.executable, "-c", "from mim_scale.cli import main; main()", "data", verb, *map(str, values)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = [0.0]
    watcher = threading.Thread(target=_watch, args=(process, peak), daemon=True)
    watcher.start()
    shown, _ = process.communicate()
    wall_s = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(f"{name} ended with {process.returncode}: {shown}")
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{name}: {wall_s:.1f} s, {cpu_s:.1f} CPU s, driver {peak[0]:.0f} MB", flush=True)
    return Phase(name, wall_s, cpu_s, peak[0])


def _watch(process: subprocess.Popen[str], peak: list[float]) -> None:
    while process.poll() is None:
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            return
        lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        peak[0] = max(peak[0], int(lines.get("VmHWM", "0 kB").split()[0]) / 1000)
        time.sleep(0.05)


def report(phases: list[Phase], store: Path, count: int) -> None:
    """The table, and what it means for a large archive."""
    rows = Dataset.open(store).rows
    record = read_record(store)
    raw, stored = sum(row.bytes_raw for row in rows), sum(row.bytes_stored for row in rows)
    print(f"\n{count} inputs = {record['num_volumes']} volumes + {record['num_quarantined']} quarantined")
    print(f"{raw / 1e9:.2f} GB of voxels, {stored / 1e9:.2f} GB stored\n")
    print("| step | wall s | CPU s | driver MB | ms a volume |\n|---|---|---|---|---|")
    for phase in phases:
        each = phase.cpu_s / count * 1000
        print(f"| {phase.name} | {phase.wall_s:.1f} | {phase.cpu_s:.1f} | {phase.driver_mb:.0f} | {each:.2f} |")
    print(json.dumps({"volumes": count, "driver_mb": {phase.name: round(phase.driver_mb) for phase in phases}}))


if __name__ == "__main__":
    main()
