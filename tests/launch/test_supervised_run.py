"""Real runs of two ranks under the supervisor: killed, they end with the weights of a run that nothing happened to."""

import contextlib
import signal
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.launch.runs import (
    LIMIT_S,
    arguments,
    assert_same_end,
    ended,
    family,
    gone,
    losses,
    ranks,
    small_run,
    supervised,
    until,
)
from tests.training.jobs import deepspeed, python, run, torchrun

pytestmark = [pytest.mark.dist, pytest.mark.launcher]


def test_a_killed_rank_is_started_again(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    output, straight = tmp_path / "run", tmp_path / "straight"
    with supervised(*python(), *arguments(config, output)) as job:
        until(lambda: len(losses(output)) >= 3, lambda: job.poll() is None)
        ranks(job.pid)[0].kill()
        code, lines = ended(job, LIMIT_S)
    assert code == 0, lines
    assert len(lines) == 1
    assert lines[0].startswith(
        "supervisor: rank 0 ended without a word, the launcher with 137; starting again in 1 s ("
    )
    assert run([*python(), *arguments(config, straight)]).returncode == 0
    assert_same_end(output, straight)


def test_mlflow_hears_of_an_end_that_the_run_could_not_tell(tmp_path: Path) -> None:
    config, output = small_run(tmp_path, steps=400), tmp_path / "run"
    command = [*python(), *arguments(config, output), "tracking.mlflow=auto"]
    with supervised(*command, options=("--restarts", "0")) as job:
        until(lambda: status_of(output) == "RUNNING" and len(losses(output)) >= 3, lambda: job.poll() is None)
        ranks(job.pid)[0].kill()
        code, lines = ended(job, LIMIT_S)
    assert (code, len(lines)) == (137, 1)
    assert "not started again (restarts without a step after" in lines[0]
    assert status_of(output) == "FAILED"


def status_of(output: Path) -> str | None:
    """The run's status in its own database, None before it is there; sqlite, as importing MLflow takes seconds."""
    if not (output / "mlflow.db").is_file():
        return None
    with contextlib.closing(sqlite3.connect(output / "mlflow.db")) as database:
        found = database.execute("SELECT status FROM runs").fetchall()
    return found[0][0] if found else None


@pytest.mark.soak
@pytest.mark.parametrize("launcher", [torchrun, deepspeed])
def test_rank_launcher_and_supervisor_killed(launcher: Callable[[int], list[str]], tmp_path: Path) -> None:
    config = small_run(tmp_path, steps=40, engine="deepspeed")
    output, straight = tmp_path / "run", tmp_path / "straight"

    def go_on(job: subprocess.Popen[str], steps: int = 3) -> list[psutil.Process]:
        before = len(losses(output))
        until(lambda: len(losses(output)) >= before + steps, lambda: job.poll() is None)
        found = ranks(job.pid)
        assert len(found) == 2
        return found

    with supervised(*launcher(2), *arguments(config, output)) as job:
        go_on(job)[1].kill()
        found = go_on(job)
        found[0].parent().kill()
        assert gone(found)
        go_on(job)
        everyone = family(job)
        job.kill()
        assert gone(everyone)
    with supervised(*launcher(2), *arguments(config, output)) as job:
        go_on(job)
        job.send_signal(signal.SIGTERM)
        code, lines = ended(job, LIMIT_S)
        assert (code, lines) == (75, ["supervisor: asked to stop by SIGTERM: the same command goes on"])
    assert len(losses(output)) < 40, "the kills came too late to mean anything"
    with supervised(*launcher(2), *arguments(config, output)) as job:
        assert ended(job, LIMIT_S) == (0, [])
    assert run([*launcher(2), *arguments(config, straight)]).returncode == 0
    assert_same_end(output, straight)


@pytest.mark.soak
def test_stages_and_ranks_change_again_and_again(tmp_path: Path) -> None:
    """Each leg is asked to stop; the next takes up the pieces that the ranks before it held."""
    config, batch = small_run(tmp_path, steps=14, engine="deepspeed"), ("train.batch=12", "train.micro_batch=2")
    output, straight = tmp_path / "run", tmp_path / "straight"
    legs = ((2, 3, 3, ()), (1, 0, 6, ()), (3, 2, 9, ()), (3, 3, 11, ("train.offload_optimizer=true",)), (2, 1, 14, ()))
    for world, stage, upto, more in legs:
        with supervised(
            *torchrun(world), *arguments(config, output), *batch, f"train.zero_stage={stage}", *more
        ) as job:
            until(lambda upto=upto: len(losses(output)) >= upto, lambda: job.poll() is None)
            job.send_signal(signal.SIGTERM)
            assert ended(job, LIMIT_S)[0] == (75 if upto < 14 else 0)
    assert run([*python(), *arguments(config, straight), *batch, "train.engine=plain"]).returncode == 0
    assert losses(output) == pytest.approx(losses(straight), rel=1e-5)


@pytest.mark.soak
@pytest.mark.parametrize("launcher", [torchrun, deepspeed])
def test_a_mistake_under_launchers(launcher: Callable[[int], list[str]], tmp_path: Path) -> None:
    config = small_run(tmp_path)
    with supervised(*launcher(2), *arguments(config, tmp_path / "run"), "train.stepz=3") as job:
        code, lines = ended(job, LIMIT_S)
    assert code == 2
    assert lines[-1] == "supervisor: rank 0 ended with 2; not started again"
