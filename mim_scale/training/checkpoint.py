"""Checkpoints that any number of ranks and any engine can load, and that are whole or absent.

A checkpoint is a folder `step_00000100/` with `weights.safetensors` (fp32, by parameter name), `moments.safetensors`
(fp32, by `name/exp_avg` and `name/exp_avg_sq`) and `run.json`, which is written last and names the hash of both. It is
made under a temporary name and published by one rename. Rank 0 alone writes and chooses.
"""

import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mim_scale.commit import TEMPORARY, publish_folder, sha256_file, sha256_values, temporary_beside, write_file
from mim_scale.errors import CheckpointError, OtherVersionError

FORMAT_VERSION = 1
WEIGHTS = "weights.safetensors"
MOMENTS = "moments.safetensors"
RECORD = "run.json"
VERSIONS_OF = ("mim-scale", "torch", "deepspeed", "numpy", "safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were seen to have the hashes that its record names."""

    path: Path
    record: dict[str, Any]

    @property
    def step(self) -> int:
        """Updates made when it was saved; the next step to make."""
        return int(self.record["step"])

    def load(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights and moments by name, on the CPU.

        Raises:
            CheckpointError: a file is unreadable.
        """
        try:
            return load_file(self.path / WEIGHTS), load_file(self.path / MOMENTS)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path}: became unreadable: {' '.join(str(error).split())}") from None


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        path: Where they lie, one folder a step.
        keep: How many verified ones stay; older ones are deleted after each save.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self._keep = keep
        self._verified: set[str] = set()

    def save(self, step: int, weights: dict[str, Tensor], moments: dict[str, Tensor], facts: dict[str, Any]) -> Path:
        """Publish the state after `step` updates, then delete what is no longer kept.

        Args:
            step: Updates made so far.
            weights: By parameter name.
            moments: By `name/exp_avg` and `name/exp_avg_sq`.
            facts: What else the record tells: position, config, digest, fingerprint, world.
        """
        final = self.path / f"step_{step:08d}"
        temporary = temporary_beside(final)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(weights, temporary / WEIGHTS)
        save_file(moments, temporary / MOMENTS)
        files = {name: sha256_file(temporary / name) for name in (WEIGHTS, MOMENTS)}
        record = {"format_version": FORMAT_VERSION, "step": step, **facts, "versions": _versions(), "files": files}
        record["digest"] = sha256_values(record)
        write_file(temporary / RECORD, (json.dumps(record, indent=1) + "\n").encode())
        publish_folder(temporary, final)
        self._verified.add(final.name)
        self._forget_old()
        return final

    def newest(self, tell: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that verifies; each damaged one before it is named to `tell`.

        Raises:
            CheckpointError: there are checkpoints and none verifies, or the newest good one is of another format
                version.
        """
        damaged = []
        for folder in self.folders():
            try:
                checkpoint = read_checkpoint(folder)
            except OtherVersionError:
                raise
            except CheckpointError as error:
                damaged.append(folder.name)
                tell(f"checkpoint skipped: {error}")
                continue
            self._verified.add(folder.name)
            return checkpoint
        if damaged:
            raise CheckpointError(
                f"{self.path}: none of {len(damaged)} checkpoints is whole ({', '.join(damaged)}); restore one from a "
                "copy, or move the folder away to begin again"
            )
        return None

    def folders(self) -> list[Path]:
        """Every published checkpoint, the newest first; unfinished ones have other names."""
        if not self.path.is_dir():
            return []
        named = [entry for entry in self.path.iterdir() if re.fullmatch(r"step_\d{8,}", entry.name)]
        return sorted(named, key=lambda entry: int(entry.name.removeprefix("step_")), reverse=True)

    def remove_leftovers(self) -> None:
        """Delete what a killed writer left unfinished; call it only while this process owns the run folder."""
        if self.path.is_dir():
            for entry in self.path.iterdir():
                if entry.name.startswith(TEMPORARY):
                    shutil.rmtree(entry, ignore_errors=True)

    def _forget_old(self) -> None:
        good = 0
        for folder in self.folders():
            if good >= self._keep:
                # Away from its name first: a kill in the middle of deleting must not leave half a checkpoint.
                doomed = temporary_beside(folder)
                os.replace(folder, doomed)
                shutil.rmtree(doomed, ignore_errors=True)
            elif self._verifies(folder):
                good += 1

    def _verifies(self, folder: Path) -> bool:
        if folder.name not in self._verified:
            try:
                read_checkpoint(folder)
            except CheckpointError:
                return False
            self._verified.add(folder.name)
        return True


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, its record and the hash of every file checked.

    Raises:
        CheckpointError: one line that says what is missing, damaged, or of another version.
    """
    try:
        record = json.loads((folder / RECORD).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: has no {RECORD}: it was never finished, or is no checkpoint") from None
    except (ValueError, OSError):
        raise CheckpointError(f"{folder}: {RECORD} is unreadable") from None
    if not isinstance(record, dict) or record.pop("digest", None) != sha256_values(record):
        raise CheckpointError(f"{folder}: {RECORD} was changed after it was written")
    if record["format_version"] != FORMAT_VERSION:
        raise OtherVersionError(
            f"{folder}: format version {record['format_version']}, this program reads {FORMAT_VERSION}; go on with the "
            "program that wrote it, or choose another output"
        )
    for name, expected in record["files"].items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing")
        if sha256_file(folder / name) != expected:
            raise CheckpointError(f"{folder}: {name} does not have the hash that {RECORD} names")
    return Checkpoint(folder, record)


def check_fits(checkpoint: Checkpoint, weights: dict[str, Tensor], expected: dict[str, Sequence[int]]) -> None:
    """Compare a checkpoint's tensors with the shapes of the model that is to take them.

    Raises:
        CheckpointError: the first name that is missing, unknown, or of another shape.
    """
    for name, shape in expected.items():
        if name not in weights:
            raise CheckpointError(f"{checkpoint.path}: has no tensor {name}: it belongs to another model")
        if tuple(weights[name].shape) != tuple(shape):
            raise CheckpointError(
                f"{checkpoint.path}: {name} is {list(weights[name].shape)}, the model's is {list(shape)}: "
                "it belongs to another model"
            )
    unknown = sorted(weights.keys() - expected.keys())
    if unknown:
        raise CheckpointError(
            f"{checkpoint.path}: the model has no {unknown[0]}: the checkpoint belongs to another model"
        )


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS_OF:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
