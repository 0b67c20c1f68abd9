"""Two nodes on one machine: network namespaces with addresses and host names of their own, joined by one cable."""

import contextlib
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.training.jobs import ROOT, environment


@dataclass(frozen=True)
class Node:
    """One of the machines: how a command is started there, and the address at which the other finds it."""

    name: str
    address: str
    prefix: tuple[str, ...]

    def start(self, command: Sequence[str], log: Path, **changes: str) -> subprocess.Popen[bytes]:
        """Start a command there, its lines in a file."""
        with open(log, "ab") as file:
            return subprocess.Popen(
                [*self.prefix, *command],
                cwd=ROOT,
                env=environment(PYTHONPATH=str(ROOT), **changes),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def why_not() -> str | None:
    """Why this machine cannot be two; None where it can."""
    if os.geteuid() or shutil.which("ip") is None:
        return "network namespaces need root and the ip command"
    name = f"mim-probe-{os.getpid()}"
    made = _ip("netns", "add", name)
    _ip("netns", "del", name)
    return None if made.returncode == 0 else f"no network namespace can be made here: {made.stderr.strip()}"


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Both, and nothing of them afterwards; on a machine that cannot be two, two addresses of its loopback."""
    if reason := why_not():
        warnings.warn(f"the two nodes are addresses of loopback only: {reason}", stacklevel=2)
        yield (Node("one", "127.0.0.2", ()), Node("two", "127.0.0.3", ()))
        return
    key = os.getpid() % 10000
    names = [f"mim-{key}-{letter}" for letter in "ab"]
    cables = [f"mim{key}{letter}" for letter in "ab"]
    addresses = [f"10.{200 + key % 50}.{key % 250}.{number}" for number in (1, 2)]
    try:
        for name in names:
            _must("netns", "add", name)
        _must("link", "add", cables[0], "netns", names[0], "type", "veth", "peer", "name", cables[1], "netns", names[1])
        for name, cable, address in zip(names, cables, addresses, strict=True):
            _must("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            _must("-n", name, "link", "set", "lo", "up")
            _must("-n", name, "link", "set", cable, "up")
        yield (_node(names[0], addresses[0]), _node(names[1], addresses[1]))
    finally:
        for name in names:
            for pid in _ip("netns", "pids", name).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            _ip("netns", "del", name)


def _node(name: str, address: str) -> Node:
    # A name that nobody can look up, as many a machine has: gloo must not depend on it.
    named = f'hostname {name} && exec "$@"'
    return Node(name, address, ("ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", named, "sh"))


def _ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


def _must(*words: str) -> None:
    done = _ip(*words)
    assert done.returncode == 0, done.stderr
