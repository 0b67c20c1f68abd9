"""CPU seconds from a volume file to checked HU: our readers, canonical and screen, beside nibabel and SimpleITK alone.

The volume is a real CT of the example data, repeated to 512 x 512 x 300: `python -m benchmarks.reading`.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from data_pipeline.canonical import canonical
from data_pipeline.example_data import default_cache
from data_pipeline.screen import screen
from data_pipeline.sources.read import read_source
from data_pipeline.sources.source import Format, Source

SCAN = "pyradiomics/lung_1.nrrd"
FILES: dict[str, tuple[str, Format]] = {
    "int16.nii": ("int16", "nifti"),
    "packed16.nii.gz": ("int16", "nifti"),
    "packed32.nii.gz": ("float32", "nifti"),
    "int16.nrrd": ("int16", "nrrd"),
    "int16.mha": ("int16", "mha"),
}
"""Each of its own stem: where scan.nii lies beside scan.nii.gz, SimpleITK opens the first for the second."""


def write_files(folder: Path) -> None:
    """The volume in each format; NRRD and MetaImage compressed."""
    image = sitk.ReadImage(str(default_cache() / SCAN))
    voxels = np.tile(sitk.GetArrayFromImage(image), (7, 1, 1))[:300]
    for name, (dtype, _) in FILES.items():
        values = voxels.astype(dtype)
        made = sitk.GetImageFromArray(values + np.float32(0.3) if dtype == "float32" else values)
        made.SetSpacing(image.GetSpacing())
        sitk.WriteImage(made, str(folder / name), useCompression=not name.endswith(".nii"))


def ours(path: Path) -> None:
    """To a volume as it would be stored."""
    scan = read_source(path.parent, Source(path.name, FILES[path.name][1], (path.name,)))
    screen(canonical(scan)[0].voxels, 16)


def by_nibabel(path: Path) -> None:
    """To an array of floats, as most recipes ask for it."""
    if ".nii" in path.name:
        nib.load(path).get_fdata(dtype=np.float32)


def by_simpleitk(path: Path) -> None:
    """To an array of the stored type."""
    sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


WAYS: dict[str, Callable[[Path], None]] = {"ours": ours, "nibabel": by_nibabel, "SimpleITK": by_simpleitk}


def measure(way: str, path: Path) -> None:
    """In a process of its own: the least CPU seconds of three, and what memory grew by."""
    before = _peak_mb()
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        WAYS[way](path)
        best = min(best, time.process_time() - start)
    print(f"{best:.2f} s, {_peak_mb() - before:.0f} MB" if best > 0.001 else "-")


def _peak_mb() -> float:
    """Of this process; what the system reports at its end includes the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FILE"), help="measure this alone")
    arguments = parser.parse_args()
    if arguments.one:
        measure(arguments.one[0], Path(arguments.one[1]))
        return 0
    print("| file | MB | " + " | ".join(WAYS) + " |\n|---|---|" + "---|" * len(WAYS))
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder))
        for name in FILES:
            path = Path(folder) / name
            cells = [f"{path.stat().st_size / 1e6:.0f}"]
            for way in WAYS:
                command = [sys.executable, "-m", "benchmarks.reading", "--one", way, str(path)]
                cells.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
            print(f"| {name} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
