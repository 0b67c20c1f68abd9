"""The data verbs as a user types them: what is printed, and the exit code."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.commands.build import build
from data_pipeline.commands.scan import scan
from data_pipeline.commands.stats import stats
from data_pipeline.commands.verify import verify
from mim_scale.cli import run
from mim_scale.config import BuildConfig
from mim_scale.errors import SourceError, StoreError
from tests.pipeline.sources import Series, config, phantom, with_tags, write_image, write_series


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_image(tmp_path / "in" / "a.nii.gz", phantom(0))
    write_image(tmp_path / "in" / "labels.nii.gz", (phantom(0) > 0).astype(np.uint8))
    write_series(tmp_path / "in" / "series", Series(phantom(1)))
    write_series(tmp_path / "in" / "mr", with_tags(Series(phantom(2)), Modality="MR"))
    (tmp_path / "in" / "notes.txt").write_text("words")
    return tmp_path / "in"


def test_scan_build_verify_stats(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    assert run(["data", "scan", str(source)]) == 0
    shown = capsys.readouterr().out
    for words in ("4 inputs, 1 of them refused by their headers; 1 other files ignored", "not_ct", "dicom", "nifti"):
        assert words in shown
    command = ["data", "build", str(source), str(store), "--executor", "local", "--workers", "1"]
    assert run(command) == 0
    shown = capsys.readouterr().out
    for words in (
        "4 = 2 stored + 2 quarantined",
        "hu_implausible",
        "not_ct",
        "fingerprint",
        "1 volumes name no patient",
    ):
        assert words in shown
    assert run(command) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run(["data", "verify", str(store), "--deep"]) == 0
    assert "every voxel was decoded)" in capsys.readouterr().out
    assert run(["data", "stats", str(store), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["num_volumes"] == 2
    assert run(["data", "stats", str(store)]) == 0
    assert values["fingerprint"] in capsys.readouterr().out
    _damage(store)
    assert run(["data", "verify", str(store), "--deep"]) == 3
    assert "damage in" in capsys.readouterr().out
    # A bit that turned changes no size: its checksum tells.
    assert run(["data", "verify", str(store)]) == 3


def _damage(store: Path) -> None:
    largest = max(
        (path for path in (store / "volumes").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


def test_mistakes_raise_the_errors_that_end_with_exit_2(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        scan(tmp_path / "gone")
    with pytest.raises(SourceError, match="does not exist"):
        build(config(tmp_path / "gone", tmp_path / "store"))
    for verb in (verify, stats):
        with pytest.raises(StoreError):
            verb(tmp_path / "gone")
    assert not (tmp_path / "store").exists()


def test_a_mistake_on_the_command_line_is_one_line_and_exit_2(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    for words in (["scan", gone], ["scann", gone], ["build", gone], ["build", "--spacing", "2,1", gone, gone]):
        command = [sys.executable, "-c", "from mim_scale.cli import main; main()", "data", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(("text", "spacing"), [("2", (2.0, 2.0, 2.0)), ("2.5,0.8,0.9", (2.5, 0.8, 0.9))])
def test_spacing_stands_before_or_after_the_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, spacing: tuple[float, ...]
) -> None:
    seen: list[BuildConfig] = []
    monkeypatch.setattr("data_pipeline.commands.build.build", lambda config: seen.append(config) or 0)
    for words in (["--spacing", text, "in", "out"], ["in", "out", "--spacing", text]):
        assert run(["data", "build", *words]) == 0
    assert [found.spacing for found in seen] == [spacing, spacing]


def test_what_a_plan_says_to_type_next_is_what_was_planned(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--spacing", "4,2,2", "--executor", "local", "--min-slices", "8"]
    store = tmp_path / "a store"
    assert run(["data", "plan", str(source), str(store), *settings]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: mim-scale ")]
    assert run(shlex.split(line.removeprefix("next: mim-scale "))) == 0
    config = json.loads((store / "dataset.json").read_bytes())["build_config"]
    assert (config["spacing"], config["min_slices"]) == ([4.0, 2.0, 2.0], 8)


def test_the_launcher_takes_overrides_and_refuses_unknown_keys(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "launch/build_shards.py",
        "--config",
        "configs/build.yaml",
        f"source={tmp_path}",
        "spacin=1",
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "did you mean spacing?" in done.stderr
