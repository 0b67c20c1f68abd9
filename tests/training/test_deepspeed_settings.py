"""What a user adds to DeepSpeed's dictionary is taken, or refused with both values."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mim_scale.config import PretrainConfig
from mim_scale.config_file import check_config, config_values
from mim_scale.errors import ConfigError
from mim_scale.training.deepspeed_settings import deepspeed_config
from mim_scale.training.engine import build_engine
from mim_scale.training.loop import pretrain as pretrain_here
from mim_scale.training.placement import Placement
from mim_scale.training.ranks import Ranks, joined
from tests.synthetic import make_dataset
from tests.training.jobs import PRETRAIN, errors_of, python, run, write_config
from tests.training.standin import StandIn, small_config


def settings(world: int = 1, **train: Any) -> dict[str, Any]:
    return deepspeed_config(small_config(engine="deepspeed", **train), Ranks(0, world, 0, torch.device("cpu")))


def test_what_is_not_ours_passes_at_any_depth() -> None:
    users = {
        "wall_clock_breakdown": True,
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000},
        "train_batch_size": "auto",
    }
    found, without = settings(zero_stage=2, deepspeed=users), settings(zero_stage=2)
    assert found["wall_clock_breakdown"] is True
    assert found["zero_optimization"] == {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000}
    assert found["train_batch_size"] == without["train_batch_size"]
    assert found.keys() == without.keys() | {"wall_clock_breakdown"}


@pytest.mark.parametrize(
    ("users", "words"),
    [
        (
            {"train_batch_size": 999},
            "train.deepspeed.train_batch_size is 999, but by train.batch it is 4: leave it out here, and set that",
        ),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3, but by train.zero_stage it is 1"),
        ({"gradient_clipping": 7.0}, "gradient_clipping is 7.0, but by optimizer.clip_norm it is"),
        ({"optimizer": {"type": "Adam"}}, "train.deepspeed.optimizer: this is decided by optimizer"),
        ({"bf16": {"enabled": True}}, "train.deepspeed.bf16: this is decided by train.precision"),
        ({"activation_checkpointing": {}}, "decided by train.activation_checkpointing"),
    ],
)
def test_what_we_decide_is_refused(users: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        settings(zero_stage=1, deepspeed=users)


def test_the_same_value_is_no_conflict() -> None:
    assert settings(zero_stage=1, deepspeed={"zero_optimization": {"stage": 1}})["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize(
    "train",
    [
        {"engine": "plain", "offload_optimizer": True},
        {"engine": "deepspeed", "zero_stage": 0, "offload_optimizer": True},
        {"engine": "plain", "deepspeed": {"a": 1}},
    ],
)
def test_what_would_be_ignored_is_refused(train: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="deepspeed"):
        small_config(**train)


def pretrain(tmp_path: Path, config: PretrainConfig, text: str) -> Any:
    (tmp_path / "ds.json").write_text(text)
    words = ["--config", str(write_config(config, tmp_path)), f"output={tmp_path / 'run'}", "--deepspeed_config"]
    return run([*python(), PRETRAIN, *words, str(tmp_path / "ds.json"), "train.batch=4"])


def test_a_file_reaches_deepspeed(tmp_path: Path) -> None:
    make_dataset(tmp_path / "store")
    config = small_config(str(tmp_path / "store"), steps=3, engine="deepspeed")
    job = pretrain(tmp_path, config, json.dumps({"zero_optimization": {"reduce_bucket_size": "many"}}))
    assert job.returncode == 2
    (line,) = errors_of(job)
    assert "train.deepspeed: DeepSpeed refuses it" in line
    assert "reduce_bucket_size" in line
    # Nothing was begun: the folder is free for another run.
    values = config_values(small_config(str(tmp_path / "store"), str(tmp_path / "run"), steps=4, engine="plain"))
    assert pretrain_here(check_config(PretrainConfig, values, "test")) == 0


def test_what_deepspeed_has_given_up_is_one_line() -> None:
    given_up = {"zero_optimization": {"mics_shard_size": 1}}
    config = small_config(engine="deepspeed", zero_stage=3, deepspeed=given_up)
    with joined(Placement(0, 1, 0, "127.0.0.1", 0)) as ranks, pytest.raises(ConfigError, match="mics_shard_size"):
        build_engine(StandIn(), config, ranks)


@pytest.mark.parametrize(("text", "words"), [("{", "not readable as JSON"), ("[1]", "expected a JSON object")])
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str, words: str) -> None:
    job = pretrain(tmp_path, small_config(), text)
    assert job.returncode == 2
    (line,) = errors_of(job)
    assert words in line
