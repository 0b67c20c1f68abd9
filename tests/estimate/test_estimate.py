"""`mim-scale estimate` for a run: what it says from a journal and from measured steps, what it refuses."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from mim_scale.cli import run
from mim_scale.config import PretrainConfig
from mim_scale.config_file import dump_config, load_config
from mim_scale.errors import ConfigError, MimScaleError
from mim_scale.estimate import asked, fit, timed_steps
from mim_scale.estimate import pace as calibrate
from mim_scale.estimate.scaling import ring_s
from mim_scale.methods import cost
from mim_scale.methods.cost import FEWEST_FIRST, Cost
from mim_scale.training import memory
from mim_scale.training.run_folder import CONFIG
from tests.estimate.written import BETWEEN, COST, GIB, MILLION, WITHIN, estimated, write_link, write_run
from tests.models.small import changed
from tests.synthetic import make_dataset
from tests.training import jobs
from tests.training.standin import small_config


@pytest.fixture(autouse=True)
def _no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds each; tests/models/test_cost.py looks at them."""
    monkeypatch.setattr(asked, "cost_of", lambda config, policy, is_counted: COST)


def test_a_run_on_one_rank_is_said_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From its own journal, on its own cluster: its own time, and what saves and measurements add."""
    folder = write_run(tmp_path / "run")
    found = estimated(capsys, "--config", folder / CONFIG, "--from", folder, "--cores", 2)
    step = found["run"]["step"]
    assert step["training"] == pytest.approx(0.45)
    assert step["saves"] == pytest.approx(0.02 / 2)
    assert step["held_out"] == pytest.approx(3.0 / 3)
    undisturbed = 100 * (0.45 + 0.01 + 1.0) / 3600
    assert undisturbed < found["run"]["hours"] < 1.001 * undisturbed
    assert found["run"]["disk"]["checkpoint"] == 12 * MILLION
    assert found["run"]["memory"]["host_copy"] == 12 * MILLION
    assert [row["ranks"] for row in found["scaling"]] == [1]


def test_a_cluster_of_64_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, link = write_run(tmp_path / "run", is_kept=False, batch=1024), write_link(tmp_path / "link.json")
    common = ["--config", folder / CONFIG, "--from", folder, "--link", link, "--nodes", 64]
    common += ["--volumes", 10_000, "--epochs", 800]
    found = estimated(capsys, *common)
    assert (found["run"]["ranks"], found["run"]["nodes"]) == (512, 64)
    assert found["run"]["steps"] == math.ceil(800 * 10_000 / 1024)
    assert found["run"]["rank_hours"] == pytest.approx(512 * found["run"]["hours"])
    size = COST.gradient_bytes
    exchange = ring_s(size, 8, WITHIN) + ring_s(size, 64, BETWEEN)
    # Besides the gradient, six small exchanges: two before micro-batches, four of the step.
    assert found["run"]["step"]["exchange"] == pytest.approx(exchange + 6 * (7 * 1e-5 + 63 * 1e-4))
    rows = found["scaling"]
    assert [row["ranks"] for row in rows] == [2**power for power in range(10)]
    assert [row["batch"] for row in rows] == [2 * 2**power for power in range(10)]
    efficiencies = [row["efficiency"] for row in rows]
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert rows[-1]["fixed_batch_s"] == rows[-1]["step_s"]
    assert estimated(capsys, *common, "--network", "0.1,1000")["run"]["hours"] > 2 * found["run"]["hours"]
    never = estimated(capsys, *common, "--mtbf", 0.001)
    assert never["run"]["hours"] is None


def test_people_are_told_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, link = write_run(tmp_path / "run"), write_link(tmp_path / "link.json")
    two = write_run(tmp_path / "two", world=2, step_s=0.6, batch=16)
    words = [
        "--config",
        folder / CONFIG,
        "--from",
        folder,
        "--link",
        link,
        "--world",
        8,
        "--beside",
        folder,
        "--beside",
        two,
    ]
    assert run(["estimate", *map(str, words)]) == 0
    shown = capsys.readouterr().out
    assert "run: 100 steps of 8 samples, 800 in all" in shown
    assert "a rank" in shown
    assert "copy of a save" in shown
    told = {line.split()[-1]: line.split() for line in shown.splitlines() if line.endswith((str(folder), str(two)))}
    assert told[str(folder)][:3] == ["1", "8", "0.5000"]
    assert told[str(folder)][4] == "-10.0%"
    assert told[str(two)][:2] == ["2", "16"]


def test_a_run_on_several_ranks_gives_the_pace_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its exchanges are taken off, its ranks' share is counted."""
    folder, link = write_run(tmp_path / "run", world=2), write_link(tmp_path / "link.json")
    found = estimated(capsys, "--config", folder / CONFIG, "--from", folder, "--link", link, "--world", 2)
    pace = found["calibration"]["pace"]
    exchange = ring_s(4 * MILLION, 2, WITHIN) + 8 * 1e-5
    assert pace["micro_batch_s"] == pytest.approx((0.45 - exchange) / 4)
    # Of what it was measured on the model says what was measured, but for the slower of two ranks.
    step = found["run"]["step"]
    assert step["training"] - step["slowest"] == pytest.approx(0.45)
    kept = tmp_path / "pace.json"
    kept.write_text(json.dumps(found))
    again = estimated(capsys, "--config", folder / CONFIG, "--from", kept, "--link", link, "--world", 2)
    assert again["run"]["step"] == step


def test_steps_disk_and_memory_need_no_pace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(small_config(batch=64, activation_checkpointing="none", zero_stage=1)))
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"num_sources": 110, "num_refused": 10, "bytes_stored": 5e9}))
    found = estimated(capsys, "--config", config, "--plan", plan, "--world", 4, "--volumes", 1000)
    assert found["run"]["disk"]["store"] == 50e9
    assert found["run"]["epochs"] == 6 * 64 / 1000
    assert found["run"]["memory"]["optimizer"] == 3 * MILLION
    assert found["run"]["memory"]["host_copy"] == 3 * MILLION
    assert "step" not in found["run"]


def test_auto_is_chosen_for_the_memory_that_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "cost_of", lambda config, policy: COST)
    monkeypatch.setattr(cost, "cost_of", lambda config, policy: COST)
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(small_config(batch=64, activation_checkpointing="auto", zero_stage="auto")))
    assert run(["estimate", "--config", str(config), "--world", "4", "--memory", "2"]) == 0
    shown = capsys.readouterr().out
    assert "ZeRO stage auto: 1 fits" in shown
    assert "activation checkpointing auto: none fits" in shown
    assert run(["estimate", "--config", str(config), "--world", "4", "--memory", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert "ZeRO stage auto: 3 is the least there is" in shown
    assert "(ZeRO-3, checkpointing all)" in shown


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--world", "2", "--from", "RUN"], "give --link"),
        (["--nodes", "2", "--from", "RUN"], "--network GBIT"),
        (["--world", "12", "--link", "LINK"], "not a multiple of 8"),
        (["--world", "3"], "train.batch 8 is not a multiple of 3 ranks"),
        (["--nodes", "2", "--world", "2"], "say the same twice"),
        (["--network", "fast", "--from", "RUN"], "expected Gbit/s"),
        (["--network", "nan", "--from", "RUN"], "expected Gbit/s"),
        (["--network", "1e400", "--from", "RUN"], "expected Gbit/s"),
        (["--network", "1,", "--from", "RUN"], "expected Gbit/s"),
        (["--network", "100"], "--network changes how long a run takes, which needs a pace"),
        (["--cores", "4", "--world", "2"], "--cores changes how long"),
        (["--mtbf", "100"], "--mtbf changes how long"),
        (["--memory", "40"], "--memory decides what --fit proposes"),
        (["--memory", "40", "--world", "2"], "--memory decides what --fit proposes"),
        (["--measure", "--world", "2"], "--measure is of a micro-batch alone"),
        (["--from", "no/such"], "no/such"),
        (["--from", "CONFIG"], "is neither a run's folder"),
        (["--from", "SHORT"], "2 steps can be used"),
        (["--from", "TWO"], "whose exchanges cannot be told"),
        (["--link", "CONFIG"], "is not what launch/measure_link.py"),
        (["--plan", "CONFIG"], "is not what `mim-scale data plan --json`"),
        (["--epochs", "3"], "give --volumes"),
        (["--epochs", "0.001", "--volumes", "10"], "all of them within optimizer.warmup_steps"),
        (["--run-steps", "2"], "expected 5 or more"),
        (["--mtbf", "0"], "expected more than 0"),
        (["--beside", "RUN"], "needs a pace"),
        (["--fit", "--device", "cuda"], "give --memory GIB"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], told: str, tmp_path: Path) -> None:
    places = {
        "RUN": write_run(tmp_path / "run"),
        "SHORT": write_run(tmp_path / "short", steps=5),
        "TWO": write_run(tmp_path / "two", world=2),
        "LINK": write_link(tmp_path / "link.json"),
    }
    places["CONFIG"] = places["RUN"] / CONFIG
    with pytest.raises(MimScaleError) as caught:
        run(["estimate", "--config", str(places["CONFIG"]), *(str(places.get(word, word)) for word in words)])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def fitted(capsys: pytest.CaptureFixture[str], config: Path, *words: object) -> tuple[dict[str, Any], PretrainConfig]:
    """What --fit proposes, and the config with what it says pasted behind it."""
    found = estimated(capsys, "--config", config, "--fit", *words)["fit"]
    return found, load_config(PretrainConfig, config, found["overrides"])


def test_fit_takes_what_computes_least_then_the_most_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cost_of(config: PretrainConfig, policy: str, is_counted: bool) -> Cost:
        of_one = {"none": 8, "second": 6, "stem": 4, "all": 2}[policy] * GIB // (2 if config.train.views_at_once else 1)
        whole = {"activation_bytes": of_one * config.train.micro_batch, "gradient_bytes": GIB, "state_bytes": 3 * GIB}
        return Cost(GIB // 4, 0, 0, **whole, batch_bytes=0, tensors=9)

    monkeypatch.setattr(fit, "cost_of", cost_of)
    config = tmp_path / "config.yaml"
    small = small_config(batch=64, engine="deepspeed", zero_stage=1)
    config.write_text(dump_config(changed(small, checkpoint={"background": False})))
    # 20 GiB usable: a sample takes 8, and weights, gradients, buffer and moments of one rank 6 more; two would take 22.
    found, pasted = fitted(capsys, config, "--memory", 25)
    assert (pasted.train.activation_checkpointing, pasted.train.micro_batch, pasted.train.zero_stage) == ("none", 1, 1)
    assert found["memory"]["device"] <= 20 * GIB
    found, pasted = fitted(capsys, config, "--memory", 40)
    assert pasted.train.micro_batch == 2
    assert "no more fit" in found["reason"]
    # Over many ranks the whole share of the batch is one micro-batch.
    found, pasted = fitted(capsys, config, "--memory", 400, "--world", 16)
    assert pasted.train.micro_batch == 4
    assert "whole share" in found["reason"]
    _, pasted = fitted(capsys, config, "--memory", 10)
    assert pasted.train.activation_checkpointing in {"stem", "all"}
    # Moments over many ranks are next to nothing.
    _, pasted = fitted(capsys, config, "--memory", 7, "--world", 64, "train.micro_batch=1")
    assert pasted.train.micro_batch == 1
    with pytest.raises(ConfigError, match=r"nothing fits 1.00 GiB.*the least is"):
        run(["estimate", "--config", str(config), "--fit", "--memory", "1"])


def test_steps_that_are_really_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: of a store, and of noise where there is none."""
    store = make_dataset(tmp_path / "store").path
    for name, is_of_store in ((str(store), True), (str(tmp_path / "none"), False)):
        config = small_config(store=name, batch=1, engine="plain", activation_checkpointing="none", steps=20)
        monkeypatch.setattr("sys.stdin", io.StringIO("go\n"))
        found = timed_steps.time_steps(config, 5)
        assert found.is_of_store == is_of_store
        assert len(found.micro_batch_s) == len(found.update_s) == len(found.wait_s) == 5
        assert min(found.micro_batch_s) > 0
        assert (found.read_s > 0) == is_of_store
        assert found.held_out_s > 0
        assert found.copy_s > 0


def test_what_a_measuring_process_met_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = calibrate.subprocess.Popen

    def failing(command: list[str], **how: Any) -> Any:
        code = "import sys; print('error: the store is damaged', file=sys.stderr); sys.exit(3)"
        return real([command[0], "-c", code], **how)

    monkeypatch.setattr(calibrate.subprocess, "Popen", failing)
    with pytest.raises(MimScaleError, match="the store is damaged") as caught:
        calibrate.measure_pace(small_config(), "none", 5)
    assert caught.value.exit_code == 3


@pytest.mark.soak
@pytest.mark.dist
def test_measured_from_end_to_end(tmp_path: Path) -> None:
    """The link of two ranks, the pace of one and of two side by side, a run on two, and all of it beside each other."""
    store = make_dataset(tmp_path / "store").path
    config = jobs.write_config(
        small_config(store=str(store), output=str(tmp_path / "run"), batch=4, steps=12, engine="plain"), tmp_path
    )
    link = tmp_path / "link.json"
    measured = jobs.run([*jobs.torchrun(2), "launch/measure_link.py", "--out", str(link)])
    assert measured.returncode == 0, measured.stderr[-2000:]
    assert "within a node, 2 members" in measured.stdout
    alone = jobs.run([*jobs.python(), "launch/measure_link.py", "--out", str(tmp_path / "none.json")])
    assert alone.returncode == 2
    assert jobs.errors_of(alone)
    assert not (tmp_path / "none.json").exists()
    trained = jobs.run([*jobs.torchrun(2), jobs.PRETRAIN, "--config", str(config)])
    assert trained.returncode == 0, trained.stderr[-2000:]
    words = ["estimate", "--config", str(config), "--run-steps", "5", "--link", str(link), "--json"]
    done = jobs.run([*jobs.python(), "-m", "mim_scale.cli", *words, "--beside", str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert [row["ranks"] for row in found["scaling"]] == [1, 2]
    # The run's journal tells all that decides.
    assert [line for line in found["beware"] if "journal" in line] == []
    (beside,) = found["beside"]
    assert beside["ranks"] == 2
    # Another machine's load may double a time; a model that forgets half of a step's work is further off.
    assert 0.2 < beside["predicted_s"] / beside["measured_s"] < 5


def test_every_policy_is_weighed() -> None:
    """The order in which settings are tried has each policy at each stage, and stage 3 after all others."""
    tried = list(fit._candidates(small_config(engine="deepspeed", zero_stage=2)))
    first = tried[: len(tried) // 3]
    assert {policy for _, _, policy in first} == set(FEWEST_FIRST)
    stages = [stage for _, stage, _ in first]
    assert stages.index(3) == 3 * len(FEWEST_FIRST)
    assert stages[0] == 2
