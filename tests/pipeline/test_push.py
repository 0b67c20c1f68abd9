"""Push and pull: whatever happens on the way, a reader finds a whole dataset under the address, or none."""

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from data_pipeline.storage import objects
from data_pipeline.storage.objects import ObjectStorage
from data_pipeline.storage.push import pull_store, push_folder
from mim_scale.cli import run
from mim_scale.errors import DamagedError, LostObjectError, SourceError, StorageError, StoreError
from mim_scale.store.dataset import PENDING, RECORD, Dataset
from mim_scale.store.manifest import read_rows
from mim_scale.store.verify import verify
from tests.pipeline.s3_server import Fault, Request, S3Server, s3_server
from tests.synthetic import make_dataset

URL = "s3://data/store"


class Quiet:
    """Counts bytes."""

    total = done = 0

    def began(self, done: int, total: int) -> None:
        self.total = total

    def advanced(self, num_bytes: int) -> None:
        self.done += num_bytes


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with s3_server("data") as running:
        for name, value in running.environment().items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An older build and a newer one: one volume in common, one only in each."""
    root = tmp_path_factory.mktemp("stores")
    make_dataset(root / "old", ((20, 30, 40), (24, 24, 24)))
    make_dataset(root / "new", ((20, 30, 40), (18, 40, 20)))
    return root / "old", root / "new"


def there(server: S3Server) -> dict[str, int]:
    """Everything below the address, by path."""
    return ObjectStorage(URL).listed(None)


def dataset_seen(server: S3Server, folder: Path) -> str | None:
    """What a reader finds at this moment, past the door: the fingerprint, or None where there is no record.

    Fails where the record names a table or a volume that is not there as it should be.
    """
    status, record, _ = server.call("GET", f"/data/store/{RECORD}")
    if status == 404:
        return None
    values = json.loads(record)
    for name, digest in values["files"].items():
        found = [server.call("GET", f"/data/store/{name}{suffix}") for suffix in ("", PENDING)]
        bodies = [body for status, body, _ in found if status == 200 and hashlib.sha256(body).hexdigest() == digest]
        assert bodies, f"{name} is not the one that the record names"
        if name == "manifest.parquet":
            (folder / "seen.parquet").write_bytes(bodies[0])
    for row in read_rows(folder / "seen.parquet"):
        assert server.call("HEAD", f"/data/store/volumes/{row.key}.zarr/0/c/0/0/0")[0] == 200
    return str(values["fingerprint"])


def test_a_store_comes_back_as_it_was_and_nothing_is_sent_twice(
    server: S3Server, stores: tuple[Path, Path], tmp_path: Path
) -> None:
    store, _ = stores
    quiet = Quiet()
    done = push_folder(store, URL, quiet)
    files = {path.relative_to(store).as_posix(): path for path in store.rglob("*") if path.is_file()}
    assert there(server) == {path: file.stat().st_size for path, file in files.items()}
    assert done.num_objects == done.num_sent == len(files)
    assert quiet.done == quiet.total > 0
    writes = [request.path for request in server.requests if request.method == "PUT"]
    assert writes[-1] == f"/data/store/{RECORD}"
    server.requests.clear()
    again = push_folder(store, URL, Quiet())
    assert again.num_sent == again.bytes_sent == 0
    assert not [request for request in server.requests if request.method == "PUT"]
    back = tmp_path / "back"
    assert pull_store(URL, back, Quiet()) > 0
    assert not verify(back, deep=True)
    assert Dataset.open(back).fingerprint == Dataset.open(store).fingerprint
    assert pull_store(URL, back, Quiet()) == 0


def test_a_changed_object_of_equal_size_is_sent_again(server: S3Server, stores: tuple[Path, Path]) -> None:
    store, _ = stores
    push_folder(store, URL, Quiet())
    row = Dataset.open(store).rows[0]
    path = f"volumes/{row.key}.zarr/0/c/0/0/0"
    body = bytearray((store / path).read_bytes())
    body[100] ^= 1
    server.put(f"/data/store/{path}", bytes(body))
    assert push_folder(store, URL, Quiet()).num_sent == 1
    assert server.get(f"/data/store/{path}") == (store / path).read_bytes()


def test_readers_see_the_old_dataset_or_the_new_one_at_every_request_of_an_update(
    server: S3Server, stores: tuple[Path, Path], tmp_path: Path
) -> None:
    old, new = stores
    push_folder(old, URL, Quiet())
    seen: list[str | None] = []
    server.fault = lambda request: seen.append(dataset_seen(server, tmp_path))
    done = push_folder(new, URL, Quiet(), delete_old=True)
    server.fault = lambda request: None
    fingerprints = [Dataset.open(store).fingerprint for store in stores]
    assert sorted(set(seen), key=seen.index) == fingerprints
    assert done.num_old > 0
    assert set(there(server)) == {path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file()}


def test_old_volumes_stay_for_their_readers_until_they_are_asked_away(
    server: S3Server, stores: tuple[Path, Path]
) -> None:
    old, new = stores
    push_folder(new, URL, Quiet())
    (gone,) = {row.key for row in Dataset.open(new).rows} - {row.key for row in Dataset.open(old).rows}
    assert push_folder(old, URL, Quiet()).num_old > 0
    assert any(gone in path for path in there(server))
    assert push_folder(old, URL, Quiet(), delete_old=True).old_deleted
    assert not any(gone in path for path in there(server))


@pytest.mark.parametrize("fault", [Fault(drop=True), Fault(status=503, code="SlowDown")])
def test_an_update_cut_off_anywhere_leaves_a_dataset_and_goes_on(
    server: S3Server,
    stores: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
) -> None:
    old, new = stores
    push_folder(old, URL, Quiet())
    monkeypatch.setattr(objects, "PATIENCE_S", 0.05)
    before = Dataset.open(old).fingerprint
    states = set()
    for reached in range(1, 1000, 6):
        server.requests.clear()
        server.fault = lambda request, last=reached: fault if len(server.requests) > last else None
        try:
            push_folder(new, URL, Quiet())
        except StorageError:
            states.add(dataset_seen(server, tmp_path))
        else:
            break
    server.fault = lambda request: None
    states.add(dataset_seen(server, tmp_path))
    assert states == {before, Dataset.open(new).fingerprint}
    assert push_folder(new, URL, Quiet()).num_objects == sum(path.is_file() for path in new.rglob("*"))
    assert not [path for path in there(server) if path.endswith(PENDING)]


def test_a_server_that_restarts_in_mid_push_is_waited_for(server: S3Server, stores: tuple[Path, Path]) -> None:
    def restart(request: Request) -> None:
        if request.method == "PUT" and len(server.requests) > 20 and not restarted:
            restarted.append(1)
            threading.Thread(target=bounce).start()

    def bounce() -> None:
        server.down()
        time.sleep(1)
        server.up()

    restarted: list[int] = []
    server.fault = restart
    push_folder(stores[0], URL, Quiet())
    assert restarted
    server.fault = lambda request: None
    assert push_folder(stores[0], URL, Quiet()).num_sent == 0


def test_half_of_a_large_object_is_never_seen(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "PATIENCE_S", 0.05)
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(20 << 20))
    server.fault = lambda request: Fault(status=500) if "partNumber=2" in request.query else None
    with pytest.raises(StorageError, match="again and again"):
        push_folder(folder, URL, Quiet())
    assert there(server) == {}
    server.fault = lambda request: None
    assert push_folder(folder, URL, Quiet()).num_sent == 2
    assert [r.path for r in server.requests if r.method == "PUT"][-1] == "/data/store/config.json"
    assert server.get("/data/store/model.safetensors") == bytes(20 << 20)
    (folder / "config.json").write_text('{"other": 1}')
    with pytest.raises(StoreError, match="holds another config"):
        push_folder(folder, URL, Quiet())


def test_of_two_uploads_at_once_the_slower_one_is_told(server: S3Server, stores: tuple[Path, Path]) -> None:
    old, new = stores
    push_folder(old, URL, Quiet())

    def overtaken(request: Request) -> None:
        if request.method == "PUT" and request.path.endswith(RECORD):
            server.fault = lambda request: None
            server.put(quote(f"/data/store/{RECORD}"), b"{}")

    server.fault = overtaken
    with pytest.raises(StoreError, match="was faster"):
        push_folder(new, URL, Quiet())


def test_what_is_not_whole_is_not_sent(server: S3Server, stores: tuple[Path, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(stores[0], damaged)
    next(path for path in damaged.rglob("c/0/0/0") if path.is_file()).unlink()
    with pytest.raises(DamagedError, match="damaged, so it is not sent"):
        push_folder(damaged, URL, Quiet())
    (damaged / RECORD).unlink()
    with pytest.raises(StoreError, match="no commit record"):
        push_folder(damaged, URL, Quiet())
    with pytest.raises(SourceError, match="is no bucket"):
        push_folder(stores[0], "http://127.0.0.1/x", Quiet())
    assert there(server) == {}


def test_pull_refuses_what_is_not_whole(server: S3Server, stores: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no commit record"):
        pull_store(URL, tmp_path / "back", Quiet())
    push_folder(stores[0], URL, Quiet())
    key = Dataset.open(stores[0]).rows[0].key
    path = f"/data/store/volumes/{key}.zarr/0/c/0/0/0"
    body = bytearray(server.get(path))
    body[100] ^= 1
    digest = server.call("HEAD", path)[2]["x-amz-meta-sha256"]
    assert server.call("PUT", path, bytes(body), **{"x-amz-meta-sha256": digest})[0] == 200
    with pytest.raises(LostObjectError, match="other bytes than it was put with"):
        pull_store(URL, tmp_path / "back", Quiet())
    assert not (tmp_path / "back" / RECORD).exists()
    assert server.call("DELETE", path)[0] == 204
    with pytest.raises(DamagedError):
        pull_store(URL, tmp_path / "back", Quiet())
    assert not (tmp_path / "back" / RECORD).exists()
    push_folder(stores[0], URL, Quiet())
    pull_store(URL, tmp_path / "back", Quiet())
    assert not verify(tmp_path / "back", deep=True)


def test_the_verbs(
    server: S3Server, stores: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["data", "push", str(stores[0]), URL]) == 0
    assert "complete: the commit record was written last" in capsys.readouterr().out
    assert run(["data", "push", str(stores[0]), URL]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run(["data", "pull", URL, str(tmp_path / "back")]) == 0
    assert run(["data", "verify", str(tmp_path / "back")]) == 0
