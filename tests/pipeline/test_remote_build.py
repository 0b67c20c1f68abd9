"""A bucket as a source: scan, plan and build as from a folder, also when workers, the build or the service go away."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.build.run import Silent, run_build
from data_pipeline.storage import objects, staging
from data_pipeline.storage.push import push_folder
from data_pipeline.storage.source_files import source_files
from mim_scale.cli import run
from mim_scale.config import BuildConfig
from mim_scale.errors import StorageError
from mim_scale.store.verify import verify
from tests.pipeline.s3_server import Fault, Request, S3Server, s3_server
from tests.pipeline.sources import Series, config, phantom, with_tags, write_image, write_series
from tests.pipeline.test_ome_zarr import write_ome
from tests.pipeline.test_push import Quiet

URL = "s3://data/archive"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("archive")
    for number in range(4):
        write_image(root / f"files/{number}.nii.gz", phantom(number, (20, 60, 60)))
    write_image(root / "detached/a.mhd", phantom(5, (20, 60, 60)))
    write_series(root / "series", Series(phantom(6)))
    write_series(root / "mr", with_tags(Series(phantom(7)), Modality="MR"))
    write_ome(root / "image.zarr", phantom(8))
    write_ome(root / "no suffix", phantom(9), zarr_format=2)
    for number in range(2):
        write_ome(root / f"several/{number}", phantom(10 + number))
    (root / "subjects.csv").write_text("path,subject\nfiles/0.nii.gz,one\nfiles/1.nii.gz,one\n")
    (root / "notes.txt").write_text("words")
    (root / "broken.nrrd").write_bytes(b"NRRD0004\n")
    return root


@pytest.fixture(scope="module")
def local(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The fingerprint of the store built from the folder."""
    return run_build(config(tree, tmp_path_factory.mktemp("local") / "store"), Silent()).fingerprint


@pytest.fixture(scope="module")
def running(tree: Path) -> Iterator[S3Server]:
    with s3_server("data") as server:
        for path in tree.rglob("*"):
            if path.is_file():
                server.put(f"/data/archive/{path.relative_to(tree)}", path.read_bytes())
        yield server


@pytest.fixture
def server(running: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[S3Server]:
    for name, value in running.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MIM_SCALE_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    staging._opened.cache_clear()
    running.requests.clear()
    yield running
    running.fault = lambda request: None


def remote(store: Path) -> BuildConfig:
    # One worker: each takes seconds to import what it needs.
    return BuildConfig(source=URL, store=str(store), executor="local", workers=1)


def staged_now(tmp_path: Path) -> list[Path]:
    """What is left in the scratch folder."""
    staging.remove_leftovers()
    return list((tmp_path / "scratch").iterdir())


def test_a_bucket_gives_the_store_that_its_folder_gives(
    server: S3Server, local: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    assert run(["data", "scan", URL]) == 0
    assert "12 inputs, 1 of them refused by their headers" in capsys.readouterr().out
    outcome = run_build(remote(store), Silent())
    assert outcome.fingerprint == local
    assert not verify(store, deep=True)
    assert staged_now(tmp_path) == []
    server.requests.clear()
    assert run_build(remote(store), Silent()).was_complete
    # Only the listing, and what tells folders from images: no header and no voxel is read again.
    read = {request.path for request in server.requests if not request.path.endswith((".zattrs", "zarr.json"))}
    assert read == {"/data"}
    push_folder(store, "s3://data/store", Quiet())
    # Our own store is a source, too, and says who is who.
    again = run_build(
        BuildConfig(source="s3://data/store", store=str(tmp_path / "again"), executor="local", workers=1), Silent()
    )
    assert (again.num_volumes, again.num_subjects) == (outcome.num_volumes, outcome.num_subjects)


def test_a_killed_worker_is_replaced_and_leaves_no_staged_file(server: S3Server, local: str, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(request: Request) -> Fault | None:
        workers = multiprocessing.active_children()
        if workers and not killed and request.path.endswith("2.nii.gz"):
            killed.append(workers[0].pid or 0)
            os.kill(killed[0], signal.SIGKILL)
            return Fault(wait_s=0.2)
        return None

    server.fault = kill
    outcome = run_build(remote(tmp_path / "store"), Silent())
    assert killed
    assert outcome.fingerprint == local
    assert staged_now(tmp_path) == []


def test_a_killed_build_goes_on(server: S3Server, local: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from mim_scale.cli import main; main()", "data", "build", URL]
    command += [str(tmp_path / "store"), "--executor", "local", "--workers", "1"]
    root = Path(__file__).parents[2]
    started = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    gets: list[str] = []

    def kill(request: Request) -> None:
        gets.append(request.path)
        # The first reading of a file is that of its header.
        if request.path.endswith("3.nii.gz") and gets.count(request.path) == 2:
            started.kill()

    server.fault = kill
    assert started.wait(timeout=120) == -signal.SIGKILL
    server.fault = lambda request: None
    assert run_build(remote(tmp_path / "store"), Silent()).fingerprint == local
    assert staged_now(tmp_path) == []


def test_a_service_that_goes_away_ends_the_build_in_one_line_and_it_goes_on(
    server: S3Server, local: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[str] = []

    def refuse(request: Request) -> Fault | None:
        reached.append(request.path)
        is_voxels = request.path.endswith("3.nii.gz") and reached.count(request.path) > 1
        return Fault(status=403, code="ExpiredToken") if is_voxels else None

    server.fault = refuse
    with pytest.raises(StorageError, match="credentials are refused"):
        run_build(remote(tmp_path / "store"), Silent())
    server.fault = lambda request: None
    assert run_build(remote(tmp_path / "store"), Silent()).fingerprint == local
    monkeypatch.setattr(objects, "PATIENCE_S", 0.1)
    server.down()
    with pytest.raises(StorageError, match="nobody answers"):
        run_build(remote(tmp_path / "store"), Silent())
    server.up()


def test_an_object_that_changes_after_the_scan_is_set_aside_and_taken_by_the_next_build(
    server: S3Server, tree: Path, local: str, tmp_path: Path
) -> None:
    reached: list[str] = []
    first = server.get("/data/archive/files/1.nii.gz")
    other = write_image(tmp_path / "other.nii.gz", phantom(9, (20, 60, 60))).read_bytes()

    def change(request: Request) -> None:
        reached.append(request.path)
        if request.path.endswith("files/1.nii.gz") and reached.count(request.path) == 2:
            server.put("/data/archive/files/1.nii.gz", other)

    server.fault = change
    outcome = run_build(remote(tmp_path / "store"), Silent())
    assert outcome.reasons["io_error"] == 1
    server.fault = lambda request: None
    outcome = run_build(remote(tmp_path / "store"), Silent())
    assert outcome.reasons["io_error"] == 0
    assert outcome.fingerprint != local
    server.put("/data/archive/files/1.nii.gz", first)


def test_an_image_folder_in_a_bucket_is_one_entry(server: S3Server) -> None:
    for name in ("zarr.json", "0/zarr.json", "0/c/0/0/0"):
        server.put(f"/data/zarr/a/image.zarr/{name}", b"12345")
    server.put("/data/zarr/b.nii", b"x")
    entries = list(source_files("s3://data/zarr").entries(None))
    assert [(entry.path, entry.size) for entry in entries] == [("a/image.zarr", 15), ("b.nii", 1)]
    server.put("/data/zarr/a/image.zarr/0/c/0/0/0", b"54321")
    after = list(source_files("s3://data/zarr").entries(None))
    assert after[0].version != entries[0].version
    assert after[1] == entries[1]
