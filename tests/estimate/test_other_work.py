"""A pace tells of the work and the device that it was measured on: others are refused, unknown ones are told."""

import json
from pathlib import Path
from typing import Any

import pytest

from mim_scale.cli import run
from mim_scale.errors import ConfigError
from mim_scale.estimate import asked
from mim_scale.estimate.pace import read_run
from mim_scale.estimate.scaling import ring_s
from mim_scale.training.run_folder import CONFIG, JOURNAL
from tests.estimate.written import BETWEEN, COST, MILLION, WITHIN, estimated, write_link, write_run

OLDER: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked, "cost_of", lambda config, policy, is_counted: COST)


def refused(*words: object) -> str:
    with pytest.raises(ConfigError) as caught:
        run(["estimate", *map(str, words)])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.micro_batch=4", "train.micro_batch is 1 there and 4 here"),
        ("train.precision=bf16", 'train.precision is "fp32" there and "bf16" here'),
        ("train.activation_checkpointing=all", 'train.activation_checkpointing is "none" there and "all" here'),
        ("train.views_at_once=1", "train.views_at_once is null there and 1 here"),
        ("train.compile=true", "train.compile is false there and true here"),
        ("model.depth=3", "model.depth is 1 there and 3 here"),
        ("method.alignment=none", 'method.alignment is "infonce" there and "none" here'),
    ],
)
def test_a_pace_of_other_work_is_refused(
    override: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a run, as a file, and as a run beside."""
    folder = write_run(tmp_path / "run")
    kept = tmp_path / "pace.json"
    kept.write_text(json.dumps(estimated(capsys, "--config", folder / CONFIG, "--from", folder)))
    for source in (folder, kept):
        assert told in refused("--config", folder / CONFIG, override, "--from", source)
    micro_batch, precision = (4, "fp32") if "micro_batch" in override else (1, "bf16")
    other = write_run(tmp_path / "other", micro_batch=micro_batch, precision=precision)
    line = refused("--config", folder / CONFIG, "--from", folder, "--beside", other)
    assert line.startswith(f"--beside {other}: other work")


def test_a_pace_of_another_device_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    gpu = write_run(tmp_path / "gpu", start={"device": "cuda"})
    assert "was measured on cpu, and ranks" in refused(
        "--config", folder / CONFIG, "--from", folder, "--device", "cuda"
    )
    # Where nothing else is said, ranks compute on what the pace was measured on.
    assert estimated(capsys, "--config", folder / CONFIG, "--from", gpu)["calibration"]["device"] == "cuda"
    assert "was measured on cuda" in refused("--config", folder / CONFIG, "--from", folder, "--beside", gpu)


def test_a_run_on_two_nodes_is_not_one_on_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link = write_link(tmp_path / "link.json")
    folder = write_run(tmp_path / "run", world=4, start={"device": "cpu", "hosts": 2})
    words = ["--config", folder / CONFIG, "--from", folder, "--link", link, "--world", 2]
    pace = estimated(capsys, *words)["calibration"]["pace"]
    # Besides the gradient, six small exchanges: two before micro-batches, four of the step.
    exchange = ring_s(4 * MILLION, 2, WITHIN) + ring_s(4 * MILLION, 2, BETWEEN) + 6 * (1e-5 + 1e-4)
    assert pace["micro_batch_s"] == pytest.approx((0.45 - exchange) / 2)
    uneven = write_run(tmp_path / "uneven", world=4, start={"device": "cpu", "hosts": 3})
    assert "not spread evenly over 3 nodes" in refused(*words, "--beside", uneven)


def test_what_an_older_journal_does_not_tell_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link = write_link(tmp_path / "link.json")
    older = write_run(tmp_path / "run", world=2, start=OLDER, activation_checkpointing="auto")
    words = ["--config", older / CONFIG, "--from", older, "--link", link, "--world", 2]
    words += ["train.activation_checkpointing=none"]
    lines = estimated(capsys, *words)["beware"]
    assert [line.partition(": ")[2].partition(";")[0] for line in lines] == [
        "its journal does not say what it computed on",
        "its journal does not say what checkpointing auto chose",
        "its journal does not say on how many nodes it ran",
    ]
    told = write_run(
        tmp_path / "told",
        start={"device": "cpu", "hosts": 1, "activation_checkpointing": "none", "zero_stage": 2},
        engine="deepspeed",
        activation_checkpointing="auto",
        zero_stage="auto",
    )
    found = estimated(
        capsys, "--config", told / CONFIG, "train.activation_checkpointing=none", "train.zero_stage=1", "--from", told
    )
    assert found["beware"] == []
    assert read_run(told).config.train.stage == 2


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        *(("step", "samples_per_second", value) for value in (None, 0, -1.0, "x", True, float("nan"), "MISSING")),
        *(("step", "data_wait", value) for value in (None, 2.0, "MISSING")),
        *(("save", key, value) for key in ("stall_s", "write_s") for value in (None, "MISSING")),
        ("held_out", "time", "MISSING"),
        *(("start", "world", value) for value in (0, None, "x", "MISSING")),
        ("start", "hosts", 2),
        ("start", "device", "tpu"),
    ],
)
def test_an_odd_row_is_named(kind: str, key: str, value: object, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    number = max(number for number, row in enumerate(rows) if row["kind"] == kind)
    rows[number][key] = value
    if value == "MISSING":
        del rows[number][key]
    (folder / JOURNAL).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError) as caught:
        read_run(folder)
    assert f"the {kind} row of step {rows[number]['step']} has " in str(caught.value)
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_clock_that_was_set_back_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    back = next(row for row in rows if row["kind"] == "held_out")
    back["time"] = 1.0
    (folder / JOURNAL).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_run(folder).held_out_s == 3.0
