"""What a store refused: shown, tried again, let pass; and the proof that nothing else was lost."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.build.run import Outcome, Silent, plan_build, run_build
from data_pipeline.commands.quarantine import ADVICE
from data_pipeline.hold_out import Held, HoldOut
from data_pipeline.overlay import NO_VOXELS, Voxels
from data_pipeline.reasons import Reason
from mim_scale.cli import run
from mim_scale.errors import ConfigError, SourceError, StoreError
from mim_scale.store.dataset import Dataset
from mim_scale.store.manifest import FingerprintRow
from tests.pipeline.sources import config, phantom, write_image
from tests.pipeline.test_build import Inline


@pytest.fixture(autouse=True)
def _inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.build.run.make_executor", lambda config: Inline())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_image(tmp_path / "in" / "good.nii.gz", phantom(0))
    write_image(tmp_path / "in" / "CANARY label.nii.gz", (phantom(1) > 0).astype(np.uint8))
    (tmp_path / "in" / "CANARY broken.nii").write_bytes(b"x" * 400)
    return tmp_path / "in"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def _build(source: Path, store: Path) -> Outcome:
    return run_build(config(source, store), Silent())


def _rows(store: Path) -> dict[str, str]:
    return {row.reason: row.source_key for row in Dataset.open(store).quarantine}


def test_list_shows_keys_and_with_the_source_their_paths(
    source: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _build(source, store)
    assert run(["data", "quarantine", "list", str(store)]) == 0
    shown = capsys.readouterr().out
    assert _rows(store)["unreadable"] in shown
    assert "2 refused inputs" in shown
    assert "CANARY" not in shown
    assert run(["data", "quarantine", "list", str(store), "--json", "--names", str(source)]) == 0
    listed = {row["reason"]: row["name"] for row in json.loads(capsys.readouterr().out)}
    assert listed == {"hu_implausible": "CANARY label.nii.gz", "unreadable": "CANARY broken.nii"}
    assert run(["data", "quarantine", "show", str(store), "--reason", "unreadable"]) == 0
    assert "get it again from where it came" in capsys.readouterr().out


def test_another_key_cannot_show_paths(
    source: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _build(source, store)
    other = tmp_path / "other.key"
    other.write_text("ab" * 32)
    other.chmod(0o600)
    monkeypatch.setenv("MIM_SCALE_KEY_FILE", str(other))
    with pytest.raises(StoreError, match="made with another pseudonym key"):
        run(["data", "quarantine", "list", str(store), "--names", str(source)])


def test_a_waived_input_is_stored_and_its_row_says_so(source: Path, store: Path) -> None:
    first = _build(source, store)
    key = _rows(store)["hu_implausible"]
    assert run(["data", "quarantine", "waive", str(store), key]) == 0
    outcome = _build(source, store)
    assert dict(outcome.reasons) == {"unreadable": 1}
    assert outcome.num_volumes == first.num_volumes + 1
    (waived,) = (row for row in outcome.rows if "waived_hu_implausible" in row.flags)
    assert waived.source_key == key
    # The builder's notes may be removed: the record keeps what was waived.
    for path in (store / "build").iterdir():
        path.unlink()
    assert _build(source, store).fingerprint == outcome.fingerprint


def test_only_judgements_can_be_waived(source: Path, store: Path) -> None:
    _build(source, store)
    with pytest.raises(StoreError, match="refused as unreadable, which is no matter of judgement"):
        run(["data", "quarantine", "waive", str(store), _rows(store)["unreadable"]])
    with pytest.raises(StoreError, match="name the inputs"):
        run(["data", "quarantine", "waive", str(store)])
    with pytest.raises(StoreError, match="no refused input has the key 00"):
        run(["data", "quarantine", "retry", str(store), "00"])
    with pytest.raises(StoreError, match="nothing was refused for gantry_tilt"):
        run(["data", "quarantine", "list", str(store), "--reason", "gantry_tilt"])


def test_retry_looks_at_an_unchanged_file_again(
    source: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _build(source, store)
    seen: list[str] = []
    from data_pipeline.build import task

    real = task.read_source

    def reading(root: Path, found: object) -> object:
        seen.append(str(found.name))  # type: ignore[attr-defined]
        return real(root, found)  # type: ignore[arg-type]

    monkeypatch.setattr(task, "read_source", reading)
    assert _build(source, store).was_complete
    assert run(["data", "quarantine", "retry", str(store), "--reason", "unreadable"]) == 0
    assert "1 refused inputs will be tried again" in capsys.readouterr().out
    _build(source, store)
    assert seen == ["CANARY broken.nii"]


def test_the_scan_proves_that_every_input_has_a_row(
    source: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _build(source, store)
    assert run(["data", "scan", str(source), "--store", str(store)]) == 0
    assert "each of the 3 inputs is a row" in capsys.readouterr().out
    write_image(source / "more.nii.gz", phantom(3))
    with pytest.raises(StoreError, match=r"1 volumes \+ 2 quarantined are not the 4 inputs"):
        run(["data", "scan", str(source), "--store", str(store)])


def test_a_plan_writes_nothing_and_knows_what_is_done(
    source: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["data", "plan", str(source), str(store), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["num_sources"], values["num_done"], values["is_measured"]) == (3, 0, False)
    assert values["bytes_raw"] == 2 * 2 * phantom().size
    assert not store.exists()
    _build(source, store)
    found = plan_build(config(source, store), Silent())
    assert (found.num_done, found.raw_to_do, found.is_measured) == (3, 0, True)


def test_parts_together_are_the_whole(source: Path, store: Path, tmp_path: Path) -> None:
    for seed in range(4, 12):
        write_image(source / f"{seed}.nii.gz", phantom(seed))
    whole = _build(source, tmp_path / "whole")
    started: list[int] = []
    for part in range(1, 4):
        outcome = run_build(config(source, store, part=f"{part}/3"), Silent())
        assert not outcome.fingerprint
        assert not (store / "dataset.json").exists()
        started.append(outcome.num_sources)
    assert sum(started) == whole.num_sources
    assert max(started) < whole.num_sources

    def nothing_left(task: object) -> object:
        raise AssertionError("every part is done")

    outcome = run_build(config(source, store), Silent(), nothing_left)  # type: ignore[arg-type]
    assert outcome.fingerprint == whole.fingerprint
    assert outcome.quarantine == whole.quarantine


@pytest.mark.parametrize("part", ["17/16", "0/3", "3", "1/x", "-1/3"])
def test_a_part_that_is_none_is_one_line(source: Path, store: Path, part: str) -> None:
    with pytest.raises(ConfigError, match="part"):
        run(["data", "build", str(source), str(store), f"--part={part}"])
    assert not store.exists()


def test_copies_of_one_scan_stay_on_one_side(source: Path, store: Path, tmp_path: Path) -> None:
    """The same voxels under another spacing are another volume of another subject, and one group."""
    write_image(source / "again.nii.gz", phantom(0), spacing_mm=(1.6, 1.8, 5.0))
    outcome = _build(source, store)
    assert len(outcome.rows) == 2
    assert len({row.subject for row in outcome.rows}) == 2
    assert len({row.group for row in outcome.rows}) == 1
    assert any("have copies under another subject" in note for note in outcome.notes)


def test_what_is_held_out_is_kept_out_and_the_row_says_why(source: Path, store: Path, tmp_path: Path) -> None:
    for seed in (21, 22):
        write_image(source / f"{seed}.nii.gz", phantom(seed))
    benchmark = tmp_path / "benchmark"
    write_image(benchmark / "test case.nii.gz", phantom(21), "PIR")
    all_of_it = _build(source, store)
    outcome = run_build(config(source, store, hold_out=(str(benchmark),)), Silent())
    assert outcome.num_volumes == all_of_it.num_volumes - 1
    assert outcome.num_sources == outcome.num_volumes + outcome.num_quarantined
    (held,) = (row for row in outcome.quarantine if row.reason == "held_out")
    assert held.detail.startswith("same_voxels: ")
    assert "test case" not in held.detail
    assert len(list((store / "volumes").iterdir())) == outcome.num_volumes
    assert run_build(config(source, store, hold_out=(str(benchmark),)), Silent()).was_complete
    with pytest.raises(SourceError, match="no such store, folder, image or list"):
        run_build(config(source, store, hold_out=(str(tmp_path / "gone"),)), Silent())


def test_a_build_lays_its_own_voxels_over_what_is_held_out(
    source: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[bool] = []

    def matches(
        self: HoldOut, rows: Sequence[FingerprintRow], key_check: str = "", voxels: Voxels = NO_VOXELS
    ) -> dict[str, Held]:
        read.extend(voxels(row.key) is not None for row in rows)
        return {}

    monkeypatch.setattr(HoldOut, "matches", matches)
    benchmark = tmp_path / "benchmark"
    write_image(benchmark / "test case.nii.gz", phantom(21), "PIR")
    outcome = run_build(config(source, store, hold_out=(str(benchmark),)), Silent())
    assert read == [True] * outcome.num_volumes


def test_every_reason_has_an_advice() -> None:
    assert set(ADVICE) == set(map(str, Reason))
