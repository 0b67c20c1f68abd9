"""Hand over the encoder: one folder with its weights and what is needed to use them, without any training state.

`model.safetensors` (fp32, by parameter name of the encoder) and `config.json`, published whole. Anything that reads
safetensors reads the weights; `load_encoder` builds the network and refuses weights that do not fit.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mim_scale.commit import publish_folder, sha256_file, sha256_values, temporary_beside, write_file
from mim_scale.config import PretrainConfig, Section, Size3
from mim_scale.config.models import ModelConfig
from mim_scale.config_file import check_config, config_values, load_config
from mim_scale.errors import CheckpointError, ConfigError
from mim_scale.models.build import build_encoder
from mim_scale.models.encoder import Encoder
from mim_scale.training.checkpoint import Checkpoint, CheckpointFolder, read_checkpoint, read_record
from mim_scale.training.run_folder import CONFIG

FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
RECORD = "config.json"
PREFIX = "encoder."


@dataclass(frozen=True)
class ExportReport:
    """What was exported, and where to."""

    folder: Path
    checkpoint: Path
    step: int
    tensors: int
    parameters: int
    bytes: int
    replaced: bool
    """Whether an earlier export stood there."""

    def __str__(self) -> str:
        return (
            f"{self.folder}: encoder of {self.checkpoint.name}, step {self.step}: {self.tensors} tensors, "
            f"{self.parameters:,} parameters, {self.bytes / 1e6:.1f} MB"
            f"{'; an earlier export was replaced' if self.replaced else ''}"
        )


class _Network(Section):
    model: ModelConfig


def export(run_or_checkpoint: Path, folder: Path) -> ExportReport:
    """Write the encoder of a checkpoint, or of a run's newest whole one, to a folder; an earlier export is replaced.

    Raises:
        CheckpointError: there is no whole checkpoint, it does not fit its own config, or `folder` holds something else.
    """
    checkpoint = _find(run_or_checkpoint)
    folder = folder.resolve()
    replaced = (folder / RECORD).is_file()
    if folder.exists() and not _may_be_replaced(folder):
        raise CheckpointError(f"{folder}: is there already and is no export, or holds more; name another folder")
    config = _config_of(checkpoint)
    encoder = build_encoder(config.model, config.plan.view, config.plan.token)
    weights = {
        name.removeprefix(PREFIX): tensor.contiguous()
        for name, tensor in checkpoint.load()[0].items()
        if name.startswith(PREFIX)
    }
    _fill(encoder, weights, checkpoint.path)
    temporary = temporary_beside(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(weights, temporary / WEIGHTS)
    record = _record(config, checkpoint, weights, sha256_file(temporary / WEIGHTS))
    record["digest"] = sha256_values(record)
    write_file(temporary / RECORD, (json.dumps(record, indent=1) + "\n").encode())
    publish_folder(temporary, folder)
    parameters = sum(tensor.numel() for tensor in weights.values())
    return ExportReport(
        folder, checkpoint.path, checkpoint.step, len(weights), parameters, (folder / WEIGHTS).stat().st_size, replaced
    )


def register_export(report: ExportReport, model: str, alias: str | None) -> str:
    """Make an export a version of a registered model in the MLflow that its run is tracked by; says where it is.

    Raises:
        ConfigError: the run is tracked by none, or MLflow does not take it; the export stands.
    """
    from mim_scale.training.tracking_register import register

    run = report.checkpoint.parent.parent
    checkpoint = read_record(report.checkpoint)
    tracking = _config_of(checkpoint).tracking
    if (run / CONFIG).is_file():
        # Where MLflow is may have changed since the checkpoint was written.
        tracking = load_config(PretrainConfig, run / CONFIG).tracking
    if tracking.mlflow is None:
        raise ConfigError(f"{run}: tracking.mlflow is null, so there is no MLflow to register {report.folder} in")
    facts = {name: str(checkpoint.record.get(name)) for name in ("step", "fingerprint", "config_digest")}
    facts["sha256"] = _read_record(report.folder)["files"][WEIGHTS]
    address = register(run, tracking.mlflow, report.folder, model, alias, facts)
    return f"{address}{f', alias {alias}' if alias else ''}: {report.folder.name} of step {report.step}"


def load_encoder(path: str | Path) -> Encoder:
    """The encoder of an exported folder, in evaluation mode on the CPU; prints one line that says what was loaded.

    It takes views [B, 1, Z, Y, X] of the size in its config.json, intensities scaled from `window_hu` to [0, 1], and
    returns token features [B, tokens, width]; `features` gives the map of every stage.

    Raises:
        CheckpointError: no export is there, it is damaged, or a tensor is missing or of another shape.
    """
    folder = Path(path)
    record = _read_record(folder)
    try:
        held = check_config(_Network, {"model": record["model"]}, str(folder / RECORD))
        encoder = build_encoder(held.model, _size(record["view"]), _size(record["token"]))
        digest = record["files"][WEIGHTS]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / RECORD}: {error} is missing or not usable; export again") from None
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    unexpected = _fill(encoder, _read_weights(folder, digest), folder)
    loaded = len(encoder.state_dict())
    print(f"{folder}: {loaded} tensors loaded, 0 missing, {len(unexpected)} unexpected{_some(unexpected)}", flush=True)
    return encoder.eval()


def _may_be_replaced(folder: Path) -> bool:
    """Whether a folder is empty, or an export of ours with nothing of anybody else's in it."""
    if not folder.is_dir():
        return False
    names = {entry.name for entry in folder.iterdir()}
    if not names:
        return True
    try:
        _read_record(folder)
    except CheckpointError:
        return False
    return names <= {RECORD, WEIGHTS}


def _find(path: Path) -> Checkpoint:
    if (path / "run.json").is_file():
        return read_checkpoint(path)
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    checkpoint = CheckpointFolder(folder, keep=1).newest(print)
    if checkpoint is None:
        found = "no such folder" if not path.exists() else "holds no checkpoint"
        raise CheckpointError(f"{path}: {found}; name a run folder (with checkpoints/ in it) or one checkpoint")
    return checkpoint


def _config_of(checkpoint: Checkpoint) -> PretrainConfig:
    where = f"{checkpoint.path}: config in run.json"
    try:
        return check_config(PretrainConfig, checkpoint.record["config"], where)
    except KeyError:
        raise CheckpointError(f"{where} is missing") from None
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _record(config: PretrainConfig, checkpoint: Checkpoint, weights: dict[str, Tensor], digest: str) -> dict[str, Any]:
    values = config_values(config)
    return {
        "format_version": FORMAT_VERSION,
        "architecture": config.model.backbone,
        "model": values["model"],
        "view": values["plan"]["view"],
        "token": values["plan"]["token"],
        "axes": "view, token and arrays are (z, y, x): z towards Superior, y towards Anterior, x towards Right",
        "window_hu": values["data"]["window_hu"],
        "intensity": "HU clipped to window_hu, then scaled to [0, 1]",
        "spacing_mm": checkpoint.record.get("spacing_mm"),
        "spacing": "smallest and largest of the volumes trained on; level 1 shows all of plan.box resized to view",
        "pretraining": {
            "method": values["method"],
            "step": checkpoint.step,
            "dataset_fingerprint": checkpoint.record.get("fingerprint"),
            "plan": values["plan"],
        },
        "parameters": {name: list(tensor.shape) for name, tensor in sorted(weights.items())},
        "files": {WEIGHTS: digest},
    }


def _read_record(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; name what `mim-scale export` wrote")
    try:
        record: Any = json.loads((folder / RECORD).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: has no {RECORD}: it is no export; make one with `mim-scale export`") from None
    except (ValueError, OSError):
        raise CheckpointError(f"{folder / RECORD}: is unreadable; export again") from None
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
        version = record.get("format_version") if isinstance(record, dict) else None
        raise CheckpointError(f"{folder / RECORD}: format version {version}, this program reads {FORMAT_VERSION}")
    if record.pop("digest", None) != sha256_values(record):
        raise CheckpointError(f"{folder / RECORD}: was changed after it was written; export again")
    return record


def _read_weights(folder: Path, digest: str) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{folder}: {WEIGHTS} is missing; export again")
    if sha256_file(path) != digest:
        raise CheckpointError(f"{path}: does not have the hash that {RECORD} names: it is damaged; export again")
    try:
        weights: dict[str, Tensor] = load_file(path)
        return weights
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: is unreadable: {' '.join(str(error).split())}") from None


@torch.no_grad()
def _fill(encoder: Encoder, weights: dict[str, Tensor], where: Path) -> list[str]:
    """Give the encoder its weights; returns the names that it does not have.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    expected = encoder.state_dict()
    missing = sorted(expected.keys() - weights.keys())
    if missing:
        raise CheckpointError(
            f"{where}: {len(missing)} of {len(expected)} tensors of the encoder are missing{_some(missing)}"
        )
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise CheckpointError(
                f"{where}: {name} is {list(weights[name].shape)}, the encoder's is {list(tensor.shape)}"
            )
    encoder.load_state_dict({name: weights[name] for name in expected})
    return sorted(weights.keys() - expected.keys())


def _size(values: Any) -> Size3:
    z, y, x = (int(value) for value in values)
    return (z, y, x)


def _some(names: list[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
