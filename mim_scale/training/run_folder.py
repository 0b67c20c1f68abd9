"""The folder of one run: who may write in it, and whether a config may go on with what is in it."""

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

from mim_scale.commit import write_file
from mim_scale.config import PretrainConfig
from mim_scale.config_file import CHOOSERS, check_config, config_values, dump_config, load_config
from mim_scale.errors import CheckpointError, ConfigError

CONFIG = "config.yaml"
JOURNAL = "journal.jsonl"
CHECKPOINTS = "checkpoints"
PICTURES = "pictures"
SYSTEM = "system"
LOCK = "run.lock"

MAY_CHANGE = (
    "output",
    "data.store",
    "data.transport",
    "data.workers",
    "data.read_ahead",
    "data.pack",
    "train.micro_batch",
    "train.engine",
    "train.zero_stage",
    "train.offload_optimizer",
    "train.deepspeed",
    "train.activation_checkpointing",
    "train.views_at_once",
    "train.compile",
    "train.keep_freed_memory",
    "checkpoint.",
    "held_out.every",
    "tracking.",
    "guards.hang_s",
)
"""Settings that may differ when a run goes on: they change time, place and memory, not results.

The store may move: its fingerprint is compared. train.steps may not change: all learning rates depend on it."""


class RunLock:
    """Keeps a second process out of the folder; the kernel lets go of it when this one dies, however it dies."""

    def __init__(self, output: Path) -> None:
        """Take the folder, making it where it does not exist.

        Raises:
            ConfigError: another process has it, or it cannot be written.
        """
        path = output / LOCK
        try:
            output.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(f"output {output}: cannot be written ({error.strerror}); choose another folder") from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(path)
            os.close(self._descriptor)
            raise ConfigError(
                f"output {output}: another run is alive in it ({holder}); wait for it, end it, or choose another output"
            ) from None
        except OSError:
            # A file system without locks: fall back on what the file says about a process of this machine.
            if _is_alive_here(path):
                holder = _holder(path)
                os.close(self._descriptor)
                raise ConfigError(
                    f"output {output}: another run is alive in it ({holder}); wait for it, or end it"
                ) from None
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, text, 0)
        except OSError as error:
            os.close(self._descriptor)
            raise ConfigError(f"output {output}: cannot be written ({error.strerror}); make room there") from None

    def release(self) -> None:
        """Let the folder go."""
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)


def adopt_config(config: PretrainConfig, output: Path, is_begun: bool) -> None:
    """Write the config into the run folder, once it is seen that a run which was begun there can go on with it.

    Args:
        is_begun: Whether one was; the config of a start that was refused binds nobody.

    Raises:
        ConfigError: a setting that changes results differs; names it with both values.
    """
    path = output / CONFIG
    if is_begun and path.is_file():
        refuse_other_run(load_config(PretrainConfig, path), config, str(path))
    write_file(path, dump_config(config).encode())


def refuse_other_run(earlier: PretrainConfig, config: PretrainConfig, where: str) -> None:
    """Compare a run's config with the one it is to go on with.

    Raises:
        ConfigError: a setting that changes results differs; names it with both values.
    """
    before, now = flatten(config_values(earlier)), flatten(config_values(config))
    # Another method or backbone has other settings: name that one first.
    for key in sorted(before.keys() | now.keys(), key=lambda key: (key.rpartition(".")[2] not in CHOOSERS, key)):
        if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE):
            raise ConfigError(
                f"{key} is {now.get(key)!r}, but the run was begun with {before.get(key)!r} ({where}), and it changes "
                "results: "
                "set it back, or choose another output"
            )


def config_of_record(record: dict[str, Any], where: str) -> PretrainConfig:
    """The config that a checkpoint's record holds.

    Raises:
        CheckpointError: it holds none that this version understands.
    """
    try:
        return check_config(PretrainConfig, record["config"], where)
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{where}: its config is not understood by this version: {error}") from None


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as `a.b.0.c: value`."""
    if isinstance(values, dict) and values:
        items = values.items()
    elif isinstance(values, list) and values:
        items = {str(index): value for index, value in enumerate(values)}.items()
    else:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for name, value in items:
        flat.update(flatten(value, f"{prefix}.{name}" if prefix else name))
    return flat


def _holder(path: Path) -> str:
    try:
        entry = json.loads(path.read_bytes())
        return f"process {entry['pid']} on {entry['host']}"
    except (ValueError, KeyError, TypeError, OSError):
        return "it has not said which"


def _is_alive_here(path: Path) -> bool:
    try:
        entry = json.loads(path.read_bytes())
        if entry["host"] != socket.gethostname():
            return False
        os.kill(int(entry["pid"]), 0)
    except (ValueError, KeyError, TypeError, OSError):
        return False
    return True
