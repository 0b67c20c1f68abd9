"""The leakage certificate finds what is in the corpus, names what it did not compare, and names no file unasked."""

import json
import pickle
import secrets
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from data_pipeline.deidentify import PseudonymKey
from data_pipeline.duplicates import LEAST_SCORE, Evidence
from data_pipeline.hold_out import HoldOut
from data_pipeline.leakage import Side, StoredVoxels, as_hu, certificate, find_leaks, load_side
from data_pipeline.leakage_page import page
from data_pipeline.overlay import NO_VOXELS
from data_pipeline.volume_fingerprint import VERSION, unpack, volume_fingerprint
from mim_scale.cli import run
from mim_scale.errors import DamagedError, SourceError
from mim_scale.store.dataset import Dataset, commit_dataset
from mim_scale.store.manifest import FingerprintRow, write_fingerprints
from mim_scale.store.volume import Volume
from tests.pipeline.sources import Series, write_image, write_series
from tests.pipeline.test_duplicates import person, volume
from tests.synthetic import store_volume

KEY = PseudonymKey(b"k" * 32)
CANARY = "CANARY-NAME"


def write(path: Path, scan: Volume, **options: object) -> Path:
    """A file whose reading is the volume, but for the order of axes."""
    return write_image(path, scan.voxels[:, ::-1, ::-1], spacing_mm=scan.spacing_mm[::-1], **options)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three people."""
    path = tmp_path_factory.mktemp("leakage") / "corpus"
    people = [person(seed) for seed in (1, 2, 3)]
    rows = [store_volume(path, scan, f"s{i}") for i, scan in enumerate(people)]
    marks = {row.key: volume_fingerprint(scan) for row, scan in zip(rows, people, strict=True)}
    rows.sort(key=lambda row: row.key)
    fingerprints = [
        FingerprintRow(row.key, row.subject, row.series, row.content_hash, row.voxel_hash, marks[row.key])
        for row in rows
    ]
    commit_dataset(path, rows, [], {"pseudonym_key": KEY.check}, fingerprints)
    return path


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files: one equal, one windowed to 0..1 and cut, one of another person, one that is no volume."""
    folder = tmp_path_factory.mktemp("benchmark")
    write(folder / f"{CANARY}-equal.nii.gz", person(1))
    second = person(2)
    cut = (np.clip(second.voxels[5:45, 10:], -160, 240) + 160) / np.float32(400)
    write(folder / f"{CANARY}-scaled.nii.gz", replace(second, voxels=cut.astype(np.float32)))
    write(folder / f"{CANARY}-other.mha", person(4))
    (folder / f"{CANARY}-broken.nrrd").write_bytes(b"NRRD0004\n")
    return folder


def test_a_certificate_finds_copies_and_tells_what_it_did_not_compare(corpus: Path, benchmark: Path) -> None:
    ours, theirs = load_side(corpus), load_side(benchmark, KEY)
    values = certificate(ours, theirs)
    subjects = {row.key: row.subject for row in ours.rows}
    assert sorted((subjects[hit["corpus_key"]], hit["evidence"]) for hit in values["hits"]) == [
        ("s0", "same_voxels"),
        ("s1", "near_copy"),
    ]
    assert (values["num_benchmark_images"], values["num_leaked"], values["clean"]) == (3, 2, False)
    (refused,) = values["not_compared"]
    assert refused.startswith("1 inputs of the benchmark that could not be read (unreadable 1)")
    assert not values["complete"]
    assert certificate(ours, load_side(benchmark, PseudonymKey(b"x" * 32)))["not_compared"][0].startswith("patients")


def test_a_list_of_fingerprints_stands_for_the_images(corpus: Path, benchmark: Path, tmp_path: Path) -> None:
    theirs = load_side(benchmark, KEY)
    file = tmp_path / "benchmark.parquet"
    write_fingerprints(file, theirs.rows, theirs.key_check)
    listed = load_side(file)
    assert listed.rows == theirs.rows
    assert listed.key_check == KEY.check
    assert listed.voxels(theirs.rows[0].key) is None
    ours = load_side(corpus)
    pairs = [(a, b) for a, b, _ in find_leaks(ours, listed)[0]]
    assert pairs == [(a, b) for a, b, _ in find_leaks(ours, theirs)[0]]
    assert len(pairs) == 2
    assert file.stat().st_size < 20 * 6000


def test_a_damaged_list_is_never_read_as_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet would take most flipped bits: then a copy would not be found."""
    random = np.random.default_rng(0)
    names = ("0" * 16, "ab" * 8, "cd" * 8, "e" * 64, "f" * 64)
    marks = [bytes([VERSION]) + random.bytes(9 * 23) for _ in range(3)]
    rows = tuple(FingerprintRow(f"{number}{names[0][1:]}", *names[1:], mark) for number, mark in enumerate(marks))
    file = tmp_path / "list.parquet"
    write_fingerprints(file, rows, "01234567")
    whole = file.read_bytes()
    found = []
    for bit in range(0, 8 * len(whole), 29):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            side = load_side(file)
        except DamagedError as error:
            found.append(str(error))
        else:
            assert (side.rows, side.key_check) == (rows, "01234567")
    assert len(found) > 100
    remedy = "; make it again with `mim-scale data fingerprints`"
    assert {(line.startswith(f"{file}: "), line.endswith(remedy)) for line in found} == {(True, True)}
    file.write_bytes(whole[:-1])
    with pytest.raises(DamagedError, match="make it again with `mim-scale data fingerprints`"):
        HoldOut.load([file])
    with pytest.raises(DamagedError, match="make it again with `mim-scale data fingerprints`"):
        run(["data", "leakage", str(file), str(file), "--out", str(tmp_path)])


def test_the_page_shows_both_and_needs_no_other_file(corpus: Path, benchmark: Path) -> None:
    ours, theirs = load_side(corpus), load_side(benchmark, KEY)
    text = page(certificate(ours, theirs), ours, theirs)
    assert "<b>Leak:</b> 2 of 3 benchmark images" in text
    assert text.count("data:image/png;base64,") == 4
    assert "http" not in text
    assert "<img" not in page(certificate(ours, theirs), ours, theirs, with_pictures=False)
    hostile = certificate(ours, theirs, with_names=True)
    hostile["hits"][0]["benchmark_name"] = "<script>alert(1)</script>"
    assert "<script>" not in page(hostile, ours, theirs)


@pytest.fixture
def suspect(benchmark: Path, tmp_path: Path) -> Side:
    """One image of a person that the corpus lacks, with six marks of one that it has."""
    write(tmp_path / "suspect" / "one.nii.gz", person(4))
    side = load_side(tmp_path / "suspect", KEY)
    marks = volume_fingerprint(person(1))
    length = (len(marks) - 1) // len(unpack(marks))
    return replace(side, rows=(replace(side.rows[0], fingerprint=marks[: 1 + 6 * length]),))


def test_a_certificate_says_what_the_voxels_say(corpus: Path, benchmark: Path, suspect: Side) -> None:
    ours, theirs = load_side(corpus), load_side(benchmark, KEY)
    values = certificate(ours, theirs)
    (near,) = (hit for hit in values["hits"] if hit["evidence"] == "near_copy")
    assert near["confirmed_by_voxels"]
    assert 0.97 < near["correlation"] <= 1
    counts = {"num_looked_at": 1, "num_confirmed": 1, "num_refuted": 0, "num_refuted_hits": 0}
    assert values["overlay"] == counts | {"candidate_score": 1.5, "least_correlation": 0.95}
    text = page(values, ours, theirs, with_pictures=False)
    assert f"confirmed by voxels, correlation {near['correlation']:.2f}" in text
    assert "1 candidates looked at, 1 confirmed, 0 refuted and dropped" in text

    false = certificate(ours, suspect)
    assert (false["hits"], false["clean"]) == ([], True)
    assert (false["overlay"]["num_refuted"], false["overlay"]["num_refuted_hits"]) == (1, 1)
    assert "1 candidates looked at, 0 confirmed, 1 refuted and dropped" in page(false, ours, suspect)


def test_voxels_that_nobody_can_read_refute_nothing(corpus: Path, suspect: Side, tmp_path: Path) -> None:
    ours = load_side(corpus)
    (tmp_path / "suspect" / "one.nii.gz").unlink()
    gone = certificate(ours, suspect)
    listed = certificate(ours, replace(suspect, kind="list", voxels=NO_VOXELS))
    for values in (gone, listed):
        (hit,) = values["hits"]
        assert (hit["correlation"], hit["confirmed_by_voxels"]) == (None, False)
        assert hit["score"] > LEAST_SCORE
        assert "marks in common; by marks alone" in page(values, ours, suspect)
    assert gone["overlay"]["num_looked_at"] == 0
    assert listed["overlay"] is None
    assert "a list, which carries no voxels" in page(listed, ours, suspect)


def test_hold_outs_are_judged_by_voxels_too_and_travel_to_another_process(corpus: Path, suspect: Side) -> None:
    rows = load_side(corpus).rows
    held = pickle.loads(pickle.dumps(HoldOut([suspect])))
    assert len(held.matches(rows)) == 1
    assert held.matches(rows, voxels=StoredVoxels(corpus)) == {}
    assert len(HoldOut([replace(suspect, voxels=NO_VOXELS)]).matches(rows, voxels=StoredVoxels(corpus))) == 1


def test_a_damaged_volume_of_a_store_does_not_pass_for_compared(corpus: Path, tmp_path: Path) -> None:
    key = Dataset.open(corpus).rows[0].key
    assert StoredVoxels(corpus)(key) is not None
    copy = shutil.copytree(corpus, tmp_path / "corpus")
    for chunk in (copy / "volumes" / f"{key}.zarr" / "0").rglob("*"):
        if chunk.is_file() and chunk.name != "zarr.json":
            chunk.unlink()
    for name in (key, "none"):
        with pytest.raises(DamagedError, match=f"volume {name}: "):
            StoredVoxels(copy)(name)


def test_the_verdict_is_clean_only_where_all_was_compared(corpus: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.nii.gz", person(8))
    ours = load_side(corpus)
    for key, words in ((KEY, "<b>Clean:</b>"), (None, "not everything was compared")):
        theirs = load_side(tmp_path, key)
        assert words in page(certificate(ours, theirs), ours, theirs)


def test_verbs_name_files_only_when_asked(
    corpus: Path, benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "key"
    key.touch(0o600)
    key.write_text(KEY.secret.hex())
    command = ["data", "leakage", str(corpus), str(benchmark), "--key", str(key), "--out"]
    assert run([*command, str(tmp_path / "plain")]) == 0
    assert run([*command, str(tmp_path / "strict"), "--fail-on-leak"]) == 3
    assert run([*command, str(tmp_path / "named"), "--names"]) == 0
    written = [(tmp_path / "plain" / name).read_text() for name in ("leakage.json", "leakage.html")]
    assert CANARY not in "".join(written) + capsys.readouterr().out
    assert CANARY in (tmp_path / "named" / "leakage.html").read_text()
    assert json.loads(written[0])["digest"] == json.loads((tmp_path / "strict" / "leakage.json").read_text())["digest"]
    file = tmp_path / "list.parquet"
    assert run(["data", "fingerprints", str(benchmark), str(file), "--key", str(key)]) == 0
    assert CANARY.encode() not in file.read_bytes()
    assert run(["data", "leakage", str(file), str(file), "--key", str(key), "--out", str(tmp_path), "--fail-on-leak"])
    with pytest.raises(SourceError, match="name it so"):
        run(["data", "fingerprints", str(benchmark), str(tmp_path / "list.csv"), "--key", str(key)])
    with pytest.raises(SourceError, match="no such store, folder"):
        run(["data", "leakage", str(tmp_path / "none"), str(benchmark), "--key", str(key)])


def test_patients_count_under_one_key_only(tmp_path: Path) -> None:
    for folder, seed in (("a", 20), ("b", 21)):
        write_series(tmp_path / folder / "series", Series(person(seed, (20, 30, 34)).voxels))
    ours, same = load_side(tmp_path / "a", KEY), load_side(tmp_path / "b", KEY)
    assert [link.evidence for _, _, link in find_leaks(ours, same)[0]] == [Evidence.SAME_PATIENT]
    assert find_leaks(ours, load_side(tmp_path / "b", PseudonymKey(secrets.token_bytes(32))))[0] == []
    assert find_leaks(ours, load_side(tmp_path / "b"))[0] == []


def test_hold_outs_name_what_and_why(corpus: Path, benchmark: Path, tmp_path: Path) -> None:
    rows = load_side(corpus).rows
    subjects = {row.key: row.subject for row in rows}
    file = write(tmp_path / "scaled" / "one.nii.gz", person(2))
    mirrored = write(tmp_path / "mirrored.nii.gz", volume(person(3).voxels[:, :, ::-1], (3.0, 2.0, 2.0)))
    write(tmp_path / "other.nii.gz", person(1))
    held = HoldOut.load([file.parent, mirrored])
    found = {subjects[key]: (why.evidence, why.list_name) for key, why in held.matches(rows).items()}
    assert found == {
        "s1": (Evidence.SAME_VOXELS, held.names[0]),
        "s2": (Evidence.NEAR_COPY, held.names[1]),
    }
    assert all(str(tmp_path) not in name for name in held.names)
    assert Dataset.open(corpus).rows[0].key in HoldOut.load([corpus]).matches(rows)
    with pytest.raises(SourceError, match="1 inputs to hold out cannot be read"):
        HoldOut.load([benchmark])


@pytest.mark.parametrize("scale", ["0..1", "0..255", "offset", "z-scored", "hu"])
def test_values_of_any_scale_are_brought_near_hu(scale: str) -> None:
    hu = person(1).voxels
    match scale:
        case "0..1":
            seen = (np.clip(hu, -160, 240) + 160) / np.float32(400)
        case "0..255":
            seen = ((np.clip(hu, -1000, 400) + 1000) / 1400 * 255).astype(np.uint8)
        case "offset":
            seen = hu + np.int16(1024)
        case "z-scored":
            seen = ((hu - hu.mean()) / hu.std()).astype(np.float32)
        case _:
            seen = hu
    guesses = as_hu(seen)
    target = np.clip(hu, -160, 240)
    apart = min(float(np.abs(np.clip(guess, -160, 240) - target).mean()) for guess in guesses)
    assert apart < 20
    assert len(guesses) == {"hu": 1, "offset": 7}.get(scale, 6)


def test_one_image_is_a_side(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(person(1).voxels)
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    sitk.WriteImage(image, str(tmp_path / "b.nrrd"))
    assert len(load_side(tmp_path / "a.nrrd").rows) == 1
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.nrrd").write_bytes(b"NRRD0004\n")
    with pytest.raises(SourceError, match="none of 1 inputs"):
        load_side(tmp_path / "text")
