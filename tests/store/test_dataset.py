"""A dataset exists when its record does: refusals, fingerprints, and kills between every step of a commit."""

import dataclasses
import json
import os
import pickle
import shutil

import numpy as np
import pytest

from mim_scale.errors import DamagedError, StoreError
from mim_scale.store import dataset as store_dataset
from mim_scale.store.dataset import Dataset, commit_dataset, fingerprint, parse_record
from mim_scale.store.geometry import Box
from mim_scale.store.manifest import QuarantineRow
from mim_scale.store.verify import verify
from tests.synthetic import change_record, make_dataset, make_volume, store_volume

SHAPES = ((16, 20, 24), (17, 18, 19))
REFUSED = (QuarantineRow("ab" * 8, "dicom", "missing_slice", "slice 3 of 40 is missing"),)


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "store", SHAPES, quarantine=REFUSED)


def test_open_gives_what_was_committed(dataset):
    again = Dataset.open(str(dataset.path))
    assert again.rows == dataset.rows
    assert again.quarantine == REFUSED
    assert again.fingerprint == fingerprint(dataset.rows) == again.record["fingerprint"]
    assert again.record["build_config"] == {"source": "synthetic", "seed": 0}
    assert again.record["num_volumes"] == 2
    row = again.rows[0]
    assert again.reader(row) is again.reader(row)
    assert again.reader(row).read_box(0, Box((0, 0, 0), row.shape)).shape == row.shape


def test_fingerprint_is_of_content_not_of_order_or_time(dataset, tmp_path):
    rows = dataset.rows
    assert fingerprint(rows) == fingerprint(rows[::-1])
    assert fingerprint(rows[:1]) != fingerprint(rows)
    assert fingerprint((dataclasses.replace(rows[0], content_hash="0"), rows[1])) != fingerprint(rows)
    assert make_dataset(tmp_path / "other", SHAPES[::-1], seed=0).fingerprint != dataset.fingerprint
    assert make_dataset(tmp_path / "same", SHAPES, seed=0).fingerprint == dataset.fingerprint


def test_another_person_is_another_fingerprint(dataset):
    """The split goes by the person, so a run must not go on over other ones."""
    rows = dataset.rows
    assert fingerprint((dataclasses.replace(rows[0], group=rows[1].group), rows[1])) != fingerprint(rows)


@pytest.mark.parametrize(
    ("key", "value"), [("num_volumes", 400), ("num_subjects", 1), ("build_config", {"seed": 9}), ("files", [])]
)
def test_a_record_that_was_changed_by_hand_is_refused(dataset, key, value):
    record = json.loads((dataset.path / "dataset.json").read_text())
    (dataset.path / "dataset.json").write_text(json.dumps(record | {key: value}, indent=1, sort_keys=True) + "\n")
    with pytest.raises(DamagedError, match=r"dataset.json is damaged: it does not have its own digest"):
        Dataset.open(dataset.path)
    change_record(dataset.path, **{key: value})
    with pytest.raises(DamagedError, match=r"but it is|does not have the hash"):
        Dataset.open(dataset.path)


def test_every_flipped_bit_of_a_record_is_damage_of_the_record(dataset):
    """Also one in the format version, in white space, or in the case of an escape, which leaves the values alone."""
    commit_dataset(dataset.path, dataset.rows, REFUSED, {"source": "a\xe4\udcff", "rate": 1e-05})
    file = dataset.path / "dataset.json"
    whole = file.read_bytes()
    assert b"\\u00e4" in whole
    assert b"1e-05" in whole
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(StoreError, match=r"dataset.json is damaged") as caught:
            parse_record(bytes(damaged), dataset.path)
        assert caught.value.exit_code == 3
        # What opens and verifies a store goes by that function: every bit of every 13th byte shows it.
        if bit // 8 % 13 == 0:
            file.write_bytes(damaged)
            assert refusal(dataset.path) == (str(caught.value), 3)
            assert [(problem.key, problem.file) for problem in verify(dataset.path)] == [("", "dataset.json")]
    file.write_bytes(whole)
    assert verify(dataset.path) == []


def test_a_whole_record_of_another_version_says_so(dataset):
    change_record(dataset.path, format_version=2)
    assert refusal(dataset.path) == (
        f"{dataset.path}: format version 2, this program reads 3; build into another folder",
        2,
    )
    change_record(dataset.path, format_version=4, files=None, volumes="elsewhere")
    found, code = refusal(dataset.path)
    assert "format version 4, this program reads 3" in found
    assert code == 2
    # Whatever a later version's white space may be.
    record = json.loads((dataset.path / "dataset.json").read_text())
    (dataset.path / "dataset.json").write_text(json.dumps(record))
    assert refusal(dataset.path) == (found, 2)
    (dataset.path / "dataset.json").write_text(json.dumps(record | {"format_version": 5}))
    assert refusal(dataset.path)[1] == 3
    # The first version had no digest.
    del record["digest"]
    (dataset.path / "dataset.json").write_text(json.dumps(record | {"format_version": 1}))
    assert "format version 1, this program reads 3" in refusal(dataset.path)[0]
    assert refusal(dataset.path)[1] == 2


def test_a_commit_between_two_readings_is_no_damage(dataset, monkeypatch):
    """A reader that has the old record meets the new table: it reads the record once more."""
    old = json.loads((dataset.path / "dataset.json").read_text())
    commit_dataset(dataset.path, dataset.rows[:1], (), {"seed": 2})
    readings = [old]
    read = store_dataset.read_record
    monkeypatch.setattr(store_dataset, "read_record", lambda path: readings.pop() if readings else read(path))
    assert Dataset.open(dataset.path).rows == dataset.rows[:1]


def test_a_dataset_pickles_and_knows_its_own(dataset, tmp_path):
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.rows == dataset.rows
    data = pickle.dumps(dataset)
    shutil.rmtree(dataset.path)
    make_dataset(dataset.path, SHAPES, seed=5)
    with pytest.raises(StoreError, match="the sender has"):
        pickle.loads(data)


def refusal(path):
    with pytest.raises(StoreError) as caught:
        _ = Dataset.open(path).quarantine
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value), caught.value.exit_code


def test_refusals(dataset, tmp_path):
    path = dataset.path
    assert "no such store" in refusal(tmp_path / "nothing")[0]
    (tmp_path / "empty").mkdir()
    assert "no commit record" in refusal(tmp_path / "empty")[0]
    record = (path / "dataset.json").read_text()

    for text, message in [
        (record[:50], "is no JSON"),
        ("[" * 200_000, "is no JSON"),
        ("[]", "no record of a dataset"),
        ("{}", "no record of a dataset"),
        (json.dumps({k: v for k, v in json.loads(record).items() if k != "digest"}), "its own digest"),
        (json.dumps(json.loads(record)), "not as it was written"),
    ]:
        (path / "dataset.json").write_text(text)
        found, exit_code = refusal(path)
        assert message in found
        assert "dataset.json is damaged" in found
        assert exit_code == 3
    (path / "dataset.json").write_text(record)
    change_record(path, files=None)
    assert "lacks files" in refusal(path)[0]
    (path / "dataset.json").write_text(record)
    change_record(path, fingerprint="0" * 64)
    assert "says fingerprint 0000" in refusal(path)[0]
    (path / "dataset.json").write_text(record)

    for name in ("manifest.parquet", "quarantine.parquet"):
        good = (path / name).read_bytes()
        (path / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        assert "does not have the hash" in refusal(path)[0]
        (path / name).unlink()
        assert f"{name} is missing" in refusal(path)[0]
        (path / name).write_bytes(good)
    Dataset.open(path)


def test_nothing_to_commit_and_equal_keys(tmp_path):
    with pytest.raises(StoreError, match=r"no volume was stored \(1 inputs refused\)"):
        commit_dataset(tmp_path, [], REFUSED, {})
    row = store_volume(tmp_path, make_volume((16, 16, 16)))
    with pytest.raises(StoreError, match="two manifest rows have the key"):
        commit_dataset(tmp_path, [row, row], [], {})
    assert not (tmp_path / "dataset.json").exists()


class Killed(BaseException):
    """Stands for kill -9."""


def run_until(monkeypatch, limit, act):
    """Run act, dying at the limit-th system call that makes something durable; returns whether it got through."""
    calls = 0

    def counted(real, after):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls == limit and not after:
                raise Killed
            result = real(*args)
            if calls == limit:
                raise Killed
            return result

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace, after=limit % 2 == 0))
        patch.setattr(os, "fsync", counted(os.fsync, after=False))
        try:
            act()
        except Killed:
            return False
    return True


def test_a_commit_killed_anywhere_leaves_old_or_new(tmp_path, monkeypatch):
    base = make_dataset(tmp_path / "base", SHAPES)
    row = store_volume(tmp_path / "base", make_volume((20, 20, 20), seed=77))
    rows = tuple(sorted((*base.rows, row), key=lambda row: row.key))
    old, new = base.fingerprint, fingerprint(rows)
    seen = set()
    for limit in range(1, 60):
        path = shutil.copytree(tmp_path / "base", tmp_path / f"killed-{limit}")
        whole = run_until(monkeypatch, limit, lambda path=path: commit_dataset(path, rows, REFUSED, {"n": 2}))
        dataset = Dataset.open(path)
        seen.add(dataset.fingerprint)
        assert dataset.fingerprint in {old, new}
        assert (dataset.fingerprint == new) == (len(dataset.rows) == 3) == (dataset.quarantine == REFUSED)
        # A second commit, killed as early as it can be, must not break what the first one left.
        before = dataset.fingerprint
        run_until(monkeypatch, 6, lambda path=path: commit_dataset(path, rows[:1], (), {"n": 3}))
        assert Dataset.open(path).fingerprint in {before, fingerprint(rows[:1])}
        assert commit_dataset(path, rows, REFUSED, {"n": 2}) == new
        assert sorted(p.name for p in path.glob("*.parquet*")) == [
            "fingerprints.parquet",
            "manifest.parquet",
            "quarantine.parquet",
        ]
        if whole:
            break
    assert whole
    assert limit > 10
    assert seen == {old, new}


def test_a_first_commit_killed_anywhere_leaves_none_or_new(tmp_path, monkeypatch):
    row = store_volume(tmp_path / "base", make_volume((16, 16, 16)))
    for limit in range(1, 60):
        path = shutil.copytree(tmp_path / "base", tmp_path / f"killed-{limit}")
        whole = run_until(monkeypatch, limit, lambda path=path: commit_dataset(path, [row], (), {}))
        if (path / "dataset.json").exists():
            assert Dataset.open(path).rows == (row,)
        else:
            with pytest.raises(StoreError, match="no commit record"):
                Dataset.open(path)
        if whole:
            break
    assert whole


def test_many_volumes_do_not_keep_every_reader(dataset, monkeypatch):
    monkeypatch.setattr("mim_scale.store.dataset._OPEN_VOLUMES", 1)
    first = dataset.reader(dataset.rows[0])
    dataset.reader(dataset.rows[1])
    assert dataset.reader(dataset.rows[0]) is not first
    assert np.issubdtype(first.read_box(0, Box((0, 0, 0), (1, 1, 1))).dtype, np.int16)


def test_a_damaged_table_is_damage(dataset):
    (dataset.path / "manifest.parquet").write_bytes(b"no parquet")
    with pytest.raises(DamagedError):
        Dataset.open(dataset.path)
