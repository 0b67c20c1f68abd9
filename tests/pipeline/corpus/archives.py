"""Archives and other containers inside the tree: never opened in passing, always named for what they are."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from mim_scale.store.volume import Volume
from tests.pipeline.corpus.case import Case, refused
from tests.pipeline.corpus.dicom_bytes import files_of, series_of
from tests.pipeline.corpus.files import nifti

FAMILY = "archives"


def _zip(data: bytes) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("CANARY/scan.nii", data)
    return target.getvalue()


def _tar(data: bytes) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        member = tarfile.TarInfo("CANARY/scan.nii")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return target.getvalue()


def _named(name: str, pack: Callable[[bytes], bytes]) -> Callable[[Path, Volume], None]:
    def write(root: Path, good: Volume) -> None:
        (root / name).write_bytes(pack(nifti(good)))

    return write


def _packed_slice(root: Path, good: Volume) -> None:
    (root / "IM0001.gz").write_bytes(gzip.compress(files_of(series_of(good), root)[0]))


def _bomb(data: bytes) -> bytes:
    """200 MB of zeros in 200 KB."""
    return _zip(bytes(200 << 20))


_ARCHIVES: dict[str, Callable[[Path, Volume], None]] = {
    "a .zip of scans": _named("scans.zip", _zip),
    "a .zip without a suffix": _named("scans", _zip),
    "a .zip that ends early": _named("scans.zip", lambda data: _zip(data)[:-300]),
    "a .zip of 200 MB of zeros": _named("scans.zip", _bomb),
    "a .tar of scans": _named("scans.tar", _tar),
    "a .tar.gz of scans": _named("scans.tar.gz", lambda data: gzip.compress(_tar(data))),
    "a .tar.bz2 of scans": _named("scans.tar.bz2", lambda data: bz2.compress(_tar(data))),
    "a .tar.xz of scans": _named("scans.tar.xz", lambda data: lzma.compress(_tar(data))),
    "a .7z": _named("scans.7z", lambda data: b"7z\xbc\xaf\x27\x1c" + data[:900]),
    "a .rar": _named("scans.rar", lambda data: b"Rar!\x1a\x07\x01\0" + data[:900]),
    "a .zst": _named("scans.zst", lambda data: b"\x28\xb5\x2f\xfd" + data[:900]),
}

CASES = [
    *(Case(FAMILY, name, write, (refused("archive"),)) for name, write in _ARCHIVES.items()),
    Case(FAMILY, "a DICOM file in gzip", _packed_slice, (refused("unreadable"),)),
    Case(FAMILY, "a .zip named .nii", _named("scan.nii", _zip), (refused("unreadable"),)),
    Case(
        FAMILY,
        "a .tar.gz named .nii.gz",
        _named("a.nii.gz", lambda data: gzip.compress(_tar(data))),
        (refused("unreadable"),),
    ),
]
