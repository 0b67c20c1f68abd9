"""Steps that are left out: on all ranks alike, told with their volumes, and known again after a restart."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mim_scale.config import GuardsConfig, PretrainConfig
from mim_scale.methods.mask_in_mask import MaskInMask
from mim_scale.methods.method import Losses
from mim_scale.training.guards import NOT_FINITE, SPIKE, WINDOW, Guards
from mim_scale.training.journal import read_journal
from mim_scale.training.loop import pretrain
from mim_scale.training.stop import StopRequest
from tests.synthetic import make_dataset
from tests.training.standin import small_config


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guards") / "store"
    make_dataset(path)
    return path


def config_of(store: Path, output: Path, **train: Any) -> PretrainConfig:
    return small_config(str(store), str(output), steps=6, **{"engine": "plain", **train})


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], how: float, batch: int) -> None:
    """The loss of the first sample of some steps (counted from 1) is multiplied; positions tell which those are."""
    forward = MaskInMask.forward

    def poisoned(self: MaskInMask, sample: Any) -> Losses:
        losses = forward(self, sample)
        hit = {int(p) // batch + 1 for p in sample.positions if int(p) % batch == 0}
        return Losses(losses.total * how, losses.parts) if torch.is_grad_enabled() and hit & steps else losses

    monkeypatch.setattr(MaskInMask, "forward", poisoned)


def step_rows(output: Path) -> list[dict[str, Any]]:
    return [row for row in read_journal(output / "journal.jsonl") if row["kind"] == "step"]


def weights(output: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return load_file(output / "checkpoints" / f"step_{step:08d}" / "weights.safetensors")


def test_a_step_that_is_not_finite_is_left_out(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What engines do with such a step is in engine_checks.py."""
    config = config_of(store, tmp_path / "run")
    poison(monkeypatch, {3}, math.nan, config.train.batch)
    assert pretrain(config) == 0
    rows = step_rows(tmp_path / "run")
    assert [row["loss"] is None for row in rows] == [False, False, True, False, False, False]
    assert rows[2]["left_out"] == NOT_FINITE
    assert len(rows[2]["volumes"]) >= 1
    assert rows[3]["loss"] == pytest.approx(rows[1]["loss"], rel=0.5), "weights stayed as they were"
    record = json.loads((tmp_path / "run" / "checkpoints" / "step_00000006" / "run.json").read_bytes())
    assert (record["step"], record["updates"]) == (6, 5)
    assert all(bool(value.isfinite().all()) for value in weights(tmp_path / "run").values())


def test_a_run_that_was_stopped_ends_with_the_same_weights(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer's own count is of updates made, not of steps: it must be known again."""
    config = config_of(store, tmp_path / "straight")
    poison(monkeypatch, {2}, math.nan, config.train.batch)
    assert pretrain(config) == 0
    stopped = config_of(store, tmp_path / "stopped")
    stop = StopRequest()
    steps = iter(range(10))
    monkeypatch.setattr(StopRequest, "is_set", property(lambda _: next(steps) >= 3))
    assert pretrain(stopped, stop) == 75
    monkeypatch.setattr(StopRequest, "is_set", property(lambda _: False))
    assert pretrain(stopped) == 0
    ours, theirs = weights(tmp_path / "stopped"), weights(tmp_path / "straight")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class TestGuards:
    def test_more_in_a_row_than_allowed(self) -> None:
        guards = Guards(GuardsConfig(skips_in_a_row=2))
        for expected in (False, False, True):
            guards.note(None, NOT_FINITE)
            assert guards.has_enough == expected
        guards.note(1.0, "")
        assert not guards.has_enough
        assert guards.updates == 1

    def test_a_spike_needs_a_full_window_and_six_deviations(self) -> None:
        draw = np.random.default_rng(0)
        guards = Guards(GuardsConfig(spikes="skip"))
        losses = draw.normal(1.0, 0.1, WINDOW)
        for loss in losses:
            assert guards.judge(100.0) == ""
            guards.note(float(loss), "")
        deviation, mean = float(losses.std()), float(losses.mean())
        assert guards.judge(mean + 5.9 * deviation) == ""
        assert guards.judge(mean + 6.1 * deviation) == SPIKE
        assert guards.judge(mean - 100 * deviation) == "", "a fall is no spike"
        assert guards.leaves_out(SPIKE)
        assert not Guards(GuardsConfig(spikes="tell")).leaves_out(SPIKE)

    def test_what_it_knew_is_in_the_journal(self) -> None:
        rows: list[dict[str, Any]] = [
            {"kind": "step", "step": step, "loss": 1.0 + step % 7 / 10} for step in range(1, WINDOW + 40)
        ]
        rows[10] |= {"loss": None, "left_out": NOT_FINITE}
        rows[20] |= {"loss": 900.0, "left_out": SPIKE}
        rows += [{"kind": "start", "step": 3}]
        live, recalled = (Guards(GuardsConfig(spikes="skip")) for _ in range(2))
        for row in rows[: WINDOW + 10]:
            live.note(row["loss"], row.get("left_out", ""))
        recalled.recall(rows, WINDOW + 10, live.updates)
        assert vars(recalled) == vars(live)
        assert live.updates == WINDOW + 8
