"""An archive as people have it: every volume file and every DICOM slice of a folder in one flat, shuffled folder."""

import os
import random
import zipfile
from pathlib import Path

SHARED = Path(os.environ.get("MIM_SCALE_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data")
"""More real CT than the repository can carry; not everybody has it."""


def flatten(data: Path, folder: Path, seed: int = 0) -> int:
    """Put everything below a folder, zips unpacked, into one; how many files there are comes back.

    DICOM files get names that tell nothing; volume files keep the suffix that readers go by.
    """
    folder.mkdir(parents=True)
    shuffle = random.Random(seed)
    count = 0
    for path in sorted(data.rglob("*")):
        if path.is_dir() or path.suffix in {".md", ".csv"}:
            continue
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    if not member.is_dir():
                        (folder / f"{shuffle.getrandbits(64):016x}").write_bytes(archive.read(member))
                        count += 1
        else:
            suffix = ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix
            os.link(path, folder / f"{shuffle.getrandbits(64):016x}{suffix}")
            count += 1
    return count
