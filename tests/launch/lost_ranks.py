"""How long until a lost rank is noticed, and until training goes on: `make soak`. Kill, stop, segfault, dead network.

Two ranks under the supervisor. The network dies between two nodes that are network namespaces: frames go to an address
that nobody has, and nobody is told; it is mended once both nodes have noticed. Counted from the fault:
noticed   the first line of ours about it, by a rank or a supervisor
again     the first step that had not been made before
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from mim_scale.training.journal import read_journal
from tests.launch.nodes import Node, two_nodes
from tests.launch.runs import SUPERVISE, arguments, gone, losses, ranks, small_run
from tests.training.jobs import free_port, torchrun

NOTICED_S, AGAIN_S = 30.0, 120.0
LIMIT_S = 300
FAULTS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "segfault": signal.SIGSEGV, "dead network": None}


def main() -> int:
    """Every fault so many times; a table, and 1 where a time is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the steps at which the faults come")
    parser.add_argument("--count", type=int, default=3, help="how often each; rank 0 and rank 1 in turns")
    parser.add_argument("--only", choices=FAULTS, help="one fault")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    todo = [(fault, number) for fault in FAULTS for number in range(options.count) if options.only in (None, fault)]
    times: dict[str, list[Times]] = {fault: [] for fault in FAULTS}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mim-scale-lost-") as name:
        config = small_run(Path(name), steps=2000)
        for done, (fault, number) in enumerate(todo, start=1):
            folder = Path(name) / f"{fault.replace(' ', '_')}_{number}"
            folder.mkdir()
            shots = random.Random(f"{options.seed} {fault} {number}")
            times[fault].append(lose(fault, number % 2, config, folder, shots))
            left = (time.monotonic() - began) / done * (len(todo) - done)
            print(f"{done} of {len(todo)}: {fault}, {times[fault][-1]}; about {left:.0f} s left", flush=True)
    print("| fault | noticed after, s | training again after, s | first line about it |")
    print("|---|---|---|---|")
    for fault, found in times.items():
        if found:
            noticed, again = (", ".join(f"{getattr(one, what):.1f}" for one in found) for what in ("noticed", "again"))
            print(f"| {fault} | {noticed} | {again} | {'; '.join(sorted({one.line for one in found}))} |")
    is_slow = [one for found in times.values() for one in found if one.noticed > NOTICED_S or one.again > AGAIN_S]
    return 1 if is_slow else 0


@dataclass(frozen=True)
class Times:
    """Seconds from the fault."""

    noticed: float
    again: float
    line: str


@dataclass
class Jobs:
    """The supervisors of a run, one a node, and what they and their ranks say."""

    output: Path
    supervisors: list[subprocess.Popen[bytes]]
    logs: list[Path]
    unheard_of: list[int]
    """Where in each log the fault came."""

    def fault_comes(self) -> None:
        """Whatever is said from now on is about the fault."""
        self.unheard_of = [log.stat().st_size for log in self.logs]

    def said(self) -> list[list[str]]:
        """Lines of ours since the fault, of each node."""
        texts = [log.read_bytes()[start:].decode() for log, start in zip(self.logs, self.unheard_of, strict=True)]
        ours = ("error: ", "supervisor: ")
        return [[line for line in text.split("\n")[:-1] if line.startswith(ours)] for text in texts]

    def wait(self, happened: Callable[[], object]) -> float:
        """When it happened; an error where it does not."""
        deadline = time.monotonic() + LIMIT_S
        while not happened():
            is_well = time.monotonic() < deadline and all(one.poll() is None for one in self.supervisors)
            assert is_well, "\n".join(log.read_text(errors="replace")[-3000:] for log in self.logs)
            time.sleep(0.05)
        return time.monotonic()


def lose(fault: str, rank: int, config: Path, folder: Path, shots: random.Random) -> Times:
    """Start a run, bring the fault about after a few steps, and watch."""
    number, after = FAULTS[fault], shots.randint(3, 12)
    with running(config, folder, two=number is None) as (jobs, nodes):
        jobs.wait(lambda: len(losses(jobs.output)) >= after)
        jobs.fault_comes()
        began, wall = time.monotonic(), time.time()
        if number is None:
            with cut_off(nodes):
                noticed = jobs.wait(lambda: all(jobs.said()))
        else:
            os.kill(ranks(jobs.supervisors[0].pid)[rank].pid, number)
            noticed = jobs.wait(lambda: any(jobs.said()))
        line = next(lines[0] for lines in jobs.said() if lines)
        again = jobs.wait(lambda: goes_on(jobs.output, wall))
        return Times(noticed - began, again - began, shortened(line))


def goes_on(output: Path, since: float) -> bool:
    """Whether a step was made that had not been made before, after the run was taken up."""
    kinds = [row["kind"] for row in read_journal(output / "journal.jsonl") if row["time"] > since]
    return "start" in kinds and "step" in kinds[kinds.index("start") :]


def shortened(line: str) -> str:
    """A line without what differs from run to run."""
    return line.partition(";")[0].partition(" (")[0][:110]


@contextlib.contextmanager
def running(config: Path, folder: Path, two: bool) -> Iterator[tuple[Jobs, list[Node]]]:
    """Two ranks under supervision, on one node or on two; nothing of them is left behind."""
    with contextlib.ExitStack() as stack:
        nodes = list(stack.enter_context(two_nodes())) if two else [Node("here", "127.0.0.1", ())]
        port, output = free_port(), folder / "run"
        jobs, logs = [], [folder / f"log_{number}" for number in range(len(nodes))]
        for number, node in enumerate(nodes):
            there = ["--nnodes", "2", "--node_rank", str(number), "--nproc_per_node", "1"]
            meeting = ["--master_addr", nodes[0].address, "--master_port", str(port)]
            launcher = [sys.executable, "-m", "torch.distributed.run", *there, *meeting] if two else torchrun(2)
            command = [*SUPERVISE, "--", *launcher, *arguments(config, output), "checkpoint.every=4"]
            jobs.append(node.start(command, logs[number]))
        try:
            yield Jobs(output, jobs, logs, [0] * len(nodes)), nodes
        finally:
            for job in jobs:
                family = psutil.Process(job.pid).children(recursive=True) if job.poll() is None else []
                # All that it started ends with it.
                job.kill()
                job.wait()
                assert gone(family, within_s=30), "something outlived its supervisor"


@contextlib.contextmanager
def cut_off(nodes: list[Node]) -> Iterator[None]:
    """No frame arrives, and no system knows: each node has another address for the other's card than it has."""
    pairs = [(nodes[0].name, nodes[1].address), (nodes[1].name, nodes[0].address)]
    cables = [_ip("-n", name, "-o", "link", "show", "type", "veth").split(": ")[1].split("@")[0] for name, _ in pairs]
    nobody = ["lladdr", "02:00:00:00:00:99", "nud", "permanent"]
    for (name, other), cable in zip(pairs, cables, strict=True):
        _ip("-n", name, "neigh", "replace", other, *nobody, "dev", cable)
    try:
        yield
    finally:
        for (name, other), cable in zip(pairs, cables, strict=True):
            _ip("-n", name, "neigh", "del", other, "dev", cable)


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
