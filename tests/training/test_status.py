"""`mim-scale status`: what a folder says of its run, while another process has it and after that."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mim_scale.cli import run
from mim_scale.config_file import dump_config
from mim_scale.errors import ConfigError
from mim_scale.training.journal import Journal
from mim_scale.training.run_folder import CONFIG, JOURNAL, LOCK
from tests.training.standin import small_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 of 100 steps of 4 samples, two samples a second, the 7th step left out, taken up twice."""
    (tmp_path / CONFIG).write_text(dump_config(small_config(steps=100)))
    journal, now = Journal(tmp_path / JOURNAL), time.time()
    for step in range(41):
        if step in (0, 20):
            journal.write("start", step, time=now, world=1 + (step == 20))
        if step:
            out: dict[str, Any] = {"left_out": "the loss is not finite", "volumes": ["a"]} if step == 7 else {}
            loss = None if step == 7 else 10.0 / step
            facts = {"epoch": step / 10, "samples_per_second": 2.0, "data_wait": 0.25, "time": now - 30}
            if step > 20:
                facts |= {"slowest_rank": step % 3 > 0, "slowest_times": 1.0 + (step % 3 > 0)}
            journal.write("step", step, loss=loss, **facts, **out)
    journal.write("held_out", 40, held_out={"loss": 0.5})
    journal.close()
    (tmp_path / "checkpoints" / "step_00000036").mkdir(parents=True)
    return tmp_path


def test_steps_that_are_made_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(folder, capsys)["again_from"] is None
    journal = Journal(folder / JOURNAL)
    journal.write("start", 36, time=time.time() - 90, world=2)
    journal.write("held_out", 36, held_out={"loss": 0.5})
    assert status_of(folder, capsys)["again_from"] == 36
    assert run(["status", str(folder)]) == 0
    assert "taken up after step 36, 1 min 30 s ago: steps up to 40 are made again" in capsys.readouterr().out
    journal.write("step", 41, loss=1.0, epoch=4.1, samples_per_second=2.0, data_wait=0.25, time=time.time())
    journal.close()
    assert status_of(folder, capsys)["again_from"] is None


def status_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert run(["status", str(folder), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch, found = small_config().train.batch, status_of(folder, capsys)
    assert (found["state"], found["step"], found["steps"], found["starts"], found["world"]) == (
        "not running",
        40,
        100,
        2,
        2,
    )
    assert found["left_s"] == pytest.approx(60 * batch / 2.0)
    assert found["step_age_s"] == pytest.approx(30, abs=10)
    assert (found["loss"], found["held_out"], found["left_out"]) == (0.25, {"loss": 0.5}, 1)
    assert (found["slowest_rank"], found["slowest_times"]) == (1, 2.0)
    assert found["checkpoint_step"] == 36
    assert found["checkpoint_age_s"] < 60
    assert run(["status", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "step 40 of 100 (40.0%), epoch 4.00; 2.00 samples/s, data wait 25%" in told
    assert "1 steps left out" in told


def test_running_ends_with_its_process(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    host = os.uname().nodename
    (folder / LOCK).write_text(json.dumps({"pid": job.pid, "host": host}))
    assert status_of(folder, capsys)["state"] == "running"
    job.kill()
    job.wait()
    assert status_of(folder, capsys)["state"] == "not running"
    (folder / LOCK).write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    assert status_of(folder, capsys)["holder"] == "process 1 on elsewhere"


def test_finished_and_empty(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "checkpoints" / "step_00000100").mkdir()
    assert status_of(folder, capsys)["state"] == "finished"
    (folder / JOURNAL).unlink()
    for entry in (folder / "checkpoints").iterdir():
        entry.rmdir()
    found = status_of(folder, capsys)
    assert (found["step"], found["left_s"], found["checkpoint_step"], found["loss"]) == (0, None, None, None)
    assert run(["status", str(folder)]) == 0
    assert "no checkpoint yet" in capsys.readouterr().out


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run's folder: it has no config\.yaml"):
        run(["status", str(tmp_path)])
    with pytest.raises(ConfigError, match="--every 0"):
        run(["status", str(tmp_path), "--watch", "--every", "0"])
