"""Processes and what came of them, on Linux: who descends from whom, and an end for all of them.

A subreaper becomes the parent of every descendant whose own parent has died, in whatever session or process group it
lives; so what a launcher leaves behind is always found among the children of the process that watches over it.
"""

import contextlib
import ctypes
import os
import signal
from dataclasses import dataclass
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class ProcessId:
    """One process and no later one of the same number.

    Args:
        machine: Its machine's start and its container's processes; nothing where the system does not tell.
        pid: Its number there.
        born: When it was started, in clock ticks after the machine's start.
    """

    machine: str
    pid: int
    born: int

    @classmethod
    def own(cls) -> "ProcessId":
        """This process."""
        return cls(_machine(), os.getpid(), _born(os.getpid()))

    def kill(self) -> bool:
        """Kill it, if it is on this machine and still the same; returns whether it was."""
        if not self.machine or self.machine != _machine():
            return False
        try:
            # The number cannot go to another process while this is held.
            held = os.pidfd_open(self.pid)
        except OSError:
            return False
        try:
            if _born(self.pid) != self.born:
                return False
            signal.pidfd_send_signal(held, signal.SIGKILL)
        except OSError:
            return False
        finally:
            os.close(held)
        return True


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(pid: int) -> int:
    try:
        # Field 22 of the line; the name, in brackets, may hold anything.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return -1


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal and waits for another to go on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False


def adopt_orphans() -> None:
    """Make this process the one that orphans among its descendants are given to.

    Raises:
        OSError: this system has no such thing; Linux does.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "prctl") or libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError("processes can be supervised on Linux only")


def descendants(pid: int) -> list[int]:
    """Children of a process, their children, and so on; nearest first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        # A process may end while it is looked at.
        with contextlib.suppress(OSError, ValueError):
            # The name, in brackets, may hold anything; the parent stands two words after it.
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found[1:]


def end_descendants() -> None:
    """Kill every descendant of this process, which has adopted orphans, and wait until none is left."""
    while True:
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return
