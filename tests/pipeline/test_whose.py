"""Whose a volume is holds in stores, folders and hold-outs alike: nobody is on two sides of a split."""

import os
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_pipeline.build.run import Outcome, Silent, run_build
from data_pipeline.leakage import load_side
from data_pipeline.pseudonym_key import load_key
from data_pipeline.sources.inventory import Inventory
from mim_scale.errors import SourceError, StoreError
from mim_scale.store.manifest import write_fingerprints
from tests.pipeline.sources import config, phantom, write_image

SHAPE = (20, 40, 40)


@pytest.fixture(autouse=True)
def _own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "keys"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _write(root: Path, files: dict[str, int], subjects: str) -> Path:
    for name, seed in files.items():
        write_image(root / f"{name}.nii.gz", phantom(seed, SHAPE))
    (root / "subjects.csv").write_text("path,subject\n" + subjects)
    return root


def _build(root: Path, store: Path, **settings: object) -> Outcome:
    return run_build(config(root, store, **settings), Silent())


def test_a_listed_subject_is_the_same_in_a_store_and_in_a_folder(tmp_path: Path) -> None:
    corpus = _write(tmp_path / "corpus", {"x": 1}, "x.nii.gz,ALICE\n")
    test_set = _write(tmp_path / "test", {"y": 2}, "y.nii.gz,ALICE\n")
    _build(test_set, tmp_path / "test_store")
    key = load_key()
    subjects = {load_side(path, key).rows[0].subject for path in (test_set, tmp_path / "test_store")}
    assert len(subjects) == 1
    for number, held in enumerate((test_set, tmp_path / "test_store")):
        _write(corpus, {"x": 1, "z": 3}, "x.nii.gz,ALICE\nz.nii.gz,BOB\n")
        outcome = _build(corpus, tmp_path / f"store{number}", hold_out=(str(held),))
        assert [row.detail.split(":")[0] for row in outcome.quarantine] == ["same_patient"]
        assert len(outcome.rows) == 1


def test_the_owner_of_a_dropped_copy_is_not_forgotten(tmp_path: Path) -> None:
    root = _write(
        tmp_path / "in", {"a": 1, "b": 1, "c": 2, "d": 3}, "a.nii.gz,P1\nb.nii.gz,P2\nc.nii.gz,P2\nd.nii.gz,P3\n"
    )
    outcome = _build(root, tmp_path / "store")
    assert outcome.reasons == {"duplicate": 1}
    assert len({row.subject for row in outcome.rows}) == 3
    assert len({row.group for row in outcome.rows}) == 2


def test_whoever_is_held_out_is_out_with_all_scans(tmp_path: Path) -> None:
    root = _write(tmp_path / "in", {"x1": 1, "x2": 2, "y": 3}, "x1.nii.gz,ALICE\nx2.nii.gz,ALICE\ny.nii.gz,BOB\n")
    held = tmp_path / "held"
    write_image(held / "copy.nii.gz", phantom(1, SHAPE))
    outcome = _build(root, tmp_path / "store", hold_out=(str(held),))
    assert sorted(row.detail.split(":")[0] for row in outcome.quarantine) == ["same_patient", "same_voxels"]
    assert len(outcome.rows) == 1


def test_a_link_does_not_hide_the_folder_that_it_leads_to(tmp_path: Path) -> None:
    root = tmp_path / "in"
    _write(root, {"real/x": 1, "real/y": 2}, "real/x.nii.gz,P1\nreal/y.nii.gz,P1\n")
    (root / "a_link").symlink_to("real")
    with Inventory(root) as inventory:
        inventory.list_files()
        inventory.read_headers()
        assert [(source.name, source.subject) for source in inventory.sources()] == [
            ("real/x.nii.gz", "P1"),
            ("real/y.nii.gz", "P1"),
        ]


def test_a_list_of_fingerprints_of_another_version_is_one_line(tmp_path: Path) -> None:
    root = _write(tmp_path / "in", {"x": 1}, "x.nii.gz,P1\n")
    rows = load_side(root, load_key()).rows
    for wrong in (bytes([99]) + rows[0].fingerprint[1:], rows[0].fingerprint[:-1]):
        write_fingerprints(tmp_path / "list.parquet", iter([replace(rows[0], fingerprint=wrong)]))
        assert pq.ParquetFile(tmp_path / "list.parquet").metadata.num_rows == 1
        with pytest.raises(StoreError, match="another version of mim-scale"):
            load_side(tmp_path / "list.parquet")


def test_a_build_that_was_overtaken_destroys_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _write(tmp_path / "first", {"x": 1}, "x.nii.gz,P1\n")
    second = _write(tmp_path / "second", {"y": 2}, "y.nii.gz,P2\n")
    store, read_headers, done = tmp_path / "store", Inventory.read_headers, []

    def overtaken(self: Inventory, *values: object) -> None:
        read_headers(self, *values)  # type: ignore[arg-type]  # whatever it was given
        if not done:
            done.append(True)
            _build(first, store)

    monkeypatch.setattr(Inventory, "read_headers", overtaken)
    with pytest.raises(StoreError, match="another build has finished here"):
        _build(second, store)
    assert len(list((store / "volumes").iterdir())) == 1


def test_a_pipe_for_a_description_or_for_metadata_keeps_nobody_waiting(tmp_path: Path) -> None:
    root = _write(tmp_path / "in", {"x": 1}, "x.nii.gz,P1\n")
    (root / "image.zarr").mkdir()
    os.mkfifo(root / "image.zarr" / "zarr.json")
    assert _build(root, tmp_path / "store").reasons == {"unreadable": 1}
    (root / "subjects.csv").unlink()
    os.mkfifo(root / "subjects.csv")
    with pytest.raises(SourceError, match="is no regular file"):
        _build(root, tmp_path / "store")
