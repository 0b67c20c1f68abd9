"""A disk that fails at one chosen operation, and that knows what would be left of a folder if the power failed now."""

import contextlib
import errno
import hashlib
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mim_scale import disk

READS = ("read", "digest")
NAMES = ("rename", "exchange", "unlink", "mkdir", "rmdir")
TAKES_ROOM = ("create", "append", "write", "mkdir", "rename", "fsync", "sync")
OPERATIONS = (*READS, *NAMES, "create", "append", "write", "truncate", "fsync", "sync", "chmod")

CRASHES = ("crash before", "crash after", "crash in the middle")
REFUSALS = ("ENOSPC", "ENOSPC from then on", "EIO", "done, but EIO")
TWISTS = ("short write", "stale read")
"""Answers that are no error."""

POWER = ("power stays", "power fails", "power fails, names stay")
"""What a crash leaves: all; what was synced; every name, but of the bytes only what was synced."""


class Crash(BaseException):
    """The process dies here: nothing that it would do later is done."""


def still_disk() -> pytest.MonkeyPatch:
    """A disk that need not turn: power does not fail while the old state is made, and while it is looked at."""
    patch = pytest.MonkeyPatch()
    patch.setattr(disk, "fsync", lambda file: None)
    patch.setattr(disk, "sync", lambda path: None)
    return patch


def applies(fault: str, operation: str) -> bool:
    """Whether a fault can befall an operation."""
    match fault:
        case "crash in the middle" | "short write":
            return operation == "write"
        case "ENOSPC" | "ENOSPC from then on":
            return operation in TAKES_ROOM
        case "stale read":
            return operation in READS
        case "crash after" | "done, but EIO":
            return operation not in READS
    return True


class FaultyDisk:
    """Stands in for `mim_scale.disk` below a folder; nothing but its operations may write there.

    Args:
        root: The folder; what is in it is taken as durable.
        at: Number of the operation that the fault befalls; -1 for none.
        fault: One of the names above.
    """

    def __init__(self, root: Path, at: int = -1, fault: str = "") -> None:
        self.root, self.at, self.fault = root, at, fault
        self.seen: list[str] = []
        self._is_dead = False
        self._bytes: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._earlier: dict[Path, bytes] = {}
        # An open descriptor keeps the number of a deleted file from being given to another one.
        self._pins: dict[int, int] = {}
        for folder, _, files in os.walk(root):
            for name in files:
                path = Path(folder) / name
                self._bytes[self._pinned(path)] = self._earlier[path] = path.read_bytes()
            self._sync_folder(Path(folder))

    def __enter__(self) -> "FaultyDisk":
        self._patch = pytest.MonkeyPatch()
        for name in OPERATIONS:
            self._patch.setattr(disk, name, self._wrapped(name, getattr(disk, name)))
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.undo()

    def close(self) -> None:
        """Forget the files that were seen."""
        for descriptor in self._pins.values():
            os.close(descriptor)

    def forget(self, path: Path) -> None:
        """Take a name as one that was never synced."""
        del self._names[path.parent.stat().st_ino][path.name]

    def leave(self, power: str) -> None:
        """Make the folder what it is after the crash."""
        if power == "power stays":
            return
        kept = self._now(self.root) if power == "power fails, names stay" else self._durable(self.root.stat().st_ino)
        for entry in self.root.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for path, data in kept.items():
            if data is None:
                (self.root / path).mkdir()
            else:
                (self.root / path).write_bytes(data)

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        # The disk of the tests need not turn: what is durable is known here.
        act = {"fsync": self._fsync, "sync": self._sync}.get(name, real)

        def call(*arguments: Any) -> Any:
            if self._is_dead:
                raise Crash
            number = len(self.seen)
            self.seen.append(name)
            if number == self.at:
                return self._fail(name, act, arguments)
            if "from then on" in self.fault and 0 <= self.at < number and name in ("create", "write", "mkdir"):
                raise refusal("ENOSPC", arguments)
            return self._do(name, act, arguments)

        return call

    def _fail(self, name: str, act: Callable[..., Any], arguments: Any) -> Any:
        match self.fault:
            case "crash before":
                self._is_dead = True
                raise Crash
            case "crash after":
                with contextlib.suppress(OSError):
                    self._do(name, act, arguments)
                self._is_dead = True
                raise Crash
            case "crash in the middle":
                act(arguments[0], arguments[1][: len(arguments[1]) // 2])
                self._is_dead = True
                raise Crash
            case "short write":
                return act(arguments[0], arguments[1][: (len(arguments[1]) + 1) // 2])
            case "stale read":
                return self._stale(name, arguments[0])
            case "done, but EIO":
                self._do(name, act, arguments)
                raise refusal("EIO", arguments)
        if self.fault == "ENOSPC from then on" and name == "write":
            act(arguments[0], arguments[1][: len(arguments[1]) // 2])
        raise refusal(self.fault.split()[0], arguments)

    def _do(self, name: str, act: Callable[..., Any], arguments: Any) -> Any:
        result = act(*arguments)
        if name in ("create", "append", "mkdir"):
            self._pinned(arguments[0])
        return result

    def _stale(self, name: str, path: Path) -> Any:
        """What a network file system may show for a while: the file as it was, or that it is not there yet."""
        if path not in self._earlier:
            raise refusal("ENOENT", (path,))
        return self._earlier[path] if name == "read" else hashlib.sha256(self._earlier[path]).hexdigest()

    def _fsync(self, file: io.FileIO) -> None:
        self._bytes[os.fstat(file.fileno()).st_ino] = Path(os.fsdecode(file.name)).read_bytes()

    def _sync(self, path: Path) -> None:
        if path.is_dir():
            self._sync_folder(path)
        else:
            self._bytes[self._pinned(path)] = path.read_bytes()

    def _sync_folder(self, folder: Path) -> None:
        self._names[self._pinned(folder)] = {entry.name: self._pinned(entry) for entry in folder.iterdir()}

    def _pinned(self, path: Path) -> int:
        number = path.stat().st_ino
        if number not in self._pins:
            self._pins[number] = os.open(path, os.O_RDONLY)
            if path.is_dir():
                self._names.setdefault(number, {})
        return number

    def _durable(self, folder: int, prefix: str = "") -> dict[str, bytes | None]:
        """Path -> bytes of every name that was synced, None for a folder; a file never synced is empty."""
        found: dict[str, bytes | None] = {}
        for name, number in self._names[folder].items():
            if number in self._names:
                found[prefix + name] = None
                found |= self._durable(number, f"{prefix}{name}/")
            else:
                found[prefix + name] = self._bytes.get(number, b"")
        return found

    def _now(self, root: Path) -> dict[str, bytes | None]:
        paths = sorted(root.rglob("*"))
        return {
            str(path.relative_to(root)): None if path.is_dir() else self._bytes.get(path.stat().st_ino, b"")
            for path in paths
        }


def refusal(code: str, arguments: Any) -> OSError:
    """What a system call raises."""
    number = getattr(errno, code)
    path = arguments[0] if isinstance(arguments[0], Path) else arguments[0].name
    return OSError(number, os.strerror(number), str(path))
