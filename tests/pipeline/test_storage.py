"""Reading from buckets and web servers: as listed or not at all, faults waited for, refusals said in one line."""

import functools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_pipeline.reasons import Rejected
from data_pipeline.sources.find import Entry, list_files, read_facts
from data_pipeline.storage import objects, staging
from data_pipeline.storage.objects import ObjectStorage
from data_pipeline.storage.staging import header_of, staged, staged_headers
from data_pipeline.storage.storage import LocalFolder, by_folder, open_storage
from mim_scale.commit import sha256_values
from mim_scale.errors import LostObjectError, SourceError, StorageError
from tests.pipeline.s3_server import PAGE, Fault, Request, S3Server, s3_server
from tests.pipeline.sources import Series, phantom, with_tags, write_image, write_series

NAMES = ("a b/ä#?+&=.nii", "deep/er/%41.dcm", "plain", "empty", "big.nrrd")


@pytest.fixture(scope="module")
def running() -> Iterator[S3Server]:
    with s3_server("data", "empty") as server:
        for number, name in enumerate(NAMES):
            server.put(f"/data/in/{name}", b"" if name == "empty" else bytes([number]) * 3000)
        server.put("/data/in/big.nrrd", np.random.default_rng(0).bytes(3 << 20))
        server.put("/data/in/deep/", b"")
        server.put("/data/in/deep/er/", b"")
        yield server


@pytest.fixture
def server(running: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[S3Server]:
    for name, value in running.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MIM_SCALE_SCRATCH", str(tmp_path / "scratch"))
    staging._opened.cache_clear()
    running.requests.clear()
    yield running
    running.fault = lambda request: None


def digest_of(entries: list[Entry]) -> str:
    """As the inventory makes Source.version."""
    return sha256_values([[entry.path, entry.size, entry.version] for entry in entries])


def failing(times: int, fault: Fault) -> "functools.partial[Fault | None]":
    """The first requests go wrong."""
    left = [times]

    def choose(request: Request) -> Fault | None:
        left[0] -= 1
        return fault if left[0] >= 0 else None

    return functools.partial(choose)


def test_what_is_listed_is_fetched_byte_for_byte_whatever_its_name(server: S3Server, tmp_path: Path) -> None:
    storage = open_storage("s3://data/in")
    entries = {entry.path: entry for entry in storage.entries()}
    assert set(entries) == set(NAMES)
    assert storage.fetch(list(entries), tmp_path / "out") == list(entries.values())
    for name in NAMES:
        assert (tmp_path / "out" / name).read_bytes() == server.get(f"/data/in/{name}")
        assert storage.entry(name) == entries[name]
        assert storage.head(entries[name], 100) == server.get(f"/data/in/{name}")[:100]


def test_a_listing_is_read_a_page_at_a_time(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PAGE", PAGE)
    for number in range(120):
        server.put(f"/data/many/{number:05d}", b"x")
    entries = ObjectStorage("s3://data/many").entries()
    next(entries)
    lists = [request for request in server.requests if "list-type" in request.query]
    assert len(lists) == 2  # the look whether it can be used at all, and one page
    assert 1 + sum(1 for _ in entries) == 120
    assert list(ObjectStorage("s3://empty").entries()) == []


@pytest.mark.parametrize(
    "fault",
    [Fault(status=503, code="SlowDown"), Fault(status=500), Fault(cut=True), Fault(drop=True), Fault(wait_s=0.8)],
)
def test_faults_that_pass_are_waited_for(
    server: S3Server, tmp_path: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault.wait_s:
        monkeypatch.setattr(objects, "SILENCE_S", 0.5)
    storage = open_storage("s3://data/in", patience_s=20)
    server.fault = failing(2, fault)
    storage.fetch(["big.nrrd"], tmp_path)
    assert (tmp_path / "big.nrrd").read_bytes() == server.get("/data/in/big.nrrd")
    # Only where silence is the fault does a busy machine's own slowness count as one more.
    assert len(server.requests) == 3 or (fault.wait_s and 3 < len(server.requests) <= 5)


@pytest.mark.parametrize(("status", "error"), [(403, StorageError), (404, LostObjectError)])
def test_a_refusal_is_not_asked_again(server: S3Server, tmp_path: Path, status: int, error: type[StorageError]) -> None:
    server.fault = lambda request: Fault(status=status, code="AccessDenied" if status == 403 else "NoSuchKey")
    with pytest.raises(error):
        open_storage("s3://data/in").fetch(["plain"], tmp_path)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "AccessDenied", "permission denied"),
        (403, "RequestTimeTooSkewed", "set the clock"),
        (403, "InvalidAccessKeyId", "credentials are refused"),
        (400, "ExpiredToken", "credentials are refused"),
        (301, "PermanentRedirect", "AWS_REGION"),
        (404, "NoSuchBucket", "no such bucket"),
        (503, "SlowDown", "again and again"),
        (418, "Teapot", "not understood"),
    ],
)
def test_each_refusal_is_one_line_that_says_what_to_do(server: S3Server, status: int, code: str, words: str) -> None:
    server.fault = lambda request: Fault(status=status, code=code)
    with pytest.raises(StorageError, match=words) as caught:
        list(open_storage("s3://data/in", patience_s=0.5).entries())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_wrong_secrets_buckets_and_addresses(server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(words: str, url: str = "s3://data/in") -> None:
        with pytest.raises(StorageError, match=words) as caught:
            list(open_storage(url, patience_s=0.5).entries())
        assert "\n" not in str(caught.value)

    refused("no such bucket", "s3://other/in")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    refused("credentials are refused")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    refused("nobody answers")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://nowhere.invalid")
    refused("host name is not known")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint.replace("http:", "https:"))
    refused("TLS is refused")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    refused("no credentials")


def test_the_users_profile_is_read(server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key, secret = (os.environ[f"AWS_{name}"] for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "file").write_text(f"[work]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "file"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert len(list(open_storage("s3://data/in").entries())) == len(NAMES)


def test_keys_that_are_no_paths_are_an_error_and_no_loss(server: S3Server) -> None:
    for key in ("a//b", "../up", "./dot"):
        server.put(f"/data/odd/{key}", b"x")
        with pytest.raises(StorageError, match="is no path"):
            list(open_storage("s3://data/odd").entries())
        assert server.call("DELETE", f"/data/odd/{key}")[0] == 204


def test_staged_files_are_those_that_were_listed_and_are_gone_afterwards(server: S3Server, tmp_path: Path) -> None:
    server.put("/data/task/a/1", b"one")
    server.put("/data/task/a/2", b"two")
    entries = sorted(open_storage("s3://data/task").entries(), key=lambda entry: entry.path)
    files = [entry.path for entry in entries]
    with staged("s3://data/task", files, digest_of(entries)) as root:
        assert [(root / file).read_bytes() for file in files] == [b"one", b"two"]
        assert root.stat().st_mode & 0o077 == 0
    assert not root.exists()
    server.put("/data/task/a/2", b"TWO")
    with (
        pytest.raises(Rejected, match="changed since it was listed"),
        staged("s3://data/task", files, digest_of(entries)),
    ):
        pass
    server.call("DELETE", "/data/task/a/2")
    with pytest.raises(Rejected, match="gone since it was listed"), staged("s3://data/task", files, digest_of(entries)):
        pass
    assert not list((tmp_path / "scratch").iterdir())
    with staged(str(tmp_path), ["whatever"], "") as root:
        assert root == tmp_path


_STAGE = """
import os, signal, sys
from data_pipeline.storage.staging import staged
from data_pipeline.storage.storage import open_storage
from mim_scale.commit import sha256_values
entry = open_storage("s3://data/in").entry("big.nrrd")
version = sha256_values([[entry.path, entry.size, entry.version]])
with staged("s3://data/in", ["big.nrrd"], version) as root:
    print(root, flush=True)
    if sys.argv[1] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


def test_leftovers_of_a_killed_worker_are_removed_and_folders_in_use_are_not(server: S3Server) -> None:
    def start(how: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", _STAGE, how]
        root = Path(__file__).parents[2]
        return subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    with start("lives") as other:
        assert other.stdout is not None
        in_use = Path(other.stdout.readline().strip())
        dead = start("dies")
        assert dead.stdout is not None
        leftover = Path(dead.stdout.readline().strip())
        assert dead.wait() == -signal.SIGKILL
        dead.communicate()
        assert leftover.exists()
        staging.remove_leftovers()
        assert not leftover.exists()
        assert (in_use / "big.nrrd").exists()
        other.communicate()
    assert not in_use.exists()


def test_a_full_disk_ends_in_one_line(server: S3Server) -> None:
    script = _STAGE.replace(
        "import os", "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20,) * 2)\nimport os"
    )
    command = [sys.executable, "-c", script, "lives"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert "StorageError" in done.stderr.splitlines()[-1]
    assert "make room, or set MIM_SCALE_SCRATCH" in done.stderr.splitlines()[-1]
    with pytest.raises(StorageError, match="GB are free"), staged("s3://data/in", ["plain"], "", 10**18):
        pass


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    noisy = phantom(0, (40, 90, 90))
    for name in ("a.nii", "a.nii.gz", "b.nrrd", "c.mha", "d.nhdr", "e.mhd"):
        write_image(root / name, noisy)
    image = nib.Nifti1Image(noisy.astype(np.int16), np.diag([1.0, 1, 2, 1]))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 100_000))
    nib.save(image, root / "long.nii")
    series = Series(phantom(1, (18, 200, 200)))
    write_series(root / "series", series)
    write_series(root / "long", with_tags(series, TextValue="y" * 200_000))
    write_series(root / "longest", with_tags(Series(phantom(2, (16, 20, 20))), TextValue="y" * 1_500_000))
    (root / "notes.txt").write_text("words")
    (root / "dataset.json").write_text("{}" + " " * 100_000)
    (root / "noise").write_bytes(np.random.default_rng(1).bytes(400_000))
    return root


def test_staged_headers_say_what_whole_files_say_for_a_part_of_their_bytes(
    server: S3Server, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in list_files(tree):
        server.put(f"/data/tree/{file.path}", (tree / file.path).read_bytes())
    storage = open_storage("s3://data/tree")
    fetched = {}
    head = ObjectStorage.head

    def counted(self: ObjectStorage, entry: Entry, num_bytes: int) -> bytes:
        fetched[entry.path] = head(self, entry, num_bytes)
        return fetched[entry.path]

    monkeypatch.setattr(ObjectStorage, "head", counted)
    for group in by_folder(storage.entries(), at_least=10):
        with staged_headers(storage, group) as root:
            for entry in group:
                assert (root / entry.path).stat().st_size == entry.size
                assert read_facts(root, entry.path) == read_facts(tree, entry.path), entry.path
    sizes = {file.path: file.size for file in list_files(tree)}
    assert set(fetched) == set(sizes)
    for name in ("a.nii", "b.nrrd", "c.mha", "noise", next(name for name in sizes if name.startswith("series/"))):
        assert len(fetched[name]) == 1 << 16 < sizes[name]
    assert len(fetched["long.nii"]) == 1 << 20 or len(fetched["long.nii"]) == sizes["long.nii"]
    assert len(fetched["dataset.json"]) == sizes["dataset.json"]


def test_a_group_holds_whole_folders() -> None:
    entries = [Entry(f"{folder}/{number}", 1, "") for folder in "abc" for number in range(4)]
    assert [[entry.path[0] for entry in group] for group in by_folder(entries, at_least=5)] == [
        [*"aaaabbbb"],
        [*"cccc"],
    ]
    assert len(list(by_folder([Entry(f"a/{number}", 1, "") for number in range(120)], at_least=1))) == 3


def test_a_folder_is_a_storage_that_is_read_in_place(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"words")
    storage = open_storage(str(tmp_path))
    assert isinstance(storage, LocalFolder)
    (entry,) = storage.entries()
    assert storage.local_path("a") == tmp_path / "a"
    assert header_of(storage, entry) == b"words"
    with staged_headers(storage, [entry]) as root:
        assert root == tmp_path
    with pytest.raises(SourceError, match="ftp://"):
        open_storage("ftp://host/x")


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            """Nothing."""

    (tmp_path / "site" / "ct").mkdir(parents=True)
    (tmp_path / "site" / "ct" / "a b.nii").write_bytes(bytes(range(256)) * 100)
    handler = functools.partial(Handler, directory=str(tmp_path / "site"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}/ct"
        serving.shutdown()


def test_a_web_server_gives_what_a_table_names(web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIM_SCALE_SCRATCH", str(tmp_path / "scratch"))
    with pytest.raises(SourceError, match="give a list "):
        list(open_storage(web).entries())
    storage = open_storage(web, names=["a b.nii"])
    (entry,) = storage.entries()
    assert entry.size == 25_600
    assert storage.head(entry, 300) == (bytes(range(256)) * 2)[:300]
    with staged(web, ["a b.nii"], digest_of([entry])) as root:
        assert (root / "a b.nii").read_bytes() == bytes(range(256)) * 100
    with pytest.raises(LostObjectError):
        storage.entry("gone.nii")
