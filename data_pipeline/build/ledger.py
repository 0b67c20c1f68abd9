"""What earlier builds finished, so that the next one does not do it again: STORE/build/, removable at any time.

One line is added, and made durable, for each finished task. A line torn by a kill is passed over: its task runs again.
In memory there is one number a task, where its line begins.
"""

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Self

from data_pipeline.build.task import Task, TaskResult
from data_pipeline.reasons import PASSING
from mim_scale.commit import TEMPORARY, write_file
from mim_scale.errors import StoreError
from mim_scale.store.dataset import VOLUMES, volume_folder

FOLDER = "build"
_LEDGER = "ledger"
_FINISHED = "finished.json"
_WAIVERS = "waivers.json"
_LOCK = "lock"


@contextmanager
def builder_lock(store: Path, part: str = "") -> Iterator[None]:
    """Be the only builder of a store, or the only one of its part; the system lets go when the process ends.

    Args:
        part: builders of different parts may work side by side, and not beside a builder of the whole.

    Raises:
        StoreError: another process is building it, or the folder cannot be written.
    """
    with ExitStack() as stack:
        if part:
            _hold(stack, store, _LOCK, fcntl.LOCK_SH)
            _hold(stack, store, f"{_LOCK}-{part}", fcntl.LOCK_EX)
        else:
            _hold(stack, store, _LOCK, fcntl.LOCK_EX)
        yield


def _hold(stack: ExitStack, store: Path, name: str, kind: int) -> None:
    try:
        (store / FOLDER).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(store / FOLDER / name, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StoreError(
            f"{store}: cannot be written ({error.strerror}); choose another folder for the store"
        ) from None
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "an unknown process"
        raise StoreError(f"{store}: {holder} is building it; wait for it or end it") from None
    if kind == fcntl.LOCK_EX or not os.pread(descriptor, 1, 0):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)


def is_begun(store: Path) -> bool:
    """Whether a build was at work in this folder: what lies there is ours."""
    return (store / FOLDER / _LOCK).is_file()


def read_finished(store: Path) -> dict[str, Any] | None:
    """What the last finished build noted; None where there is none."""
    return _read_json(store / FOLDER / _FINISHED)


def write_finished(store: Path, values: dict[str, Any]) -> None:
    """Note what a finished build looked at, so that the next one can see at a glance that nothing changed."""
    write_file(store / FOLDER / _FINISHED, json.dumps(values).encode())


def forget_finished(store: Path) -> None:
    """Have the next build look at every task again."""
    (store / FOLDER / _FINISHED).unlink(missing_ok=True)


def read_waivers(store: Path) -> dict[str, str] | None:
    """Reasons that the user lets pass, by source key; None where nothing was ever waived here."""
    return _read_json(store / FOLDER / _WAIVERS)


def write_waivers(store: Path, waivers: dict[str, str]) -> None:
    """Note what the user lets pass; the next build goes by it."""
    (store / FOLDER).mkdir(exist_ok=True)
    write_file(store / FOLDER / _WAIVERS, json.dumps(waivers, indent=1, sort_keys=True).encode())


class Ledger:
    """Results of finished tasks. Adds to the file of its part, reads those of all parts.

    Args:
        store: the store's folder; it need not exist to read an empty ledger.
        part: names the file that is added to; "" is that of whole builds.
    """

    def __init__(self, store: Path, part: str = "") -> None:
        self._folder = store / FOLDER
        self._path = self._folder / f"{_LEDGER}{'-' if part else ''}{part}.jsonl"
        self._files: list[IO[bytes]] = []
        self._places: dict[bytes, int] = {}
        self._adding: IO[bytes] | None = None
        self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (*self._files, *([self._adding] if self._adding else [])):
            file.close()

    def result(self, task: Task) -> TaskResult | None:
        """The result of an equal task, where it still holds."""
        place = self._places.get(bytes.fromhex(task.key[:32]))
        result = self._read_at(place) if place is not None else None
        return result if result is not None and result.key == task.key and result.holds_for(task.min_slices) else None

    def at(self, task_key: bytes) -> TaskResult:
        """The result of a task that is known to have ended, by the first 16 bytes of its key.

        Raises:
            StoreError: the ledger has changed under the build.
        """
        result = self._read_at(self._places[task_key])
        if result is None:
            raise StoreError(f"{self._path}: was changed while the build ran; run the same build again")
        return result

    def add(self, result: TaskResult) -> None:
        """Note one finished task, durable before the next."""
        if self._adding is None:
            self._adding = _open_for_adding(self._path)
            self._files.append(open(self._path, "rb"))  # noqa: SIM115  # closed by __exit__
        start = self._adding.tell()
        self._adding.write(json.dumps(result.values()).encode() + b"\n")
        self._adding.flush()
        os.fsync(self._adding.fileno())
        self._places[bytes.fromhex(result.key[:32])] = _place(len(self._files) - 1, start)

    def forget(self, source_keys: set[str]) -> int:
        """Let the next build try these sources again; how many of them were known comes back."""
        found: set[str] = set()
        with _open_for_adding(self._path) as file:
            for key, place in self._places.items():
                result = self._read_at(place)
                if result is not None and result.source_key in source_keys:
                    found.add(result.source_key)
                    file.write(json.dumps({"forget": key.hex()}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return len(found)

    def _read(self) -> None:
        for path in sorted(self._folder.glob(f"{_LEDGER}*.jsonl")):
            file = open(path, "rb")  # noqa: SIM115  # closed by __exit__
            self._files.append(file)
            start = 0
            for line in file:
                self._note(line, _place(len(self._files) - 1, start))
                start += len(line)

    def _note(self, line: bytes, place: int) -> None:
        try:
            values = json.loads(line)
            if "forget" in values:
                self._places.pop(bytes.fromhex(values["forget"]), None)
                return
            result = TaskResult.from_values(values)
            key = bytes.fromhex(result.key[:32])
        except (ValueError, KeyError, TypeError, IndexError):
            return
        if result.rejected is None or result.rejected[0] not in PASSING:
            self._places[key] = place

    def _read_at(self, place: int) -> TaskResult | None:
        number, start = place >> _START_BITS, place & ((1 << _START_BITS) - 1)
        file = self._files[number]
        file.seek(start)
        try:
            return TaskResult.from_values(json.loads(file.readline()))
        except (ValueError, KeyError, TypeError, IndexError):
            return None


_START_BITS = 48


def _place(number: int, start: int) -> int:
    """Which file, and where a line begins in it, as one number: there is one for every task."""
    return number << _START_BITS | start


def _open_for_adding(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+b")  # noqa: SIM115  # closed by whoever asked for it
    # A torn last line must not swallow the next one.
    if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
        file.write(b"\n")
    return file


def remove_leftovers(store: Path) -> None:
    """Delete what killed writers left behind; nobody else may be building."""
    for folder in (store, store / VOLUMES, store / FOLDER):
        for path in folder.glob(f"{TEMPORARY}*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def stored_keys(store: Path) -> Iterator[str]:
    """Keys of the volumes whose folders are there, whatever the tables say; one in memory at a time."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(store / VOLUMES) as entries:
        yield from (entry.name.removesuffix(".zarr") for entry in entries if entry.name.endswith(".zarr"))


def remove_volumes_but(store: Path, keys: Container[str]) -> None:
    """Delete stored volumes that no row names."""
    for key in [key for key in stored_keys(store) if key not in keys]:
        shutil.rmtree(volume_folder(store, key), ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return values if isinstance(values, dict) else None
