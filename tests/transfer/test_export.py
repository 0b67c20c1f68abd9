"""The encoder that is handed over is the one that was trained, or a one-line error."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mim_scale
from mim_scale.commit import sha256_file, sha256_values
from mim_scale.config_file import config_values
from mim_scale.errors import CheckpointError
from mim_scale.methods.build import build_method
from mim_scale.training.checkpoint import CheckpointFolder
from mim_scale.transfer.export import export, load_encoder
from tests.models.small import random_masks, small_config
from tests.training.checkpoints import save_state

SPACING_MM = [[1.0, 0.5, 0.5], [2.0, 0.9, 0.9]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def make_run(folder: Path, steps: tuple[int, ...] = (2, 4)) -> Path:
    for step in steps:
        method = trained(step)
        facts = {"config": config_values(small_config()), "fingerprint": "ab" * 32, "spacing_mm": SPACING_MM}
        save_state(CheckpointFolder(folder / "checkpoints", keep=3), step, method.state_dict(), {}, facts)
    return folder


def trained(step: int) -> nn.Module:
    method = build_method(small_config())
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.01 * step)
    return method


@pytest.fixture
def exported(run: Path, tmp_path: Path) -> Path:
    return export(run, tmp_path / "encoder").folder


@pytest.mark.parametrize("theirs", ["notes.txt", "pytorch_model.bin"])
def test_a_folder_with_something_else_in_it_is_left_alone(run: Path, exported: Path, theirs: str) -> None:
    assert export(run, exported).folder == exported
    (exported / theirs).write_text("precious")
    with pytest.raises(CheckpointError, match="is no export, or holds more"):
        export(run, exported)
    assert (exported / theirs).read_text() == "precious"


def test_another_program_s_config_is_no_export(run: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="is no export, or holds more"):
        export(run, tmp_path / "hf")


@torch.no_grad()
def test_exported_encoder_is_the_trained_one_exactly(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = export(run, tmp_path / "new" / "encoder")
    assert report.step == 4
    encoder = mim_scale.load_encoder(str(report.folder))
    assert capsys.readouterr().out == f"{report.folder}: {report.tensors} tensors loaded, 0 missing, 0 unexpected\n"
    reference, views = trained(4).encoder.eval(), torch.rand(2, 1, 16, 16, 16)
    assert torch.equal(encoder(views), reference(views))
    visible, _ = random_masks(2, 64, 20, 0)
    assert torch.equal(encoder(views, visible), reference(views, visible))
    for mine, theirs in zip(encoder.features(views), reference.features(views), strict=True):
        assert torch.equal(mine, theirs)
    assert not encoder.training
    assert report.parameters == sum(parameter.numel() for parameter in encoder.parameters())
    assert str(report).endswith("MB")


def test_the_record_tells_what_a_user_needs(exported: Path) -> None:
    record = json.loads((exported / "config.json").read_text())
    assert record["view"] == [16, 16, 16]
    assert record["window_hu"] == [-1000, 1000]
    assert record["spacing_mm"] == [[1.0, 0.5, 0.5], [2.0, 0.9, 0.9]]
    assert record["pretraining"]["method"]["name"] == "mask_in_mask"
    assert record["pretraining"]["step"] == 4
    assert record["pretraining"]["dataset_fingerprint"] == "ab" * 32
    tensors = load_file(exported / "model.safetensors")
    assert record["parameters"] == {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}
    assert sorted(entry.name for entry in exported.parent.iterdir()) == ["encoder", "run"]


def test_one_checkpoint_can_be_named_and_an_export_replaced(run: Path, exported: Path) -> None:
    report = export(run / "checkpoints" / "step_00000002", exported)
    assert report.step == 2
    assert "an earlier export was replaced" in str(report)
    modes = {path.stat().st_mode & 0o777 for path in exported.iterdir()}
    assert len(modes) == 1, "weights are as readable as what stands beside them"
    assert json.loads((exported / "config.json").read_text())["pretraining"]["step"] == 2


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = run / "checkpoints" / "step_00000004" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert export(run, tmp_path / "encoder").step == 2
    assert "step_00000004" in capsys.readouterr().out


def refused(message: str, path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_encoder(path)
    assert "\n" not in str(caught.value)


def rewrite(exported: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, exported / "model.safetensors")
    record = json.loads((exported / "config.json").read_text())
    record["files"]["model.safetensors"] = sha256_file(exported / "model.safetensors")
    seal(exported, json.dumps(record))


def test_damage_is_one_line(exported: Path, tmp_path: Path, run: Path) -> None:
    refused("no such folder", tmp_path / "nowhere")
    refused(r"has no config\.json: it is no export", run)
    weights = exported / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused("it is damaged", exported)
    weights.unlink()
    refused(r"model\.safetensors is missing", exported)
    record = (exported / "config.json").read_text()
    (exported / "config.json").write_text(record[:100])
    refused("is unreadable", exported)
    (exported / "config.json").write_text(record.replace('"format_version": 1', '"format_version": 9'))
    refused("format version 9, this program reads 1", exported)
    (exported / "config.json").write_text(record.replace("-1000.0", "-175.0"))
    refused("was changed after it was written", exported)
    seal(exported, record.replace('"view"', '"look"'))
    refused("'view' is missing", exported)
    seal(exported, record.replace('"depth": 1', '"depth": "one"'))
    refused("depth", exported)


def seal(exported: Path, text: str) -> None:
    """Write a config.json with the digest that its content has."""
    record = json.loads(text)
    record.pop("digest")
    record["digest"] = sha256_values(record)
    (exported / "config.json").write_text(json.dumps(record))


def test_tensors_that_do_not_fit_are_one_line(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(exported / "model.safetensors")
    rewrite(exported, tensors | {"head.weight": torch.zeros(3)})
    load_encoder(exported)
    assert "0 missing, 1 unexpected (head.weight)" in capsys.readouterr().out
    rewrite(exported, tensors | {"norm.weight": torch.zeros(3)})
    refused(r"norm\.weight is \[3\], the encoder's is \[24\]", exported)
    del tensors["norm.weight"]
    rewrite(exported, tensors)
    refused(r"1 of \d+ tensors of the encoder are missing \(norm\.weight\)", exported)


def test_what_cannot_be_exported_is_one_line(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "encoder"
    with pytest.raises(CheckpointError, match="no such folder"):
        export(tmp_path / "nowhere", target)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        export(tmp_path / "empty", target)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("kept")
    with pytest.raises(CheckpointError, match="is there already and is no export"):
        export(run, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "kept"
    assert not target.exists()
    method = trained(6)
    weights = {name: value for name, value in method.state_dict().items() if name != "encoder.norm.bias"}
    facts = {"config": config_values(small_config()), "fingerprint": "ab"}
    save_state(CheckpointFolder(run / "checkpoints", keep=3), 6, weights, {}, facts)
    with pytest.raises(CheckpointError, match=r"tensors of the encoder are missing \(norm\.bias\)"):
        export(run, target)
    assert not target.exists()
