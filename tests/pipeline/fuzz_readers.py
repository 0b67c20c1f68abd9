"""Coverage-guided fuzzing of every reader: whatever the bytes, a scan or Rejected, within 2 seconds and 1 GiB.

    python -m tests.pipeline.fuzz_readers --seconds 60            (each reader in turn; `make soak` runs it)
    python -m tests.pipeline.fuzz_readers --reader dicom FILE     (one input again)

With atheris (optional, for development) the bytes follow the branches that they reach; without it they are random
changes of the seeds. The seeds are the bad-input corpus on a small volume; inputs that fail are kept under build/fuzz.
"""

import argparse
import importlib.util
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mim_scale.store.volume import Volume

ROOT = Path(__file__).parents[2]
READERS = {"nifti": "scan.nii", "nrrd": "scan.nrrd", "mha": "scan.mha", "dicom": "scan"}
_LIMIT_S = 2
_LIMIT_MB = 1024
_LONGEST = 1 << 16


def try_bytes(reader: str, folder: Path, data: bytes) -> None:
    """Read bytes as a file; any exception but Rejected is a finding."""
    from data_pipeline.canonical import canonical
    from data_pipeline.reasons import Rejected
    from data_pipeline.screen import screen
    from data_pipeline.sources import dicom_read, dicom_series, itk, nifti

    path = folder / READERS[reader]
    path.write_bytes(data)
    headers: dict[str, Callable[[Path], object]] = {"nifti": nifti.header_size, "dicom": dicom_series.header_facts}
    scans = {"nifti": nifti.read_nifti, "dicom": lambda path: dicom_read.read_series([path])}
    for step in (headers.get(reader, itk.header_size), scans.get(reader, itk.read_itk)):
        try:
            found = step(path)
            if step is scans.get(reader, itk.read_itk):
                volume, _ = canonical(found)  # type: ignore[arg-type]
                screen(volume.voxels, 16)
        except Rejected as rejected:
            if "\n" in rejected.detail or str(folder) in rejected.detail:
                raise ValueError("a detail of more than one line, or with a path") from rejected


def write_seeds(reader: str, folder: Path) -> int:
    """The corpus's files of a reader's format, made from a small volume; their count."""
    from tests.pipeline.corpus import dicom, dicom_pixels, mha, nifti, nrrd
    from tests.pipeline.corpus.case import good_affine

    families = {"nifti": [nifti], "nrrd": [nrrd], "mha": [mha], "dicom": [dicom, dicom_pixels]}
    ramp = np.linspace(-1024, 1500, 2 * 33 * 36).astype(np.int16).reshape(2, 33, 36)
    good = Volume(ramp if reader == "dicom" else ramp[:, :4, :5].copy(), (2.5, 0.9, 0.8), good_affine())
    count = 0
    for case in (case for family in families[reader] for case in family.CASES if "JPEG-LS" not in case.name):
        with tempfile.TemporaryDirectory() as made:
            try:
                case.write(Path(made), good)
            except (ValueError, IndexError, OSError):
                continue  # made for slices that the small volume has not
            for path in sorted(Path(made).iterdir())[:1]:
                if path.is_file() and path.stat().st_size <= _LONGEST:
                    (folder / f"seed{count:04d}").write_bytes(path.read_bytes())
                    count += 1
    return count


def _fuzz_here(reader: str, seeds: Path, kept: Path, seconds: int) -> None:
    """In a process of its own, as libFuzzer ends the process."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    if importlib.util.find_spec("atheris") is None:
        _blind(reader, seeds, kept, folder, seconds)
        return
    import atheris

    with atheris.instrument_imports(include=["data_pipeline", "pydicom.filereader", "pydicom.valuerep"]):
        import data_pipeline.sources.dicom_read
        import data_pipeline.sources.itk
        import data_pipeline.sources.nifti  # noqa: F401
    limits = [f"-timeout={_LIMIT_S}", f"-rss_limit_mb={_LIMIT_MB}", f"-max_len={_LONGEST}"]
    settings = [f"-max_total_time={seconds}", f"-artifact_prefix={kept}/", "-verbosity=0", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *limits, *settings, str(seeds)], lambda data: try_bytes(reader, folder, bytes(data)))
    atheris.Fuzz()


def _blind(reader: str, seeds: Path, kept: Path, folder: Path, seconds: int) -> None:
    files = [path.read_bytes() for path in sorted(seeds.iterdir())]
    rng, end, count = np.random.default_rng(1), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        data = bytearray(files[rng.integers(len(files))] or b"\0")
        for _ in range(rng.integers(1, 6)):
            place = int(rng.integers(len(data)))
            data[place : place + int(rng.integers(0, 9))] = rng.bytes(int(rng.integers(0, 9)))
            data = data or bytearray(b"\0")
        (kept / "last").write_bytes(data)
        begin = time.monotonic()
        try_bytes(reader, folder, bytes(data))
        if time.monotonic() - begin > _LIMIT_S:
            raise TimeoutError(f"over {_LIMIT_S} seconds; the input is {kept / 'last'}")
        count += 1
    print(f"{count} blind")


def fuzz(reader: str, seconds: int) -> int:
    """Fuzz one reader in a process of its own; the exit status, 0 where nothing was found."""
    kept = ROOT / "build" / "fuzz" / reader
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as seeds:
        count = write_seeds(reader, Path(seeds))
        command = [sys.executable, "-m", __spec__.name, "--inside", reader, seeds, str(kept), str(seconds)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
        found = len(list(Path(seeds).iterdir())) - count
    stats = [line.split()[-1] for line in done.stderr.splitlines() if "number_of_executed_units" in line]
    runs = stats[-1] if stats else done.stdout.strip() or "an unknown number of inputs"
    print(f"{reader}: {runs} inputs from {count} seeds, {found} that reached new branches, status {done.returncode}")
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-6000:], sep="\n")
    return done.returncode


def main() -> int:
    """1 where a reader met an input that it neither read nor rejected."""
    if sys.argv[1:2] == ["--inside"]:
        reader, seeds, kept, seconds = sys.argv[2:]
        resource.setrlimit(resource.RLIMIT_AS, (4 * _LIMIT_MB << 20, resource.RLIM_INFINITY))
        _fuzz_here(reader, Path(seeds), Path(kept), int(seconds))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60, help="for each reader")
    parser.add_argument("--reader", choices=READERS, help="this one alone")
    parser.add_argument("file", nargs="?", type=Path, help="read this input once, with its traceback")
    arguments = parser.parse_args()
    readers = [arguments.reader] if arguments.reader else list(READERS)
    if arguments.file is not None:
        with tempfile.TemporaryDirectory() as folder:
            try_bytes(readers[0], Path(folder), arguments.file.read_bytes())
        return 0
    return max([fuzz(reader, arguments.seconds) != 0 for reader in readers])


if __name__ == "__main__":
    sys.exit(main())
