"""Lists of addresses, web servers' and buckets' together: built as from a folder, whatever servers do."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.build.run import Silent, run_build
from data_pipeline.reasons import Reason
from data_pipeline.sources.inventory import Inventory
from data_pipeline.storage import addresses, objects, staging
from mim_scale.cli import run
from mim_scale.errors import SourceError, StorageError
from mim_scale.store.dataset import Dataset, volume_folder
from mim_scale.store.verify import verify
from tests.pipeline import canaries
from tests.pipeline.s3_server import Fault, S3Server, s3_server
from tests.pipeline.sources import Series, config, phantom, write_image, write_series
from tests.pipeline.test_build import Inline
from tests.pipeline.test_canaries import Shell
from tests.pipeline.test_ome_zarr import write_ome
from tests.pipeline.web_server import Asked, WebServer, web_server

SHAPE = (20, 60, 60)
QUERY = "plain.nii.gz?download=1&version=a%2Fb"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("archive")
    for number, name in enumerate(("plain.nii.gz", "a b/ä#?+&=.nii", "deep/%41.nrrd", "bucket/c d.mha")):
        write_image(root / name, phantom(number, SHAPE))
    write_series(root / "bucket/series", Series(phantom(6)))
    write_ome(root / "bucket/image.zarr", phantom(7))
    write_ome(root / "bucket/no suffix", phantom(8), zarr_format=2)
    return root


@pytest.fixture(scope="module")
def local(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The fingerprint of the store built from the folder."""
    return run_build(config(tree, tmp_path_factory.mktemp("local") / "store"), Silent()).fingerprint


@pytest.fixture(scope="module")
def bucket(tree: Path) -> Iterator[S3Server]:
    with s3_server("data") as server:
        for path in (tree / "bucket").rglob("*"):
            if path.is_file():
                server.put(f"/data/in/{path.relative_to(tree / 'bucket')}", path.read_bytes())
        yield server


@pytest.fixture(autouse=True)
def _around(bucket: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name, value in bucket.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MIM_SCALE_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in ("run", "repair"):
        monkeypatch.setattr(f"data_pipeline.build.{module}.make_executor", lambda config: Inline())
    addresses._storage.cache_clear()
    staging._opened.cache_clear()
    yield
    bucket.fault = lambda request: None


@pytest.fixture
def web(tree: Path, tmp_path: Path) -> Iterator[WebServer]:
    shutil.copytree(tree, tmp_path / "site", ignore=shutil.ignore_patterns("bucket"))
    with web_server(tmp_path / "site") as server:
        yield server


def every_address(web: WebServer) -> list[str]:
    on_web = [f"{web.url}/{QUERY}", f"{web.url}/a%20b/{quote('ä#?+&=.nii')}", f"{web.url}/deep/%2541.nrrd"]
    return [*on_web, *(f"s3://data/in/{name}" for name in ("c d.mha", "series/", "image.zarr", "no suffix"))]


def write_list(path: Path, urls: list[str], **columns: str) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["path", *columns], *([url, *columns.values()] for url in urls)])
    return path


def details(store: Path) -> dict[str, str]:
    """Reasons and details of what was refused."""
    return {row.detail: row.reason for row in Dataset.open(store).quarantine}


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_list_of_addresses_gives_the_store_that_the_folder_gives(
    web: WebServer, local: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], has_ranges: bool
) -> None:
    web.has_ranges = has_ranges
    listing, store = write_list(tmp_path / "list.csv", every_address(web)), tmp_path / "store"
    assert run(["data", "scan", str(listing)]) == 0
    assert "7 inputs, 0 of them refused" in capsys.readouterr().out
    assert run(["data", "plan", str(listing), str(store)]) == 0
    assert run_build(config(listing, store), Silent()).fingerprint == local
    assert not verify(store, deep=True)
    assert run(["data", "scan", str(listing), "--store", str(store)]) == 0
    assert list((tmp_path / "scratch").iterdir()) == []
    web.requests.clear()
    assert run_build(config(listing, store), Silent()).was_complete
    # Each is asked for once, the first twice, and none is read again.
    assert len(web.requests) == (4 if has_ranges else 8)


def test_a_parquet_list_says_whose_they_are(web: WebServer, tmp_path: Path) -> None:
    urls = [f"{web.url}/plain.nii.gz", f"{web.url}/deep/%2541.nrrd", "s3://data/in/series"]
    pq.write_table(pa.table({"path": urls, "subject": ["one", "one", "two"]}), tmp_path / "list.parquet")
    outcome = run_build(config(tmp_path / "list.parquet", tmp_path / "store"), Silent())
    assert (outcome.num_volumes, outcome.num_subjects) == (3, 2)


def test_a_file_and_its_folder_may_both_be_listed(tree: Path, tmp_path: Path) -> None:
    slices = sorted(path.name for path in (tree / "bucket/series").iterdir())
    urls = [f"s3://data/in/series/{slices[0]}", "s3://data/in/series", f"s3://data/in/series/{slices[1]}"]
    with Inventory(write_list(tmp_path / "list.csv", urls)) as inventory:
        inventory.list_files()
        inventory.read_headers()
        (source,) = inventory.sources()
        assert len(source.files) == len(slices) == inventory.num_files


def test_signatures_may_change_and_refuse_head(web: WebServer, tmp_path: Path) -> None:
    store = tmp_path / "store"
    for signature in ("first", "second"):
        web.signature = signature
        query = f"X-Amz-Date={signature}&Signature={signature}&Expires=1"
        listing = write_list(tmp_path / "list.csv", [f"{web.url}/plain.nii.gz?{query}"])
        outcome = run_build(config(listing, store), Silent())
        assert outcome.num_volumes == 1
    # Another signature is no other file.
    assert outcome.was_complete
    web.signature = "third"
    with pytest.raises(StorageError, match=r"permission denied \(403\)"):
        run_build(config(listing, store), Silent())


def test_redirects_are_followed(web: WebServer, tmp_path: Path) -> None:
    with web_server(web.root) as other:
        web.moved = {"/old.nii.gz": "/plain.nii.gz", "/far.nrrd": f"{other.url}/deep/%2541.nrrd"}
        listing = write_list(tmp_path / "list.csv", [f"{web.url}/old.nii.gz", f"{web.url}/far.nrrd"])
        assert run_build(config(listing, tmp_path / "store"), Silent()).num_volumes == 2
        web.moved = {"/old.nii.gz": "/old.nii.gz", "/far.nrrd": "/far.nrrd"}
        with pytest.raises(StorageError):
            run_build(config(listing, tmp_path / "other"), Silent())


def test_what_cannot_be_had_is_set_aside_with_its_reason(web: WebServer, local: str, tmp_path: Path) -> None:
    def refuse(request: Asked) -> Fault | None:
        return Fault(status=403) if "secret" in request.path else None

    web.fault = refuse
    wrong = [f"{web.url}/gone.nii.gz", f"{web.url}/secret.nii", f"{web.url}/folder/", f"{web.url}/x.zarr"]
    listing = write_list(tmp_path / "list.csv", [*every_address(web), *wrong, "s3://data/in/gone", "s3://data/gone/"])
    outcome = run_build(config(listing, tmp_path / "store"), Silent())
    assert outcome.fingerprint == local
    assert outcome.reasons == {Reason.IO_ERROR: 4, Reason.UNREADABLE: 2}
    words = (
        "nothing is at its address",
        "permission denied (403)",
        "a folder on a web server",
        "an OME-Zarr folder on",
    )
    assert all(any(word in detail for word in words) for detail in details(tmp_path / "store"))
    # What is put there is taken by the next build.
    shutil.copy(web.root / "plain.nii.gz", web.root / "gone.nii.gz")
    assert run_build(config(listing, tmp_path / "store"), Silent()).reasons[Reason.DUPLICATE] == 1


def test_a_server_that_tells_no_size_is_no_reason_to_stop(web: WebServer, tmp_path: Path) -> None:
    web.has_sizes = web.has_ranges = False
    listing = write_list(tmp_path / "list.csv", [f"{web.url}/plain.nii.gz", "s3://data/in/c d.mha"])
    assert run_build(config(listing, tmp_path / "store"), Silent()).num_volumes == 1
    assert any("does not say how large" in detail for detail in details(tmp_path / "store"))


def test_a_download_that_breaks_is_taken_up_again(web: WebServer, local: str, tmp_path: Path) -> None:
    listing = write_list(tmp_path / "list.csv", every_address(web))
    fetched: list[str] = []

    def cut(request: Asked) -> Fault | None:
        fetched.extend([request.path] * request.is_whole)
        return Fault(cut=True) if request.is_whole and fetched.count(request.path) <= 2 else None

    web.fault = cut
    assert run_build(config(listing, tmp_path / "store"), Silent()).fingerprint == local
    assert {fetched.count(path) for path in fetched} == {3}


def test_a_file_that_always_breaks_off_is_set_aside(web: WebServer, tmp_path: Path) -> None:
    listing = write_list(tmp_path / "list.csv", [f"{web.url}/plain.nii.gz", f"{web.url}/deep/%2541.nrrd"])
    web.fault = lambda request: Fault(cut=True) if request.is_whole and "plain" in request.path else None
    outcome = run_build(config(listing, tmp_path / "store"), Silent())
    assert (outcome.num_volumes, outcome.reasons) == (1, {Reason.IO_ERROR: 1})
    assert "a file breaks off at the same byte whenever it is fetched" in details(tmp_path / "store")
    web.fault = lambda request: None
    assert run_build(config(listing, tmp_path / "store"), Silent()).num_volumes == 2


@pytest.mark.parametrize("fault", ["away", "silent", "failing", "denied"])
def test_a_server_that_goes_away_stops_the_build_and_the_next_goes_on(
    web: WebServer, local: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(objects, "PATIENCE_S", 0.5)
    if fault == "silent":
        monkeypatch.setattr(objects, "SILENCE_S", 0.3)
    listing, store = write_list(tmp_path / "list.csv", every_address(web)), tmp_path / "store"
    run_build(config(listing, tmp_path / "headers"), Silent())
    addresses._storage.cache_clear()

    def fail(request: Asked) -> Fault | None:
        # After the listing and the headers, which are kept: voxels.
        if request.path != "/deep/%41.nrrd" or not request.is_whole:
            return None
        faults = {"silent": Fault(wait_s=1.0), "failing": Fault(status=503), "denied": Fault(status=403)}
        return faults.get(fault, Fault(drop=True))

    web.fault = fail
    words = {
        "away": "breaks again|nobody answers",
        "silent": "no answer in time",
        "failing": "fails",
        "denied": "403",
    }
    with pytest.raises(StorageError, match=words[fault]) as stopped:
        run_build(config(listing, store), Silent())
    assert "\n" not in str(stopped.value)
    assert "%41" not in str(stopped.value)
    web.fault = lambda request: None
    web.requests.clear()
    assert run_build(config(listing, store), Silent()).fingerprint == local
    web.down()
    with pytest.raises(StorageError, match="nobody answers"):
        run_build(config(listing, store), Silent())
    assert not verify(store)


def test_repair_fetches_what_it_needs_and_nothing_else(web: WebServer, tmp_path: Path) -> None:
    listing, store = write_list(tmp_path / "list.csv", every_address(web)), tmp_path / "store"
    run_build(config(listing, store), Silent())
    dataset = Dataset.open(store)
    row = next(row for row in dataset.rows if row.source_format == "ome_zarr")
    shutil.rmtree(volume_folder(store, row.key))
    web.requests.clear()
    assert run(["data", "verify", str(store), "--repair", str(listing)]) == 0
    assert not verify(store, deep=True)
    assert len(web.requests) == 4


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["http://h/a.nii", "b.nii"], "line 3 holds a path and other lines hold addresses"),
        (["s3://h/a.nii", "s3://h"], "line 3 names a bucket or a host, and nothing in it"),
        (["s3:///a.nii"], "line 2 names no bucket or host"),
        (["http://[h/a.nii"], "line 2 holds no valid address"),
        (["ftp://h/a.nii"], "line 2 holds an address of a kind that is not read"),
        (["http://h/a.nii?sig=1", "http://h/a.nii?sig=2"], "line 3 gives a second address to one file"),
    ],
)
def test_a_list_that_cannot_be_used_is_one_line(tmp_path: Path, lines: list[str], words: str) -> None:
    listing = write_list(tmp_path / "list.csv", lines)
    with pytest.raises(SourceError, match=words):
        Inventory(listing)


def test_a_list_of_a_list_or_of_a_bucket_is_a_list_of_addresses(
    web: WebServer, tree: Path, local: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = write_list(tmp_path / "first.csv", every_address(web)), tmp_path / "second.parquet"
    assert run(["data", "list", str(first), str(second)]) == 0
    assert run_build(config(second, tmp_path / "store"), Silent()).fingerprint == local
    assert run(["data", "list", "s3://data/in", str(tmp_path / "third.csv")]) == 0
    paths = [row["path"] for row in csv.DictReader((tmp_path / "third.csv").open())]
    assert {"s3://data/in/c d.mha", "s3://data/in/image.zarr"} < set(paths)
    assert all(path.startswith("s3://data/in/") for path in paths)
    capsys.readouterr()
    with pytest.raises(SourceError, match=r"write a \.csv list"):
        run(["data", "list", str(first), str(tmp_path / "pretrain_data.json")])


def test_names_are_shown_where_they_are_asked_for(
    web: WebServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (web.root / "bad one.nii").write_bytes(b"words")
    urls = [f"{web.url}/bad%20one.nii?n=1&sig=SECRET", f"{web.url}/gone.nii", f"{web.url}/plain.nii.gz"]
    listing, store = str(write_list(tmp_path / "list.csv", urls)), str(tmp_path / "store")
    run_build(config(Path(listing), Path(store)), Silent())
    assert run(["data", "quarantine", "list", store, "--json", "--names", listing]) == 0
    shown = {row["reason"]: row["name"] for row in json.loads(capsys.readouterr().out)}
    assert shown == {"unreadable": f"{web.url}/?n=1/bad one.nii", "io_error": f"{web.url}/gone.nii"}
    assert run(["data", "scan", listing, "--names"]) == 0
    assert "SECRET" not in capsys.readouterr().out


def test_no_verb_and_no_error_shows_an_address(web: WebServer, tmp_path: Path) -> None:
    shell, folder = Shell(tmp_path), web.root / canaries.WORD
    for number in range(2):
        write_image(folder / f"{canaries.WORD} {number}.nii.gz", phantom(number, SHAPE))
    (folder / "broken.nii").write_bytes(canaries.WORD.encode())
    query = f"patient={canaries.WORD}&sig={canaries.WORD}"
    user = web.url.replace("//", f"//{canaries.WORD}:{canaries.WORD}@")
    names = (f"{canaries.WORD}%200.nii.gz", f"{canaries.WORD}%201.nii.gz", "broken.nii", "gone.nii", "folder/")
    urls = [f"{user}/{canaries.WORD}/{name}?{query}" for name in names]
    urls += [f"s3://data/{canaries.WORD}.nii", f"s3://data/{canaries.WORD}.zarr"]
    listing = write_list(tmp_path / "list.csv", urls, subject=canaries.WORD)
    build = ["build", listing, shell.store, "--executor", "local", "--workers", "1"]
    plan = ["plan", listing, shell.store]
    assert shell.run(["scan", listing], plan, build, ["quarantine", "show", shell.store]) == [0, 0, 0, 0]
    assert len(Dataset.open(shell.store).quarantine) == 5
    shutil.rmtree(next((shell.store / "volumes").iterdir()))
    assert shell.run(["verify", shell.store, "--repair", listing], ["scan", listing, "--store", shell.store]) == [0, 0]
    shell.check_folder(shell.store)
    web.fault = lambda request: Fault(status=403)
    assert shell.run(["scan", write_list(tmp_path / "web.csv", urls[:4])]) == [2]
    web.fault = lambda request: Fault(status=418)
    assert shell.run(["scan", listing], build) == [0, 2]
    for line in ("", urls[0].replace("sig=", "sig=x"), f"{canaries.WORD}.nii", f"ftp://{canaries.WORD}/x"):
        assert shell.run(["scan", write_list(tmp_path / "bad.csv", [urls[0], line or "s3://x"])]) == [2]


@pytest.mark.parametrize("given", ["ftp://host/x", "file:///x"])
def test_addresses_of_other_kinds_are_one_line(given: str) -> None:
    with pytest.raises(SourceError, match=r"no storage that can be read|without file://"):
        Inventory(given)


def test_one_address_is_a_source_of_one_input(
    web: WebServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, url in enumerate((*every_address(web)[:4], "s3://data/in/image.zarr")):
        assert run_build(config(url, tmp_path / str(number)), Silent()).num_volumes == 1
    with pytest.raises(StorageError, match=r"gone.nii.gz: nothing is at its address"):
        run_build(config("s3://data/in/gone.nii.gz", tmp_path / "store"), Silent())
    with pytest.raises(SourceError, match="nothing lies below this address"):
        run_build(config("s3://data/in/series/IM1", tmp_path / "store"), Silent())
    with pytest.raises(SourceError, match="download it, then give its path"):
        run_build(config("s3://data/list.csv", tmp_path / "store"), Silent())
    assert "\n" not in capsys.readouterr().err
