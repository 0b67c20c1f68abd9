"""`mim-scale checkpoint`: what a user or a script reads of a run's checkpoints, whole ones and damaged ones."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mim_scale.cli import run
from mim_scale.config_file import config_values
from mim_scale.errors import CheckpointError
from mim_scale.training.checkpoint import CheckpointFolder
from tests.training.checkpoints import FACTS, save_state, state
from tests.training.standin import small_config

FORMAT_1 = Path(__file__).parents[1] / "training" / "checkpoint_format_1"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints", keep=3)
    for step, count in ((2, 1), (4, 2), (6, 2)):
        save_state(
            folder, step, *state(step), {**FACTS, "world": count, "config": config_values(small_config())}, count
        )
    return tmp_path / "run"


def lines(action: str, path: Path, capsys: pytest.CaptureFixture[str], code: int) -> list[dict[str, Any]]:
    assert run(["checkpoint", action, str(path), "--json"]) == code
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(("action", "good"), [("list", "there"), ("verify", "whole")])
def test_whole_ones(output: Path, action: str, good: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = lines(action, output, capsys, 0)
    assert [(line["step"], line["world"], line["state"], line["is_damaged"]) for line in found] == [
        (step, world, good, False) for step, world in ((6, 2), (4, 2), (2, 1))
    ]
    folder = output / "checkpoints" / "step_00000004"
    assert found[1]["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert 0 <= found[0]["age_s"] < 600
    assert lines(action, folder, capsys, 0)[0]["step"] == 4
    assert len(lines(action, output / "checkpoints", capsys, 0)) == 3
    assert run(["checkpoint", action, str(output)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[0] == "step_00000006"


def test_damage_is_named_and_ends_with_3(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flipped bit is for `verify` to find, a missing file for `list` as well."""
    flipped = output / "checkpoints" / "step_00000004" / "weights-00001-of-00002.safetensors"
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    assert not any(line["is_damaged"] for line in lines("list", output, capsys, 0))
    found = lines("verify", output, capsys, 3)
    assert [line["is_damaged"] for line in found] == [False, True, False]
    assert found[1]["state"].startswith("weights-00001-of-00002.safetensors does not have the hash")
    os.truncate(flipped, 20)
    (output / "checkpoints" / "step_00000002" / "run.json").unlink()
    found = lines("list", output, capsys, 3)
    assert [line["is_damaged"] for line in found] == [False, True, True]
    assert found[2]["state"].startswith("has no run.json")
    assert run(["checkpoint", "verify", str(output)]) == 3
    assert "weights-00001-of-00002.safetensors has 20 bytes" in capsys.readouterr().out


def test_show_says_what_the_record_says(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["checkpoint", "show", str(output)]) == 0
    told = capsys.readouterr().out
    for words in ("step_00000006", "6 of 6", "by 2 ranks", "mask_in_mask", "hybrid", "torch 2", "format version 3"):
        assert words in told
    assert run(["checkpoint", "show", "--json", str(output / "checkpoints" / "step_00000002")]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2
    shutil.rmtree(output / "checkpoints" / "step_00000006")
    (output / "checkpoints" / "step_00000006").mkdir()
    assert run(["checkpoint", "show", str(output)]) == 0
    assert "step_00000004" in capsys.readouterr().out


def test_format_1_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines("verify", FORMAT_1, capsys, 0)[0]["step"] == 3
    assert run(["checkpoint", "show", str(FORMAT_1)]) == 0
    assert "format version 1" in capsys.readouterr().out


@pytest.mark.parametrize("action", ["list", "verify", "show"])
def test_a_wrong_path_is_a_mistake(action: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no checkpoint")
    for path, words in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "holds no checkpoint")):
        with pytest.raises(CheckpointError, match=words) as caught:
            run(["checkpoint", action, str(path)])
        assert caught.value.exit_code == 2


def test_looking_needs_no_heavy_library(output: Path) -> None:
    code = (
        "import sys; from mim_scale.cli import run; "
        f"code = run(['checkpoint', 'verify', {str(output)!r}]); "
        "assert not {'torch', 'deepspeed', 'mlflow', 'ray'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
