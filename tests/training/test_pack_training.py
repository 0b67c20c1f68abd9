"""Training from a pack is training from its store."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mim_scale.errors import StoreError
from mim_scale.streaming.pack_write import write_pack
from mim_scale.training.journal import read_journal
from mim_scale.training.loop import pretrain
from mim_scale.training.stop import StopRequest
from tests.synthetic import make_dataset
from tests.training.jobs import PRETRAIN, python, write_config
from tests.training.jobs import run as run_job
from tests.training.standin import small_config

VARYING = ("time", "samples_per_second", "data_wait")


def told(run):
    rows = [row for row in read_journal(Path(run) / "journal.jsonl") if row["kind"] in ("step", "held_out")]
    return [{name: value for name, value in row.items() if name not in VARYING} for row in rows]


def weights_of(run):
    return load_file(Path(run) / "checkpoints" / "step_00000003" / "weights.safetensors")


def test_three_steps_without_the_store_are_those_with_it(tmp_path):
    """Losses, held-out losses and weights of launch/pretrain.py, the store taken away: equal to the last bit."""
    dataset = make_dataset(tmp_path / "store")
    runs = [tmp_path / "from_store", tmp_path / "from_pack"]
    config = small_config(str(dataset.path), str(runs[0]), engine="plain", steps=3)
    start = [*python(), PRETRAIN, "--config", str(write_config(config, tmp_path))]
    write_pack(config, tmp_path / "pack", 0, 12)
    assert pretrain(config) == 0
    shutil.move(dataset.path, tmp_path / "elsewhere")
    done = run_job([*start, f"output={runs[1]}", f"data.pack={tmp_path / 'pack'}"])
    assert done.returncode == 0, done.stderr
    assert told(runs[0]) == told(runs[1])
    assert [row["kind"] for row in told(runs[1])] == ["held_out", "step", "step", "step", "held_out"]
    ours, theirs = (weights_of(run) for run in runs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


def test_a_pack_that_ends_too_early_is_refused_before_the_first_step(tmp_path):
    dataset = make_dataset(tmp_path / "store", [(48, 48, 48)] * 3)
    config = small_config(str(dataset.path), str(tmp_path / "run"), engine="plain", steps=3)
    write_pack(config, tmp_path / "pack", 0, 11)
    start = [*python(), PRETRAIN, "--config", str(write_config(config, tmp_path)), f"data.pack={tmp_path / 'pack'}"]
    done = run_job(start)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"error: {tmp_path / 'pack'}: holds positions 0 to 10, the run asks for 0 to 11; make one that has them with "
        "`mim-scale data pack OUT --config CONFIG --from 0 --to 12`, or lower train.steps"
    )
    assert not (tmp_path / "run" / "journal.jsonl").exists() or not told(tmp_path / "run")
    # What it holds is enough for two steps.
    done = run_job([*start, "train.steps=2", "optimizer.warmup_steps=1", f"output={tmp_path / 'other'}"])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("first", "stop", "more_held_out", "words"), [
    (4, 12, 0, "holds positions 4 to 11, the run asks for 0 to 11"),
    (0, 12, 1, "held-out samples, the run asks for"),
])  # fmt: skip
def test_a_pack_that_lacks_the_first_or_held_out_samples_is_refused(tmp_path, first, stop, more_held_out, words):
    dataset = make_dataset(tmp_path / "store", [(48, 48, 48)] * 3)
    config = small_config(str(dataset.path), str(tmp_path / "run"), engine="plain", steps=3)
    write_pack(config, tmp_path / "pack", first, stop)
    data = config.data.model_copy(update={"pack": str(tmp_path / "pack")})
    held_out = config.held_out.model_copy(update={"samples": config.held_out.samples + more_held_out})
    with pytest.raises(StoreError, match=words):
        pretrain(config.model_copy(update={"data": data, "held_out": held_out}))


class StopOnce(StopRequest):
    """A signal that comes during the first step."""

    is_set = True


def test_a_run_goes_on_from_a_pack_of_its_later_positions(tmp_path):
    dataset = make_dataset(tmp_path / "store", [(48, 48, 48)] * 3)
    config = small_config(str(dataset.path), str(tmp_path / "run"), engine="plain", steps=3)
    assert pretrain(config, StopOnce()) == 75
    write_pack(config, tmp_path / "pack", 4, 12)
    data = config.data.model_copy(update={"pack": str(tmp_path / "pack")})
    assert pretrain(config.model_copy(update={"data": data})) == 0
    assert [row["step"] for row in told(tmp_path / "run") if row["kind"] == "step"] == [1, 2, 3]
