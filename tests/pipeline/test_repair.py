"""Repair builds damaged volumes again, leaves every other file alone, and leaves a dataset whatever happens."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.build.repair import repair
from data_pipeline.build.run import Silent, run_build
from mim_scale.cli import run
from mim_scale.errors import ConfigError, StoreError
from mim_scale.store.dataset import Dataset, volume_folder
from mim_scale.store.verify import verify
from tests.pipeline.sources import config, phantom, write_image
from tests.pipeline.test_build import Inline


@pytest.fixture(autouse=True)
def _inline(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("run", "repair"):
        monkeypatch.setattr(f"data_pipeline.build.{module}.make_executor", lambda config: Inline())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for seed in range(4):
        write_image(tmp_path / "in" / f"{seed}.nii.gz", phantom(seed))
    return tmp_path / "in"


@pytest.fixture
def dataset(tmp_path: Path, source: Path) -> Dataset:
    run_build(config(source, tmp_path / "store"), Silent())
    return Dataset.open(tmp_path / "store")


def state(path: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time of change and bytes of every file but the builder's own notes."""
    return {
        str(file.relative_to(path)): (file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes())
        for file in sorted(path.rglob("*"))
        if file.is_file() and "build" not in file.parts
    }


def damage(dataset: Dataset, row: int) -> str:
    """Flip a bit of a chunk."""
    key = dataset.rows[row].key
    path = volume_folder(dataset.path, key) / "0" / "c" / "0" / "0" / "0"
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    return key


def remove(dataset: Dataset, row: int) -> str:
    """Lose a whole volume."""
    shutil.rmtree(volume_folder(dataset.path, dataset.rows[row].key))
    return dataset.rows[row].key


def scribble(dataset: Dataset, row: int) -> str:
    """Put a file of somebody else's into a volume."""
    folder = volume_folder(dataset.path, dataset.rows[row].key)
    (folder / "thumbs.db").write_bytes(b"x")
    return dataset.rows[row].key


@pytest.mark.parametrize("harm", [damage, remove, scribble])
def test_only_the_damaged_volume_is_made_again(
    dataset: Dataset, source: Path, harm: Callable[[Dataset, int], str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = state(dataset.path)
    key = harm(dataset, 1)
    assert run(["data", "verify", str(dataset.path)]) == 3
    assert f"volume {key}" in capsys.readouterr().out
    assert run(["data", "verify", str(dataset.path), "--repair", str(source)]) == 0
    out = capsys.readouterr().out
    assert "1 of 1 damaged volumes were built again and checked" in out
    after = state(dataset.path)
    assert {name: values[2] for name, values in after.items()} == {name: values[2] for name, values in before.items()}
    changed = {name.split("/")[1] for name in after if after[name][:2] != before[name][:2]}
    assert changed <= {f"{key}.zarr"}
    assert Dataset.open(dataset.path).fingerprint == dataset.fingerprint
    assert verify(dataset.path, deep=True) == []
    assert not (dataset.path / "build" / "repair").exists()
    # The builder, too, finds nothing to do.
    assert run_build(config(source, dataset.path), Silent()).was_complete


def test_sources_that_changed_or_went_are_said_in_a_line(
    dataset: Dataset, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [damage(dataset, row) for row in range(3)]
    files = {_key_of(source / f"{seed}.nii.gz", dataset): source / f"{seed}.nii.gz" for seed in range(4)}
    write_image(files[keys[0]], phantom(9))
    files[keys[1]].unlink()
    before = state(dataset.path)
    assert run(["data", "verify", str(dataset.path), "--repair", str(source), "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    details = {problem["key"]: problem["detail"] for problem in told["problems"]}
    assert details.keys() == set(keys[:2])
    assert "its source has changed and gives another volume now" in details[keys[0]]
    assert "its source is no longer there" in details[keys[1]]
    after = state(dataset.path)
    assert {name.split("/")[1] for name in after if after[name] != before[name]} == {f"{keys[2]}.zarr"}
    assert after.keys() == before.keys()
    assert Dataset.open(dataset.path).fingerprint == dataset.fingerprint


def test_a_killed_repair_leaves_the_rest_as_it_was(
    dataset: Dataset, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [damage(dataset, row) for row in range(2)]

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("data_pipeline.build.repair.publish_folder", killed)
        with pytest.raises(KeyboardInterrupt):
            repair(dataset, keys, str(source))
    assert {problem.key for problem in verify(dataset.path)} == set(keys)
    assert repair(dataset, keys, str(source)) == {}
    assert verify(dataset.path) == []


def test_another_key_file_is_refused(dataset: Dataset, source: Path, tmp_path: Path) -> None:
    other = tmp_path / "key"
    other.write_text("ab" * 32)
    os.chmod(other, 0o600)
    with pytest.raises(StoreError, match="another pseudonym key; name its file with --key"):
        repair(dataset, [damage(dataset, 0)], str(source), str(other))


def test_a_damaged_table_is_the_builders(dataset: Dataset, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (dataset.path / "manifest.parquet").write_bytes(b"")
    assert run(["data", "verify", str(dataset.path), "--repair", str(source)]) == 3
    assert "run the same `data build`" in capsys.readouterr().out


def test_a_damaged_record_is_the_builders(dataset: Dataset, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it nobody knows which volumes there are: one line says who mends it."""
    file = dataset.path / "dataset.json"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"format_version": 3', b'"format_version": 2'))
    verb = ["data", "verify", str(dataset.path)]
    for words in ([], ["--repair", str(source)], ["--sample", "50%"]):
        assert run([*verb, *words]) == 3
        shown = capsys.readouterr().out
        said = "--repair mends volumes, not the store's own records: " if "--repair" in words else ""
        said += "run the same `data build`: it writes the store's own records again and keeps the volumes"
        assert [line for line in shown.splitlines() if "keeps the volumes" in line] == [said]
    assert run([*verb, "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert [(problem["key"], problem["file"]) for problem in told["problems"]] == [("", "dataset.json")]
    assert "dataset.json is damaged: it does not have its own digest" in told["problems"][0]["detail"]
    assert run(["data", "build", str(source), str(dataset.path), "--executor", "local", "--workers", "1"]) == 0
    assert file.read_bytes() == whole
    assert run(verb) == 0


@pytest.mark.parametrize("words", [["--sample", "0"], ["--sample", "150%"], ["--sample", "all"], ["--workers", "0"]])
def test_impossible_wishes_are_refused(dataset: Dataset, words: list[str]) -> None:
    with pytest.raises(ConfigError, match=words[0].lstrip("-")):
        run(["data", "verify", str(dataset.path), *words])


def test_a_sample_says_so(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "verify", str(dataset.path), "--sample", "1%", "--seed", "3", "--deep"]) == 0
    assert (
        "whole (1 of 4 volumes, drawn with seed 3; every byte, and every voxel was decoded)" in capsys.readouterr().out
    )


def _key_of(file: Path, dataset: Dataset) -> str:
    """The volume that a file became, by its size."""
    size = file.stat().st_size
    found = [row.key for row in dataset.rows if row.bytes_source == size]
    assert len(found) == 1, "phantoms of equal size: choose other seeds"
    return found[0]
