"""Checkpoints that any number of ranks and any engine can load, and that are whole or absent.

A checkpoint is a folder `step_00000100/` with `weights.safetensors` (fp32, by parameter name), `moments.safetensors`
(fp32, by `name/exp_avg` and `name/exp_avg_sq`) and `run.json`, which is written last and names size and hash of both.
Where several ranks wrote it, each wrote what it holds into files of its own: `weights-00000-of-00002.safetensors` and
so on. Of a tensor that ZeRO cuts up, each has some numbers in a row; under `pieces` the file's metadata says where they
lie in the whole. It is made under a temporary name and published by one rename. Rank 0 alone publishes and chooses.
"""

import functools
import importlib.metadata
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mim_scale import disk
from mim_scale.commit import (
    TEMPORARY,
    has_seal,
    publish_folder,
    remove,
    sealed,
    sha256_file,
    temporary_beside,
    unsealed,
    write_file,
)
from mim_scale.errors import CheckpointError, DamagedCheckpointError, OtherVersionError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 3
READABLE = (1, 2, 3)
"""Version 1 has one file of each kind, hashes without sizes, and a record whose values are sealed, not its bytes.
Version 2 has whole tensors only."""
RECORD = "run.json"
KINDS = ("weights", "moments")
PIECES = "pieces"
"""In a file's metadata: JSON, name -> start in the flattened whole, then the whole's shape."""
VERSIONS_OF = ("mim-scale", "torch", "deepspeed", "numpy", "safetensors")

Files = dict[str, dict[str, Any]]
"""File name -> `sha256` and `bytes`."""


@dataclass(frozen=True)
class Piece:
    """What one rank saves of a tensor: `numbers` are those from `start` on of the flattened whole of `shape`."""

    kind: str
    """One of KINDS."""
    name: str
    shape: tuple[int, ...]
    start: int
    numbers: "Tensor"

    @property
    def is_whole(self) -> bool:
        """Whether nothing of it lies elsewhere."""
        return self.numbers.numel() == math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose record is whole; `read_checkpoint` gives those whose files were seen to have its hashes."""

    path: Path
    record: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps made when it was saved; the next step to make."""
        return int(self.record["step"])

    @property
    def files(self) -> Files:
        """What the record names, besides itself; version 1 told no sizes."""
        return {
            name: facts if isinstance(facts, dict) else {"sha256": facts}
            for name, facts in self.record["files"].items()
        }

    def load(self) -> "tuple[dict[str, Tensor], dict[str, Tensor]]":
        """Weights and moments by name, on the CPU, from however many files.

        Raises:
            CheckpointError: a file is unreadable.
        """
        from safetensors import SafetensorError, safe_open

        found: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
        parts: dict[tuple[str, str], list[Piece]] = {}
        try:
            for name in sorted(self.files):
                kind = re.split(r"[-.]", name)[0]
                with safe_open(self.path / name, "pt") as file:
                    places = json.loads((file.metadata() or {}).get(PIECES, "{}"))
                    for key in file.keys():  # noqa: SIM118
                        numbers = file.get_tensor(key)
                        if key in places:
                            start, *shape = places[key]
                            parts.setdefault((kind, key), []).append(Piece(kind, key, tuple(shape), start, numbers))
                        else:
                            found[kind][key] = numbers
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{self.path}: became unreadable: {' '.join(str(error).split())}") from None
        for (kind, key), pieces in parts.items():
            found[kind][key] = _joined(pieces, self.path)
        return found["weights"], found["moments"]


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

    def unfinished(self, step: int, token: str) -> Path:
        """Where a checkpoint is put together; all its writers, and nobody else, share the token."""
        return self.path / f"{TEMPORARY}{token}-{_name(step)}"

    def publish(self, step: int, temporary: Path, files: Files, facts: dict[str, Any]) -> Path:
        """Seal what lies in a folder as the checkpoint of a step, then delete what is no longer kept.

        Args:
            step: Steps made so far.
            temporary: Made by `unfinished`, every file in it written.
            files: Size and hash of each.
            facts: What else the record tells: position, config, digest, fingerprint, world.

        Raises:
            CheckpointError: it is published, but an old one cannot be deleted.
            OSError: it is not published.
        """
        final = self.path / _name(step)
        record = {"format_version": FORMAT_VERSION, "step": step, **facts, "versions": versions(), "files": files}
        write_file(temporary / RECORD, sealed(record)[0])
        publish_folder(temporary, final)
        self._verified.add(final.name)
        try:
            self._forget_old()
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: the checkpoint of step {step} is saved, but an older one cannot be deleted: "
                f"{error.strerror}; mend that, then start the same command again"
            ) from None
        return final

    def newest(self, tell: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that verifies; each damaged one before it is named to `tell`.

        Raises:
            DamagedCheckpointError: there are checkpoints and none verifies.
            OtherVersionError: the newest good one is of another format version.
        """
        damaged = []
        for folder in self.folders():
            try:
                checkpoint = read_checkpoint(folder)
                refuse_other_name(checkpoint)
            except OtherVersionError:
                raise
            except CheckpointError as error:
                damaged.append(folder.name)
                tell(f"checkpoint skipped: {error}")
                continue
            self._verified.add(folder.name)
            return checkpoint
        if damaged:
            raise DamagedCheckpointError(
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
                    remove(entry)

    def _forget_old(self) -> None:
        good = 0
        for folder in self.folders():
            if good >= self._keep:
                # Away from its name first: a kill in the middle of deleting must not leave half a checkpoint.
                doomed = temporary_beside(folder)
                disk.rename(folder, doomed)
                remove(doomed)
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


def read_record(folder: Path) -> Checkpoint:
    """The checkpoint in a folder as its record has it: that every file is there with its size is seen, hashes are not.

    Raises:
        CheckpointError: one line that says what is missing, damaged, or of another version.
    """
    try:
        data = disk.read(folder / RECORD)
        record = json.loads(data)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: has no {RECORD}: it was never finished, or is no checkpoint") from None
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{folder}: {RECORD} is unreadable{_reason(error)}") from None
    if not isinstance(record, dict) or not has_seal(record):
        raise CheckpointError(f"{folder}: {RECORD} was changed after it was written")
    if record.get("format_version") not in READABLE:
        raise OtherVersionError(
            f"{folder}: format version {record.get('format_version')}, this program reads "
            f"{', '.join(map(str, READABLE))}; go on with the program that wrote it, or choose another output"
        )
    if record["format_version"] != READABLE[0]:
        try:
            unsealed(data)
        except ValueError:
            raise CheckpointError(f"{folder}: {RECORD} was changed after it was written") from None
    checkpoint = Checkpoint(folder, record)
    for name, facts in checkpoint.files.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing")
        size = (folder / name).stat().st_size
        if size != facts.get("bytes", size):
            raise CheckpointError(f"{folder}: {name} has {size} bytes, {RECORD} names {facts['bytes']}")
    return checkpoint


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, its record and the hash of every file checked.

    Raises:
        CheckpointError: one line that says what is missing, damaged, or of another version.
    """
    checkpoint = read_record(folder)
    for name, facts in checkpoint.files.items():
        try:
            is_whole = sha256_file(folder / name) == facts["sha256"]
        except OSError as error:
            raise CheckpointError(f"{folder}: {name} is unreadable{_reason(error)}") from None
        if not is_whole:
            raise CheckpointError(f"{folder}: {name} does not have the hash that {RECORD} names")
    return checkpoint


def refuse_other_name(checkpoint: Checkpoint) -> None:
    """Among the checkpoints of a run a folder's name is its step.

    Raises:
        CheckpointError: it has the name of another step.
    """
    if checkpoint.path.name != _name(checkpoint.step):
        raise CheckpointError(f"{checkpoint.path}: holds step {checkpoint.step}: it was renamed")


def check_fits(checkpoint: Checkpoint, weights: "dict[str, Tensor]", expected: dict[str, Sequence[int]]) -> None:
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


def _joined(pieces: list[Piece], where: Path) -> "Tensor":
    """The whole tensor."""
    import torch

    pieces.sort(key=lambda piece: piece.start)
    first, end = pieces[0], 0
    for piece in pieces:
        if piece.start != end or piece.shape != first.shape:
            break
        end += piece.numbers.numel()
    if end != math.prod(first.shape) or end != sum(piece.numbers.numel() for piece in pieces):
        raise CheckpointError(f"{where}: its pieces of {first.name} do not make a whole; take another checkpoint")
    return torch.cat([piece.numbers.reshape(-1) for piece in pieces]).reshape(first.shape)


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _reason(error: Exception) -> str:
    """What the system said, where it said something."""
    return f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""


@functools.cache
def versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS_OF:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
