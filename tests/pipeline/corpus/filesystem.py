"""What a folder can hold besides files, names that are no text, and files that change while they are read."""

import builtins
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mim_scale.store.volume import Volume
from tests.pipeline.corpus.case import Case, accepted, refused
from tests.pipeline.corpus.dicom_bytes import changed
from tests.pipeline.corpus.files import mha, nifti, nrrd

FAMILY = "file system"


def _scan(root: Path, good: Volume) -> None:
    (root / "scan.nii").write_bytes(nifti(good))


def _beside(make: Callable[[Path], None]) -> Callable[[Path, Volume], None]:
    """A good file, and something else."""

    def write(root: Path, good: Volume) -> None:
        _scan(root, good)
        make(root)

    return write


def _called(name: bytes, make: Callable[[Volume], bytes] = nifti) -> Callable[[Path, Volume], None]:
    def write(root: Path, good: Volume) -> None:
        with open(os.path.join(os.fsencode(root), name), "wb") as file:
            file.write(make(good))

    return write


def _series_called(name: bytes) -> Callable[[Path, Volume], None]:
    def write(root: Path, good: Volume) -> None:
        folder = os.path.join(os.fsencode(root), name)
        os.mkdir(folder)
        changed()(Path(os.fsdecode(folder)), good)

    return write


def _deep(root: Path, good: Volume) -> None:
    folder = root
    for _ in range(60):
        folder /= "a folder with a long name of fifty characters 12345"
    folder.mkdir(parents=True)
    _scan(folder, good)


def _sparse(root: Path, good: Volume) -> None:
    """As large as the header promises, on paper: 1 TB of holes."""
    with open(root / "scan.nii", "wb") as file:
        file.write(nifti(good))
        file.truncate(1 << 40)


def _socket(root: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(root)
        made.bind("socket.nii")
        os.chdir(here)


def _two_cases(root: Path, good: Volume) -> None:
    _scan(root, good)
    (root / "SCAN.NII").write_bytes(nifti(good))


@contextmanager
def _denied(root: Path) -> Iterator[None]:
    """No right to open the scan, also for a user whom the system denies nothing."""
    real = builtins.open

    def guarded(file: Any, *arguments: Any, **settings: Any) -> Any:
        if Path(str(file)) == root / "scan.nii":
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *arguments, **settings)

    builtins.open = guarded
    try:
        yield
    finally:
        builtins.open = real


def _cut(root: Path) -> None:
    os.truncate(root / "scan.nii", 5000)


def _grown(root: Path) -> None:
    with open(root / "scan.nii", "ab") as file:
        file.write(bytes(50_000))


def _into_folder(root: Path) -> None:
    (root / "scan.nii").unlink()
    (root / "scan.nii").mkdir()


def _into_text(root: Path) -> None:
    (root / "new").write_bytes(b"words\n" * 9000)
    (root / "new").replace(root / "scan.nii")


def _static() -> list[Case]:
    bad, ok = refused("unreadable"), accepted()
    cases: list[tuple[str, Callable[[Path, Volume], Any], tuple[str, ...]]] = [
        ("a link to itself", _beside(lambda root: (root / "loop.nii").symlink_to("loop.nii")), (ok, bad)),
        ("a link to nothing", _beside(lambda root: (root / "gone.nii").symlink_to("nowhere")), (ok, bad)),
        ("a link to the folder above", _beside(lambda root: (root / "up").symlink_to("..")), (ok,)),
        ("a link to a file outside", _beside(lambda root: (root / "out.nii").symlink_to("/dev/zero")), (ok, bad)),
        ("a hard link", _beside(lambda root: (root / "b.nii").hardlink_to(root / "scan.nii")), (ok, ok)),
        ("a pipe", _beside(lambda root: os.mkfifo(root / "pipe.nii")), (ok, bad)),
        ("a socket", _beside(_socket), (ok, bad)),
        ("a folder named a.nii", _beside(lambda root: (root / "a.nii").mkdir()), (ok,)),
        ("an empty .nii", _called(b"scan.nii", lambda good: b""), (bad,)),
        ("an empty .nrrd", _called(b"scan.nrrd", lambda good: b""), (bad,)),
        ("an empty .mha", _called(b"scan.mha", lambda good: b""), (bad,)),
        ("an empty file without a suffix", _called(b"scan", lambda good: b""), (bad,)),
        ("1 TB of holes behind the voxels", _sparse, (bad,)),
        ("names that differ in case alone", _two_cases, (ok, ok)),
        ("60 folders deep", _deep, (ok,)),
        ("a hidden file", _beside(lambda root: (root / "._scan.nii").write_bytes(b"\0\5\x16\7")), (ok,)),
    ]
    names = {
        "a line feed": b"sc\nan",
        "no UTF-8": b"sc\xe4n\xff",
        "an emoji": "\U0001f9b4scan".encode(),
        "quotes and a star": b"a'\"*?$(x)",
        "a leading dash": b"-rf",
        "spaces at both ends": b" scan ",
        "250 bytes": b"x" * 246,
    }
    for what, name in names.items():
        cases += [
            (f"{what} in the name of a .nii", _called(name + b".nii"), (ok,)),
            (f"{what} in the name of a .nrrd", _called(name + b".nrrd"[: 255 - len(name)], nrrd), (ok,)),
            (f"{what} in the name of a .mha", _called(name + b".mha", mha), (ok,)),
            (f"{what} in the name of a folder of DICOM", _series_called(name), (accepted("reoriented"),)),
        ]
    return [Case(FAMILY, name, write, outcomes) for name, write, outcomes in cases]


def _changing() -> list[Case]:
    bad, lost = (refused("unreadable"),), (refused("io_error"),)
    return [
        Case(FAMILY, "no right to read", _scan, lost, during=_denied),
        Case(FAMILY, "gone after the scan", _scan, lost, meanwhile=lambda root: (root / "scan.nii").unlink()),
        Case(FAMILY, "a folder after the scan", _scan, lost, meanwhile=_into_folder),
        Case(FAMILY, "cut after the scan", _scan, bad, meanwhile=_cut),
        Case(FAMILY, "grown after the scan", _scan, bad, meanwhile=_grown),
        Case(FAMILY, "another file after the scan", _scan, bad, meanwhile=_into_text),
        Case(
            FAMILY, "one slice gone after the scan", changed(), lost, meanwhile=lambda root: (root / "IM0003").unlink()
        ),
    ]


CASES = [*_static(), *_changing()]
