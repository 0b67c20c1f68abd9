"""One rank, one process: a run is a function of its config, wherever it was interrupted."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mim_scale.config import GuardsConfig, PretrainConfig
from mim_scale.config_file import check_config, config_values
from mim_scale.errors import ConfigError, DamagedError, DivergedError, MimScaleError, StoreError
from mim_scale.methods.mask_in_mask import MaskInMask
from mim_scale.methods.method import Losses
from mim_scale.sampling.order import volume_at
from mim_scale.store.dataset import Dataset, volume_folder
from mim_scale.store.manifest import split_subjects
from mim_scale.training.held_out import HeldOut
from mim_scale.training.journal import read_journal
from mim_scale.training.loop import _share, pretrain, told_share_inside
from mim_scale.training.stop import StopRequest
from tests.synthetic import make_dataset
from tests.training.checkpoints import state_of
from tests.training.jobs import PRETRAIN, errors_of, write_config
from tests.training.jobs import run as run_job
from tests.training.standin import small_config

STEPS = 6


class StopAfter(StopRequest):
    """A signal that comes during the given step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step

    @property
    def is_set(self) -> bool:
        self.left -= 1
        return self.left <= 0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "store"
    make_dataset(path)
    return path


@pytest.fixture(scope="module")
def straight(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    output = tmp_path_factory.mktemp("straight") / "run"
    assert pretrain(config_of(store, output)) == 0
    return output


def config_of(store: Path, output: Path, **train: object) -> PretrainConfig:
    return small_config(str(store), str(output), engine="plain", **train)


def weights_of(output: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return state_of(output, step)[0]


def assert_same_run(output: Path, other: Path) -> None:
    """Weights bit for bit, and every number that was told of every step."""
    a, b = weights_of(output), weights_of(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    told = []
    for run in (output, other):
        rows = [row for row in read_journal(run / "journal.jsonl") if row["kind"] not in ("start", "save")]
        varying = ("time", "samples_per_second", "data_wait")
        told.append([{name: value for name, value in row.items() if name not in varying} for row in rows])
    key = lambda row: (row["kind"], row["step"])  # noqa: E731
    assert sorted(told[0], key=key) == sorted(told[1], key=key)


def test_run_folder(straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_journal(straight / "journal.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, STEPS + 1))
    held_out = [row for row in rows if row["kind"] == "held_out"]
    assert [row["step"] for row in held_out] == [0, 3, 6]
    assert set(held_out[0]["held_out"]) >= {"loss", "level_1", "level_3", "alignment_1_2", "trivial_1", "trivial_3"}
    assert held_out[-1]["held_out"]["loss"] < held_out[0]["held_out"]["loss"]
    assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == ["step_00000004", "step_00000006"]
    record = json.loads((straight / "checkpoints" / "step_00000006" / "run.json").read_text())
    assert (record["step"], record["position"], record["world"]) == (6, 24, 1)
    saves = [row for row in rows if row["kind"] == "save"]
    assert [row["step"] for row in saves] == [2, 4, 6]
    size = sum(facts["bytes"] for facts in record["files"].values())
    assert all(row["bytes"] == size and row["stall_s"] > 0 and row["write_s"] > 0 for row in saves)


def test_started_again_after_the_end(straight: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (straight / "journal.jsonl").read_bytes()
    assert pretrain(config_of(store, straight)) == 0
    assert "already done: 6 steps" in capsys.readouterr().out
    assert (straight / "journal.jsonl").read_bytes() == before


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_stopped_run_saves_and_goes_on(straight: Path, store: Path, tmp_path: Path, stop_at: int) -> None:
    config = config_of(store, tmp_path / "run")
    assert pretrain(config, StopAfter(stop_at)) == 75
    assert weights_of(tmp_path / "run", stop_at)
    assert pretrain(config) == 0
    assert_same_run(tmp_path / "run", straight)


def test_stop_during_the_last_step_is_the_end(straight: Path, store: Path, tmp_path: Path) -> None:
    assert pretrain(config_of(store, tmp_path / "run"), StopAfter(STEPS)) == 0
    assert_same_run(tmp_path / "run", straight)


def test_lost_checkpoints_are_computed_again(straight: Path, store: Path, tmp_path: Path) -> None:
    """As after a kill: the journal is ahead of the newest whole checkpoint."""
    shutil.copytree(straight, tmp_path / "run")
    for step, damaged in ((6, "run.json"), (4, "moments.safetensors")):
        os.truncate(tmp_path / "run" / "checkpoints" / f"step_{step:08d}" / damaged, 10)
    with pytest.raises(MimScaleError, match="none of 2 checkpoints is whole"):
        pretrain(config_of(store, tmp_path / "run"))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert pretrain(config_of(store, tmp_path / "run")) == 0
    assert_same_run(tmp_path / "run", straight)


def test_cut_of_the_batch_does_not_change_results(straight: Path, store: Path, tmp_path: Path) -> None:
    assert pretrain(config_of(store, tmp_path / "run", micro_batch=2, activation_checkpointing="none")) == 0
    losses = [
        [row["loss"] for row in read_journal(output / "journal.jsonl") if row["kind"] == "step"]
        for output in (straight, tmp_path / "run")
    ]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=0)


def other_seed(values: dict[str, Any], store: Path) -> None:
    values["seed"] = 4


def no_store(values: dict[str, Any], store: Path) -> None:
    values["data"]["store"] = str(store / "nowhere")


def uncommitted(values: dict[str, Any], store: Path) -> None:
    copy = Path(values["output"]).parent / "uncommitted"
    shutil.copytree(store, copy)
    (copy / "dataset.json").unlink()
    values["data"]["store"] = str(copy)


def another_store(values: dict[str, Any], store: Path) -> None:
    copy = Path(values["output"]).parent / "another"
    make_dataset(copy, seed=1)
    values["data"]["store"] = str(copy)


def all_held_out(values: dict[str, Any], store: Path) -> None:
    values["data"]["held_out_subjects"] = 4


REFUSALS: list[tuple[Callable[[dict[str, Any], Path], None], type[MimScaleError], str]] = [
    (other_seed, ConfigError, "seed is 4, but the run was begun with 3"),
    (no_store, StoreError, "no such store"),
    (uncommitted, StoreError, "no commit record"),
    (another_store, StoreError, "other volumes mean another order"),
    (all_held_out, ConfigError, "nothing is left to train on"),
]


@pytest.mark.parametrize(("change", "error", "words"), REFUSALS)
def test_refused_before_any_work(
    change: Callable[[dict[str, Any], Path], None],
    error: type[MimScaleError],
    words: str,
    straight: Path,
    store: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "run"
    shutil.copytree(straight, output)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file() and path.name != "run.lock"}
    values = config_values(config_of(store, output))
    change(values, store)
    with pytest.raises(error, match=words) as caught:
        pretrain(check_config(PretrainConfig, values, "changed"))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    after = {path: path.read_bytes() for path in output.rglob("*") if path.is_file() and path.name != "run.lock"}
    assert after == before


def test_another_store_is_refused_before_the_first_checkpoint(store: Path, tmp_path: Path) -> None:
    config = config_of(store, tmp_path / "run")
    assert pretrain(config, StopAfter(1)) == 75
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    values = config_values(config)
    another_store(values, store)
    with pytest.raises(StoreError, match="other volumes mean another order"):
        pretrain(check_config(PretrainConfig, values, "changed"))


def test_corrupt_chunk_stops_the_run_with_its_place(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    dataset = Dataset.open(copy)
    rows, _ = split_subjects(dataset.rows, 3, 1)
    key = sorted(row.key for row in rows)[volume_at(0, len(rows), 3)]
    for path in volume_folder(copy, key).rglob("*"):
        if path.is_file() and "/0/" in str(path) and path.name != "zarr.json":
            data = bytearray(path.read_bytes())
            data[64 : len(data) // 2] = bytes(len(data) // 2 - 64)
            path.write_bytes(data)
    with pytest.raises(DamagedError, match=f"{key}.*level 0") as caught:
        pretrain(config_of(copy, tmp_path / "run"))
    assert caught.value.exit_code == 3


def test_loss_that_is_not_finite_names_step_and_volumes(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = MaskInMask.forward, []

    def diverging(self: MaskInMask, batch: Any) -> Losses:
        losses = forward(self, batch)
        if torch.is_grad_enabled():
            calls.append(batch.keys)
        return Losses(losses.total * float("nan"), losses.parts) if len(calls) == 9 else losses

    monkeypatch.setattr(MaskInMask, "forward", diverging)
    config = config_of(store, tmp_path / "run").model_copy(update={"guards": GuardsConfig(skips_in_a_row=0)})
    with pytest.raises(DivergedError, match="step 3: the loss is not finite on volumes") as caught:
        pretrain(config)
    assert calls[8][0] in str(caught.value)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]
    rows = read_journal(tmp_path / "run" / "journal.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 2]


def test_a_full_disk_ends_a_save_in_one_line_and_leaves_nothing_half(store: Path, tmp_path: Path) -> None:
    """A real limit on the size of a file: the library that writes tensors has an error of its own for it."""
    job = run_job(
        [
            sys.executable,
            "-c",
            "import resource, runpy, signal, sys\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
            f"sys.argv[0] = {PRETRAIN!r}\n"
            f"runpy.run_path({PRETRAIN!r}, run_name='__main__')",
            "--config",
            str(write_config(config_of(store, tmp_path / "run"), tmp_path)),
        ]
    )
    assert job.returncode == 2, job.stdout + job.stderr
    assert len(errors_of(job)) == 1, job.stderr
    assert "the checkpoint of step 2 was not saved" in errors_of(job)[0]
    assert "Traceback" not in job.stderr
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_held_out_loss_that_is_not_finite_ends_the_run(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HeldOut, "measure", lambda *_: {"loss": float("nan")})
    with pytest.raises(DivergedError, match="step 0: the held-out loss is not finite"):
        pretrain(config_of(store, tmp_path / "run"))


def test_a_trivial_predictor_without_error_has_no_share() -> None:
    assert (_share(0.5, 0.25), _share(0.5, 0.0)) == ("2.00", "-")


def test_a_box_that_reaches_beyond_its_volumes_is_said(tmp_path: Path) -> None:
    rows = make_dataset(tmp_path / "store", ((64, 64, 64), (16, 64, 64))).rows
    assert told_share_inside(rows, (32, 64, 64)).startswith("at most 75% of a box of 32 x 64 x 64 voxels")
    assert "coarser" not in told_share_inside(rows, (32, 64, 64))
    assert told_share_inside(rows, (128, 64, 64)).endswith("a smaller plan.box")
