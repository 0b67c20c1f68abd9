"""What earlier builds finished, so that the next one does not do it again: STORE/build/, removable at any time.

One line is added, and made durable, for each finished task. A line torn by a kill is passed over: its task runs again.
"""

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.build.task import TaskResult
from mim_scale.commit import TEMPORARY, write_file
from mim_scale.errors import StoreError
from mim_scale.store.dataset import VOLUMES, volume_folder

FOLDER = "build"
_LEDGER = "ledger.jsonl"
_FINISHED = "finished.json"
_LOCK = "lock"


@contextmanager
def builder_lock(store: Path) -> Iterator[None]:
    """Be the only builder of a store; the system lets go of the lock when the process ends, however it ends.

    Raises:
        StoreError: another process is building it, or the folder cannot be written.
    """
    try:
        (store / FOLDER).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(store / FOLDER / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StoreError(
            f"{store}: cannot be written ({error.strerror}); choose another folder for the store"
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(descriptor, 200).decode("utf-8", "replace").strip() or "an unknown process"
            raise StoreError(f"{store}: {holder} is building it; wait for it or end it") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def is_begun(store: Path) -> bool:
    """Whether a build was at work in this folder: what lies there is ours."""
    return (store / FOLDER / _LOCK).is_file()


def read_finished(store: Path) -> dict[str, Any] | None:
    """What the last finished build noted; None where there is none."""
    return _read_json(store / FOLDER / _FINISHED)


def write_finished(store: Path, values: dict[str, Any]) -> None:
    """Note what a finished build looked at, so that the next one can see at a glance that nothing changed."""
    write_file(store / FOLDER / _FINISHED, json.dumps(values).encode())


def read_ledger(store: Path) -> dict[str, TaskResult]:
    """Results of finished tasks, by task key."""
    try:
        lines = (store / FOLDER / _LEDGER).read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    results = {}
    for line in lines:
        try:
            result = TaskResult.from_values(json.loads(line))
        except (ValueError, KeyError, TypeError, IndexError):
            continue
        results[result.key] = result
    return results


@contextmanager
def open_ledger(store: Path) -> Iterator["Ledger"]:
    """The ledger, open for adding."""
    with open(store / FOLDER / _LEDGER, "a+b") as file:
        # A torn last line must not swallow the next one.
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            file.write(b"\n")
        yield Ledger(file)


class Ledger:
    """Adds finished tasks, each durable before the next."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def add(self, result: TaskResult) -> None:
        """Note one finished task."""
        self._file.write(json.dumps(result.values()).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def remove_leftovers(store: Path) -> None:
    """Delete what killed writers left behind; nobody else may be building."""
    for folder in (store, store / VOLUMES, store / FOLDER):
        for path in folder.glob(f"{TEMPORARY}*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def stored_keys(store: Path) -> set[str]:
    """Keys of the volumes whose folders are there, whatever the tables say."""
    return {path.name.removesuffix(".zarr") for path in (store / VOLUMES).glob("*.zarr")}


def remove_volumes_but(store: Path, keys: set[str]) -> None:
    """Delete stored volumes that no row names."""
    for key in stored_keys(store) - keys:
        shutil.rmtree(volume_folder(store, key), ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return values if isinstance(values, dict) else None
