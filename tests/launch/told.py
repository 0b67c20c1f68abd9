"""A training process that tells what it does, for those who want to kill it at a chosen instant.

Each operation of the disk goes into a pipe before and after it is done, and the samples of each micro-batch into a file
when they are taken. As a program this is `launch/pretrain.py` with that: for launchers, which hand variables on.
"""

import json
import os
import runpy
import select
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mim_scale import disk
from mim_scale.training import step
from tests.faults.faulty_disk import OPERATIONS
from tests.training.jobs import PRETRAIN

PIPE, ORDER = "TOLD_PIPE", "TOLD_ORDER"
"""The variables that name both, for the program."""
_UNTOLD = ("read", "digest")


def tell(pipe: Path | None, order: Path) -> None:
    """From now on, tell samples into a file, and operations into a pipe that somebody reads."""
    if pipe is not None:
        descriptor = os.open(pipe, os.O_WRONLY)
        os.write(descriptor, f"< {json.dumps([os.getpid(), 'begin', [''], ''])}\n".encode())
        for name in OPERATIONS:
            if name not in _UNTOLD:
                setattr(disk, name, _told(name, getattr(disk, name), descriptor))
    samples = os.open(order, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    to_device = step.to_device

    def taken(batch: Any, device: Any) -> Any:
        line = [os.getpid(), batch.positions.tolist(), list(batch.keys)]
        os.write(samples, (json.dumps(line) + "\n").encode())
        return to_device(batch, device)

    vars(step)["to_device"] = taken


def _told(name: str, real: Callable[..., Any], descriptor: int) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        names = [str(getattr(one, "name", one)) for one in arguments if isinstance(one, Path) or hasattr(one, "name")]
        last = arguments[-1]
        # A row of the journal is one write: its kind and its step stand in front.
        row = bytes(last[:40]).decode(errors="replace") if name == "write" and "journal" in names[0] else ""
        text = json.dumps([os.getpid(), name, [Path(one).name for one in names], row])
        os.write(descriptor, f"> {text}\n".encode())
        result = real(*arguments)
        os.write(descriptor, f"< {text}\n".encode())
        return result

    return call


@dataclass(frozen=True)
class Event:
    """One operation, before it or after it; or that a process begins."""

    pid: int
    name: str
    names: Sequence[str]
    """Of the files and folders that it is about, the last one the new name where it gives one."""
    row: str
    """The beginning of what is written into the journal."""
    is_done: bool

    @property
    def begins_save(self) -> bool:
        """Whether a folder for a checkpoint is about to be made."""
        return self.name == "mkdir" and not self.is_done and self.names[0].startswith(".tmp-")

    @property
    def published(self) -> int | None:
        """The step whose checkpoint has just got its name."""
        if self.name in ("rename", "exchange") and self.is_done and self.names[-1].startswith("step_"):
            return int(self.names[-1].removeprefix("step_"))
        return None

    @property
    def is_step(self) -> bool:
        """Whether a step has just got its row."""
        return self.is_done and self.row.startswith('{"kind": "step"')

    def __str__(self) -> str:
        kind = self.names[-1].rpartition(".")[2] if "." in self.names[-1][1:] else "folder"
        return f"{'after' if self.is_done else 'in'} {self.name} ({kind})"


@dataclass
class History:
    """What was heard of one start, and when."""

    pids: list[int] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    begun: list[float] = field(default_factory=list)
    published: list[int] = field(default_factory=list)
    saves_s: list[float] = field(default_factory=list)
    is_saving: bool = False
    saving: Event | None = None
    """The last operation inside the save under way."""

    def add(self, event: Event) -> None:
        """Take note of an event."""
        now = time.monotonic()
        if event.pid not in self.pids:
            self.pids.append(event.pid)
        if event.is_step:
            self.steps.append(now)
        if event.begins_save and not self.is_saving:
            self.begun.append(now)
            self.is_saving = True
        if event.published is not None:
            self.published.append(event.published)
            self.saves_s.append(now - self.begun[-1])
            self.is_saving = False
        if self.is_saving and not event.row:
            self.saving = event


class Told:
    """The reading end of a pipe in this folder."""

    def __init__(self, folder: Path) -> None:
        self.pipe = folder / "told"
        os.mkfifo(self.pipe)
        # Open for writing too: it must neither wait for a writer nor end with one.
        self._descriptor = os.open(self.pipe, os.O_RDWR | os.O_NONBLOCK)
        self._rest = b""

    def read(self, wait_s: float) -> list[Event]:
        """What has been told since, at least one event unless that takes longer."""
        if not select.select([self._descriptor], [], [], wait_s)[0]:
            return []
        *lines, self._rest = (self._rest + os.read(self._descriptor, 1 << 20)).split(b"\n")
        return [Event(*json.loads(line[2:]), is_done=line.startswith(b"<")) for line in lines]

    def close(self) -> None:
        """Let go of the pipe."""
        os.close(self._descriptor)
        self.pipe.unlink()


def samples(order: Path) -> dict[int, list[tuple[int, str]]]:
    """For each process that took any, (position, volume key) in the order in which it took them."""
    found: dict[int, list[tuple[int, str]]] = {}
    for line in order.read_text().splitlines():
        pid, positions, keys = json.loads(line)
        found.setdefault(pid, []).extend(zip(positions, keys, strict=True))
    return found


if __name__ == "__main__":
    tell(Path(os.environ[PIPE]) if PIPE in os.environ else None, Path(os.environ[ORDER]))
    sys.argv[0] = PRETRAIN
    runpy.run_path(PRETRAIN, run_name="__main__")
