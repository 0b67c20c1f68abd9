"""The real launcher, two ranks, killed again and again: the run ends with the weights of one that nothing met."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mim_scale.config_file import dump_config
from mim_scale.training.journal import read_journal
from tests.synthetic import make_dataset
from tests.training.checkpoints import state_of
from tests.training.jobs import PRETRAIN, ROOT, deepspeed, environment, run, torchrun
from tests.training.standin import small_config

pytestmark = [pytest.mark.launcher, pytest.mark.dist]

STEPS = 16
LIMIT_S = 300


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    make_dataset(folder / "store")
    config = small_config(str(folder / "store"), str(folder / "run"), steps=STEPS)
    (folder / "config.yaml").write_text(dump_config(config))
    return folder / "config.yaml"


def arguments(config: Path, output: Path) -> list[str]:
    return [PRETRAIN, "--config", str(config), f"output={output}", "tracking.mlflow=auto", "held_out.every=8"]


@contextlib.contextmanager
def launched(config: Path, output: Path) -> Iterator[subprocess.Popen[str]]:
    """A job in a session of its own; nothing of it is left behind."""
    log = open(output.parent / f"log_{time.monotonic_ns()}.txt", "w")  # noqa: SIM115
    with log:
        job = subprocess.Popen(
            [*deepspeed(2), *arguments(config, output)],
            cwd=ROOT,
            env=environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        family: list[psutil.Process] = []
        try:
            yield job
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                family = psutil.Process(job.pid).children(recursive=True)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
            job.wait(timeout=LIMIT_S)
            psutil.wait_procs(family, timeout=LIMIT_S)


def until(job: subprocess.Popen[str], happened: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while not (found := happened()):
        assert job.poll() is None, f"ended with {job.returncode} before it happened"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return found


def last_step(output: Path) -> int:
    return max((row["step"] for row in read_journal(output / "journal.jsonl") if row["kind"] == "step"), default=0)


def rank_0(output: Path) -> psutil.Process:
    return psutil.Process(json.loads((output / "run.lock").read_text())["pid"])


def rank_1(job: subprocess.Popen[str]) -> psutil.Process:
    family = psutil.Process(job.pid).children(recursive=True)
    return next(p for p in family if "--local_rank=1" in p.cmdline() and PRETRAIN in p.cmdline()[:4])


def stopped_inside_a_save(output: Path) -> bool:
    """Freeze rank 0 when an unfinished checkpoint is seen; it is inside a save if that is still there then."""
    if not list((output / "checkpoints").glob(".tmp-*")):
        return False
    process = rank_0(output)
    process.suspend()
    if list((output / "checkpoints").glob(".tmp-*/weights*.safetensors")):
        return True
    process.resume()
    return False


def kill_in_a_step(config: Path, output: Path) -> None:
    with launched(config, output) as job:
        until(job, lambda: last_step(output) >= 3)


def kill_inside_a_save(config: Path, output: Path) -> None:
    before = last_step(output)
    with launched(config, output) as job:
        until(job, lambda: stopped_inside_a_save(output))
    assert list((output / "checkpoints").glob(".tmp-*"))
    assert last_step(output) >= before


def kill_one_rank(config: Path, output: Path) -> None:
    before = last_step(output)
    with launched(config, output) as job:
        until(job, lambda: last_step(output) > before)
        family = psutil.Process(job.pid).children(recursive=True)
        rank_1(job).kill()
        assert job.wait(timeout=60) != 0
        assert psutil.wait_procs(family, timeout=30)[1] == [], "a rank outlived the launcher"


def assert_equal_checkpoints(output: Path, other: Path) -> None:
    for ours, theirs in zip(state_of(output, STEPS), state_of(other, STEPS), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    "kills",
    [
        (kill_inside_a_save,),
        pytest.param((kill_in_a_step, kill_inside_a_save, kill_one_rank), marks=pytest.mark.soak),
    ],
)
def test_killed_and_run_again(config_path: Path, tmp_path: Path, kills: Sequence[Callable[[Path, Path], None]]) -> None:
    output, straight = tmp_path / "run", tmp_path / "straight"
    for kill in kills:
        kill(config_path, output)
    assert last_step(output) < STEPS, "the kills came too late to mean anything"
    job = run([*deepspeed(2), *arguments(config_path, output)])
    assert job.returncode == 0, job.stdout + job.stderr
    reference = run([*torchrun(2), *arguments(config_path, straight), "tracking.mlflow=null"])
    assert reference.returncode == 0, reference.stderr
    assert_equal_checkpoints(output, straight)
    assert not list((output / "checkpoints").glob(".tmp-*"))
    told = [
        {row["step"]: (row["loss"], row["grad_norm"]) for row in read_journal(path / "journal.jsonl") if "loss" in row}
        for path in (output, straight)
    ]
    assert told[0] == told[1]
    rows = [row["step"] for row in read_journal(output / "journal.jsonl") if row["kind"] == "step"]
    assert rows == list(range(1, STEPS + 1))
    assert_one_mlflow_run(output)


def assert_one_mlflow_run(output: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{output / 'mlflow.db'}")
    found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert [run.info.status for run in found] == ["FINISHED"]
    points = client.get_metric_history(found[0].info.run_id, "loss")
    assert sorted(point.step for point in points) == list(range(1, STEPS + 1))


def test_mistake_keeps_its_code_through_the_launcher(config_path: Path, tmp_path: Path) -> None:
    job = run([*deepspeed(2), *arguments(config_path, tmp_path / "run"), "train.stepz=3"])
    assert job.returncode == 2
    assert sum(line.startswith("error: ") for line in (job.stdout + job.stderr).splitlines()) == 1
