"""`mim-scale checkpoint`: what is typed in, what is shown. Heavy imports wait; none is needed to look."""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mim_scale.errors import CheckpointError, OtherVersionError

WHOLE = "whole"
NOT_HASHED = "there"


def add_checkpoint(verbs: Any) -> None:
    """Add the verb."""
    actions = verbs.add_parser("checkpoint", help="look at and check a run's checkpoints").add_subparsers(
        required=True, metavar="ACTION"
    )
    for name, action, words in (
        ("list", _list, "step, age, size and ranks of each; that its files are there, hashes are not computed"),
        ("verify", _verify, "the same, every hash computed"),
        (
            "show",
            _show,
            "what the record of the newest, or of the one whose folder is named, says; no hash is computed",
        ),
    ):
        one = actions.add_parser(name, help=words)
        one.add_argument("path", type=Path, metavar="RUN_OR_FOLDER", help="a run, or one checkpoint")
        one.add_argument("--json", action="store_true", help="for scripts")
        one.set_defaults(verb=action)


@dataclass(frozen=True)
class Line:
    """One checkpoint, as it is listed; None is what a damaged record does not tell."""

    folder: str
    step: int | None
    age_s: float
    bytes: int
    world: int | None
    state: str
    """`whole`, `there` where no hash was computed, or what is wrong."""
    is_damaged: bool


def _list(options: argparse.Namespace) -> int:
    from mim_scale.training.checkpoint import read_record

    return _tell([_line(folder, read_record, NOT_HASHED) for folder in _folders(options.path)], options.json)


def _verify(options: argparse.Namespace) -> int:
    from mim_scale.training.checkpoint import read_checkpoint

    return _tell([_line(folder, read_checkpoint, WHOLE) for folder in _folders(options.path)], options.json)


def _show(options: argparse.Namespace) -> int:
    from mim_scale.training.checkpoint import read_record

    folders = _folders(options.path)
    lines = [_line(folder, read_record, NOT_HASHED) for folder in folders]
    found = next((line for line in lines if line.state == NOT_HASHED), None)
    if found is None:
        return _tell(lines, options.json)
    record = read_record(Path(found.folder)).record
    if options.json:
        print(json.dumps(record))
        return 0
    config = record.get("config", {})
    told = {
        "step": f"{record['step']} of {config.get('train', {}).get('steps', '?')}",
        "samples seen": record.get("position"),
        "updates made": record.get("updates", record["step"]),
        "saved": f"{_age(found.age_s)} ago, by {found.world} rank{'s' * (found.world != 1)}",
        "files": f"{len(record['files'])}, {found.bytes / 1e6:,.1f} MB, format version {record['format_version']}",
        "method": config.get("method", {}).get("name"),
        "backbone": config.get("model", {}).get("backbone"),
        "dataset": str(record.get("fingerprint"))[:16],
        "config": str(record.get("config_digest"))[:16],
        "versions": ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items()),
    }
    print(found.folder)
    for name, value in told.items():
        print(f"  {name:<14}{value}")
    return 0


def _folders(path: Path) -> list[Path]:
    """The checkpoints of a run, the newest first, or the one that a path names."""
    from mim_scale.training.checkpoint import RECORD, CheckpointFolder
    from mim_scale.training.run_folder import CHECKPOINTS

    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; name a run's output, or one of its checkpoints")
    for folder in (path / CHECKPOINTS, path):
        if found := CheckpointFolder(folder, keep=2).folders():
            return found
    if (path / RECORD).is_file() or path.name.startswith("step_"):
        return [path]
    raise CheckpointError(f"{path}: holds no checkpoint; name a run's output, or one of its checkpoints")


def _line(folder: Path, read: Callable[[Path], Any], good: str) -> Line:
    from mim_scale.training.checkpoint import refuse_other_name

    step, world, state, is_damaged = None, None, good, False
    try:
        checkpoint = read(folder)
        step, world = checkpoint.step, checkpoint.record.get("world")
        if folder.name.startswith("step_"):
            refuse_other_name(checkpoint)
    except OtherVersionError as error:
        state = str(error).removeprefix(f"{folder}: ")
    except CheckpointError as error:
        state, is_damaged = str(error).removeprefix(f"{folder}: "), True
    files = [entry for entry in folder.iterdir() if entry.is_file()] if folder.is_dir() else []
    age_s = time.time() - folder.lstat().st_mtime
    return Line(str(folder), step, age_s, sum(file.stat().st_size for file in files), world, state, is_damaged)


def _tell(lines: list[Line], as_json: bool) -> int:
    if as_json:
        print(json.dumps([asdict(line) for line in lines]))
    else:
        print(f"{'checkpoint':<16}{'age':>14}{'MB':>12}{'ranks':>7}  state")
        for line in lines:
            world = "-" if line.world is None else line.world
            name = Path(line.folder).name
            print(f"{name:<16}{_age(line.age_s):>14}{line.bytes / 1e6:>12,.1f}{world:>7}  {line.state}")
    return 3 if any(line.is_damaged for line in lines) else 0


def _age(seconds: float) -> str:
    from mim_scale.training.progress import duration

    return duration(max(seconds, 0.0))
