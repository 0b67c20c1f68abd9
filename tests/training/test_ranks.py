"""Several ranks: the same results as one, and one end for all."""

import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mim_scale.training.journal import read_journal
from mim_scale.training.stop import SIGNALS
from tests.synthetic import make_dataset
from tests.training.checkpoints import state_of
from tests.training.jobs import PRETRAIN, ROOT, environment, errors_of, free_port, python, run, torchrun, write_config
from tests.training.standin import small_config

pytestmark = pytest.mark.dist

STEPS = 20


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "store"
    make_dataset(path)
    return path


@pytest.fixture(scope="module")
def config_path(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    return write_config(small_config(str(store), str(folder / "run"), steps=STEPS), folder)


def pretrain(launcher: list[str], config: Path, output: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    fast = ("checkpoint.every=100", "held_out.every=100", f"output={output}")
    return run([*launcher, PRETRAIN, "--config", str(config), *fast, *overrides])


def losses(output: Path) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in read_journal(output / "journal.jsonl") if row["kind"] == "step"])


def weights(output: Path) -> dict[str, torch.Tensor]:
    return state_of(output, STEPS)[0]


@pytest.fixture(scope="module")
def one_rank(config_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("one") / "run"
    job = pretrain(python(), config_path, output)
    assert job.returncode == 0, job.stderr
    return output


@pytest.fixture(scope="module")
def two_ranks(config_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("two") / "run"
    job = pretrain(torchrun(2), config_path, output)
    assert job.returncode == 0, job.stderr
    return output


def compared(output: Path) -> list[torch.Tensor]:
    """Weights but for attention's biases: keys' biases have no gradient but rounding, which AdamW makes a full step."""
    return [value for name, value in weights(output).items() if not name.endswith("qkv.bias")]


def assert_close(output: Path, other: Path) -> None:
    assert len(losses(output)) == STEPS
    torch.testing.assert_close(losses(output), losses(other), rtol=1e-5, atol=0)
    ours, theirs = (torch.cat([value.flatten() for value in compared(run)]) for run in (output, other))
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    held = [
        [r["held_out"] for r in read_journal(o / "journal.jsonl") if r["kind"] == "held_out"] for o in (output, other)
    ]
    assert held[0][0] == held[1][0], "before the first step, weights are the same: so is every digit"
    assert held[0][-1]["loss"] == pytest.approx(held[1][-1]["loss"], rel=1e-4)


def test_one_and_two_ranks(one_rank: Path, two_ranks: Path) -> None:
    assert_close(one_rank, two_ranks)


@pytest.mark.soak
@pytest.mark.ray
def test_batches_through_ray_on_two_ranks(two_ranks: Path, config_path: Path, tmp_path: Path) -> None:
    """One cluster, started by the first rank and joined by the second, gone at the end; not one bit differs."""
    job = pretrain(torchrun(2), config_path, tmp_path / "run", "data.transport=ray")
    assert job.returncode == 0, job.stderr
    ours, theirs = weights(tmp_path / "run"), weights(two_ranks)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.soak
def test_stage_3_from_the_first_step_to_the_pictures(one_rank: Path, config_path: Path, tmp_path: Path) -> None:
    """Parameters cut up from the start are gathered on every way through the module: training, held out, drawn."""
    output = tmp_path / "run"
    job = pretrain(python(), config_path, output, "train.zero_stage=3")
    assert job.returncode == 0, job.stderr
    assert_close(output, one_rank)
    assert list((output / "pictures").glob("reconstruction_*.png"))


def test_another_number_of_ranks_and_another_stage_go_on(one_rank: Path, config_path: Path, tmp_path: Path) -> None:
    """1 rank at stage 1, then 2 at stage 3, then 1 without DeepSpeed: each stopped by a signal, each taking over."""
    output = tmp_path / "run"
    launches = [
        (python(), "train.zero_stage=1", 4, signal.SIGTERM),
        (torchrun(2), "train.zero_stage=3", 9, signal.SIGUSR1),
    ]
    for launcher, override, stop_after, number in launches:
        job = start(launcher, config_path, output, override)
        wait_for_step(output, stop_after, job)
        signal_rank_0(output, number)
        # torchrun turns every failure of a rank into its own 1
        assert finish(job) == (75 if launcher == python() else 1)
        assert newest(output) > stop_after
    job = pretrain(python(), config_path, output, "train.engine=plain")
    assert job.returncode == 0, job.stderr
    assert "taken up at step" in job.stdout
    torch.testing.assert_close(losses(output), losses(one_rank), rtol=1e-5, atol=0)
    assert len(losses(output)) == STEPS


def start(launcher: list[str], config: Path, output: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [*launcher, PRETRAIN, "--config", str(config), f"output={output}", "held_out.every=100", *overrides]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.DEVNULL, start_new_session=True
    )


def wait_for_step(output: Path, step: int, job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not any(row["step"] >= step for row in read_journal(output / "journal.jsonl") if row["kind"] == "step"):
        assert job.poll() is None, f"ended with {job.returncode} before step {step}"
        assert time.monotonic() < deadline, f"step {step} did not come"
        time.sleep(0.02)


def signal_rank_0(output: Path, number: int) -> None:
    """The others learn of it in the step's exchange."""
    os.kill(int((output / "run.lock").read_text().split('"pid": ')[1].split(",")[0]), number)


def finish(job: subprocess.Popen[str]) -> int:
    return job.wait(timeout=120)


def newest(output: Path) -> int:
    return max(int(path.name.removeprefix("step_")) for path in (output / "checkpoints").glob("step_*"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.batch=3"], "train.batch 3 is not a multiple of 2 ranks"),
        (["train.stepz=3"], "did you mean train.steps?"),
    ],
)
def test_mistake_is_told_once(config_path: Path, tmp_path: Path, overrides: list[str], words: str) -> None:
    job = pretrain(torchrun(2), config_path, tmp_path / "run", *overrides)
    assert job.returncode != 0
    assert len(errors_of(job)) == 1, job.stderr
    assert words in errors_of(job)[0]
    assert "exitcode  : 2" in job.stderr
    assert not (tmp_path / "run").exists()


def test_damage_that_one_rank_meets_ends_all(store: Path, config_path: Path, tmp_path: Path) -> None:
    """Rank 1 reads a damaged volume; rank 0 must not wait for it in a reduction."""
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    for path in copy.rglob("*"):
        if path.is_file() and "/0/" in str(path) and path.name != "zarr.json":
            os.truncate(path, path.stat().st_size // 2)
    began = time.monotonic()
    job = pretrain(torchrun(2), config_path, tmp_path / "run", f"data.store={copy}", "data.held_out_subjects=0")
    assert time.monotonic() - began < 90
    assert len(errors_of(job)) == 1, job.stderr
    assert "level 0" in errors_of(job)[0]
    assert "exitcode  : 3" in job.stderr


def test_a_signal_ends_a_rank_that_waits_for_the_others(config_path: Path) -> None:
    """Seen before: only remembered, so that fifteen minutes and a kill -9 were needed."""
    port = free_port()
    alone = environment(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    job = subprocess.Popen([*python(), PRETRAIN, "--config", str(config_path)], cwd=ROOT, env=alone)
    try:
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        job.terminate()
        assert job.wait(timeout=30) == -signal.SIGTERM
    finally:
        job.kill()


def test_a_mistake_that_only_one_machine_has_is_told_by_its_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = runpy.run_path(PRETRAIN)
    monkeypatch.setitem(launch["main"].__globals__, "RANK_0_SPEAKS_S", 0.1)
    monkeypatch.setattr(sys, "argv", [PRETRAIN, "--config", "/nope.yaml"])
    placed = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"}
    for name, value in placed.items():
        monkeypatch.setenv(name, value)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        assert launch["main"]() == 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert "error: rank 1 on" in capsys.readouterr().err
