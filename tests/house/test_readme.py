"""README's commands, as they stand there: each is run, the long ones on small data and for few steps.

A command that is not in one of the tables below fails the test, so README cannot promise what nobody tried.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.sources import Series, phantom, write_image, write_series
from tests.training.jobs import environment, free_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SMALL = [
    "train.steps=2",
    "train.batch=2",
    "train.precision=fp32",
    "optimizer.warmup_steps=1",
    "data.held_out_subjects=1",
    "held_out.samples=2",
    "plan.box=64",
    "plan.view=32",
    "model.widths=[4,4,4,12]",
    "model.blocks=[1,1,1]",
    "model.depth=1",
    "model.heads=2",
    "method.decoder={width: 12, depth: 1, heads: 2, mlp_ratio: 4}",
]
"""What turns configs/base.yaml into a run of seconds."""

ELSEWHERE = {
    "make test": "this suite",
    "ray job submit": "tests/pipeline/test_ray_job.py, on a cluster of its own",
    "deepspeed --hostfile": "needs other machines; its launch file and overrides are those of the command above it",
    "mim-scale estimate --config configs/base.yaml --run-steps": "tests/estimate/test_estimate.py, at a size that ends",
    "mim-scale doctor": "tests/doctor/test_doctor.py: whether all is well depends on the machine",
    "mim-scale bench step": "tests/bench/test_step.py, at a size that ends",
    "srun": "needs Slurm; tests/training/test_placement.py has what srun sets",
    "mlflow ui": "a server that does not end; tests/training/test_launcher.py reads the database",
}
"""Commands that are not run here, by how they begin, and where else they are."""


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def commands() -> list[str]:
    """Every command line of README's plain code blocks, continuation lines joined, comments cut off."""
    lines = "\n".join(blocks("")).replace("\\\n", " ").splitlines()
    found = [line.split(" #")[0].split("    #")[0].strip() for line in lines]
    inline = re.findall(r"^`(mlflow [^`]+)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    return [line for line in (*found, *inline) if line and not line.startswith("#")]


def is_elsewhere(command: str) -> bool:
    return any(command.startswith(start) for start in ELSEWHERE)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which README's relative paths mean something, with an archive at /path/to/ct's place."""
    home = tmp_path_factory.mktemp("readme")
    for name in ("configs", "launch"):
        (home / name).symlink_to(ROOT / name)
    for seed in range(3):
        write_image(home / "ct" / f"{seed}.nii.gz", phantom(seed, (40, 64, 56)))
    write_series(home / "ct" / "series", Series(phantom(7)))
    return home


def run(command: list[str], home: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command,
        cwd=home,
        env=environment(PATH=path),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def runnable(command: str, home: Path) -> list[str]:
    """The command with this test's archive in it, and small where it trains."""
    words = shlex.split(command.replace("/path/to/ct", str(home / "ct")))
    if words[0] == "deepspeed":
        words[1:3] = ["--num_gpus", "2", "--master_port", str(free_port())]
        words += (
            SMALL
            if "configs/base.yaml" in words
            else ["train.steps=2", "optimizer.warmup_steps=1", "held_out.samples=2"]
        )
    elif words[:2] == ["mim-scale", "estimate"]:
        words += SMALL
    return words


@pytest.mark.launcher
@pytest.mark.ray
def test_commands_on_own_data_run_one_after_another(home: Path) -> None:
    own = [command for command in commands() if not command.startswith("make ") and not is_elsewhere(command)]
    verbs = [" ".join(command.split()[:3]) for command in own]
    assert [verb.split()[0] for verb in verbs].count("mim-scale") >= 5
    assert any(command.startswith("deepspeed --num_gpus") for command in own)
    for command in own:
        done = run(runnable(command, home), home)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    run_folder = home / "runs" / "mine"
    assert json.loads((run_folder / "journal.jsonl").read_text().splitlines()[-1])
    assert (home / "encoders" / "mine" / "model.safetensors").is_file()
    for snippet in blocks("python"):
        code = f"{snippet}\nassert tokens.shape == (1, 8, 12)\n"
        done = run([sys.executable, "-c", code], home)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "0 missing" in done.stdout


@pytest.mark.launcher
@pytest.mark.ray
@pytest.mark.network
def test_make_demo_at_reduced_steps(tmp_path: Path) -> None:
    assert "make demo" in commands()
    from data_pipeline.example_data import default_cache, fetch_examples
    from mim_scale.errors import SourceError

    try:
        fetch_examples(default_cache(), print)
    except SourceError as error:
        pytest.skip(f"example data cannot be had here: {error}")
    command = [sys.executable, str(ROOT / "examples" / "demo.py")]
    overrides = [
        f"data.store={tmp_path / 'store'}",
        f"output={tmp_path / 'run'}",
        "train.steps=4",
        "held_out.samples=4",
    ]
    first = run([*command, *overrides, "optimizer.warmup_steps=1"], tmp_path)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    assert "held-out loss, level 3" in first.stdout
    assert len(list((tmp_path / "run" / "pictures").glob("*.png"))) >= 2
    again = run([*command, *overrides, "optimizer.warmup_steps=1"], tmp_path)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert "already done: 4 steps" in again.stdout


def test_every_command_is_run_or_named() -> None:
    known = ("make demo", "mim-scale ", "deepspeed --num_gpus", *ELSEWHERE)
    assert [command for command in commands() if not command.startswith(known)] == []
    assert [start for start in ELSEWHERE if not any(command.startswith(start) for command in commands())] == []
