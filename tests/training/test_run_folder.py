"""Who may write in a run folder, and with which settings a run may go on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mim_scale.config import PretrainConfig
from mim_scale.config_file import check_config, config_values, load_config
from mim_scale.errors import ConfigError, MimScaleError
from mim_scale.training.run_folder import CONFIG, MAY_CHANGE, RunLock, adopt_config, config_of_record, flatten
from tests.training.standin import small_config

HOLD = """
import sys, time
from pathlib import Path
from mim_scale.training.run_folder import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def changed(config: PretrainConfig, **changes: object) -> PretrainConfig:
    values = config_values(config)
    for key, value in changes.items():
        *parents, last = key.split("__")
        section = values
        for parent in parents:
            section = section[parent]
        section[last] = value
    return check_config(PretrainConfig, values, "changed")


def test_second_run_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"another run is alive in it .process {other.pid} on ") as caught:
        RunLock(tmp_path)
    assert "\n" not in str(caught.value)
    other.kill()
    other.wait()
    other.stdout.close()
    lock = RunLock(tmp_path)
    assert str(os.getpid()) in (tmp_path / "run.lock").read_text()
    lock.release()
    RunLock(tmp_path).release()


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        RunLock(tmp_path / "file" / "run")


MAY = {
    "data__pack": "packs/other",
    "output": "elsewhere",
    "data__store": "moved",
    "data__transport": "ray",
    "data__workers": 7,
    "data__read_ahead": 9,
    "train__micro_batch": 2,
    "train__engine": "plain",
    "train__zero_stage": 2,
    "train__activation_checkpointing": "none",
    "train__views_at_once": 4,
    "train__keep_freed_memory": False,
    "train__compile": True,
    "train__offload_optimizer": True,
    "train__deepspeed": {"wall_clock_breakdown": True},
    "guards__hang_s": 60.0,
    "checkpoint__every": 5,
    "checkpoint__keep": 7,
    "checkpoint__background": False,
    "held_out__every": 1,
    "tracking__mlflow": "auto",
}
MAY_NOT = {
    "seed": 4,
    "data__window_hu": [-900, 1000],
    "data__held_out_subjects": 2,
    "plan__box": 64,
    "model__depth": 2,
    "method__temperature": 0.2,
    "optimizer__learning_rate": 2e-3,
    "train__steps": 7,
    "train__batch": 8,
    "train__precision": "bf16",
    "held_out__samples": 4,
    "guards__skips_in_a_row": 3,
    "guards__spikes": "skip",
}


@pytest.mark.parametrize("key", MAY)
def test_operating_settings_may_change(tmp_path: Path, key: str) -> None:
    adopt_config(small_config(), tmp_path, is_begun=True)
    later = changed(small_config(), **{key: MAY[key]})
    adopt_config(later, tmp_path, is_begun=True)
    adopt_config(later, tmp_path, is_begun=True)


@pytest.mark.parametrize("key", MAY_NOT)
def test_settings_that_change_results_may_not(tmp_path: Path, key: str) -> None:
    adopt_config(small_config(), tmp_path, is_begun=True)
    with pytest.raises(ConfigError, match=r"changes results: set it back, or choose another output") as caught:
        adopt_config(changed(small_config(), **{key: MAY_NOT[key]}), tmp_path, is_begun=True)
    assert str(caught.value).startswith(key.replace("__", "."))
    adopt_config(small_config(), tmp_path, is_begun=True)


def test_the_config_of_a_start_that_was_refused_binds_nobody(tmp_path: Path) -> None:
    adopt_config(small_config(), tmp_path, is_begun=False)
    later = changed(small_config(), train__batch=8)
    adopt_config(later, tmp_path, is_begun=False)
    assert load_config(PretrainConfig, tmp_path / CONFIG) == later


def test_every_setting_is_decided() -> None:
    """A new setting must be put on one side: these tables are the whole config, but for more of the same kind."""
    tested = {key.replace("__", ".") for key in (*MAY, *MAY_NOT)}
    same_kind = ("plan.", "model.", "optimizer.", "method", "tracking.experiment")
    flat = flatten(config_values(small_config()))
    undecided = [key for key in flat if not key.startswith((*tested, *same_kind))]
    assert undecided == []
    assert all(any(key.startswith(allowed) for key in flat) for allowed in MAY_CHANGE)


def test_record_without_a_config() -> None:
    with pytest.raises(MimScaleError, match="not understood by this version"):
        config_of_record({}, "step_1")
    assert config_of_record({"config": config_values(small_config())}, "x") == small_config()
