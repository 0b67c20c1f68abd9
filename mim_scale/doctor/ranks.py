"""What `mim-scale doctor` measures between ranks: sums and their speed, clocks, and the folder that all should see.

Every rank makes the same calls in the same order, whatever it finds by itself.
"""

import fcntl
import os
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from mim_scale.doctor.disk import NO_LOCKS, existing, scratch
from mim_scale.doctor.finding import Finding
from mim_scale.doctor.run import Facts
from mim_scale.errors import ConfigError
from mim_scale.training.all_reduce import time_all_reduce
from mim_scale.training.host import SYS
from mim_scale.training.placement import INTERFACE
from mim_scale.training.ranks import Ranks

SIZES = (4, 64 << 10, 1 << 20, 16 << 20)
SIZES_GPU = (*SIZES, 256 << 20)
REPEATS = 5
SECONDS = 10.0
"""After so long no larger size is begun."""
SLOW_GB_S = 0.1
"""Between machines: what 1 Gbit/s gives, at which gradients of a hundred million parameters take eight seconds."""
SKEW_S = 1.0
SEEN_S = 2.0
ROUNDS = 10


@dataclass(frozen=True)
class Exchange:
    """One size of all-reduce over all ranks."""

    device: str
    bytes: int
    seconds: float
    """Median of the repeats, on the slowest rank."""
    gb_per_s: float
    """What each rank sends and takes: 2 (ranks - 1) / ranks of the bytes, in that time."""
    is_right: bool
    """Whether every rank had the exact sum."""


def measure(ranks: Ranks, device: torch.device) -> list[Exchange]:
    """All-reduce float32 of growing size on a device."""
    table: list[Exchange] = []
    began = time.perf_counter()
    for size in SIZES_GPU if device.type == "cuda" else SIZES:
        seconds, is_right = time_all_reduce(ranks, size, REPEATS, device)
        sent = size * 2 * (ranks.world - 1) / ranks.world
        table.append(Exchange(device.type, size, seconds, sent / seconds / 1e9, is_right))
        if ranks.gather([time.perf_counter() - began]).max() > SECONDS:
            break
    return table


def exchanges(ranks: Ranks, parameters: int | None, on_gpus: bool) -> tuple[list[Exchange], list[Finding]]:
    """The table, on cores by gloo and on GPUs by NCCL, and what it means.

    Args:
        parameters: Of the network, to say what its gradients take; None where that is not known.
        on_gpus: Whether NCCL is measured too; the same on all ranks, each of which has a GPU then.
    """
    hosts = len(set(ranks.gather_objects(socket.gethostname())))
    table = measure(ranks, torch.device("cpu"))
    if on_gpus:
        table += measure(ranks, ranks.device)
    wrong = [f"{one.bytes:,} bytes on {one.device}" for one in table if not one.is_right]
    if wrong:
        what = f"wrong sums: {', '.join(wrong)}"
        return table, [Finding("error", "all-reduce", what, "replace or update the network card, its driver, or NCCL")]
    best = max((one for one in table if (one.device == "cuda") == on_gpus), key=lambda one: one.gb_per_s)
    library = "NCCL" if on_gpus else "gloo"
    told = (
        f"{ranks.world} ranks on {hosts} machine(s), {library}: {best.gb_per_s:,.2f} GB/s, "
        f"{table[0].seconds * 1e3:,.2f} ms for 4 bytes"
    )
    if parameters:
        share = 4 * parameters * 2 * (ranks.world - 1) / ranks.world
        told += f"; gradients of this network take about {share / best.gb_per_s / 1e9:,.2f} s"
    if hosts > 1 and best.gb_per_s < SLOW_GB_S:
        remedy = f"name a faster network in {INTERFACE} (gloo) and NCCL_SOCKET_IFNAME, or raise train.batch"
        return table, [Finding("warning", "all-reduce", told, remedy)]
    return table, [Finding("ok", "all-reduce", told)]


def network(world_hosts: int) -> Finding:
    """The interface that gloo was told of on this machine."""
    name = os.environ.get(INTERFACE)
    if name is None:
        return Finding(
            "note", "network", "gloo looks this machine's name up to choose its network", f"set {INTERFACE} if it waits"
        )
    try:
        speed = int((SYS / "class" / "net" / name / "speed").read_text())
    except (OSError, ValueError):
        speed = -1
    told = f"gloo uses {name}" + (f", {speed:,} Mbit/s" if speed > 0 else "")
    if world_hosts > 1 and 0 < speed <= 1000:
        return Finding("warning", "network", told, f"name a faster one in {INTERFACE} and NCCL_SOCKET_IFNAME")
    return Finding("ok", "network", told)


def clocks(ranks: Ranks) -> Finding:
    """How far the clocks of the ranks' machines are apart."""
    best: tuple[float, float] = (float("inf"), 0.0)
    for _ in range(ROUNDS):
        ranks.gather([0.0])
        start = time.perf_counter()
        stamps = ranks.gather([time.time()])[:, 0]
        best = min(best, (time.perf_counter() - start, float(stamps.max() - stamps.min())))
    return skew(best[1], best[0])


def skew(apart_s: float, width_s: float) -> Finding:
    """A finding on clocks that were read `apart_s` apart, all within `width_s`."""
    told = f"at most {apart_s + width_s:.3f} s apart"
    if apart_s - width_s > SKEW_S:
        remedy = "start chrony or ntpd on all machines: ages and times left in `mim-scale status` are wrong by it"
        return Finding("warning", "clocks", f"{apart_s:.1f} s apart", remedy)
    return Finding("ok", "clocks", told)


def alike(facts: Sequence[tuple[str, Facts]]) -> list[Finding]:
    """Versions and dataset must be the same on all machines.

    Args:
        facts: Host and what was learnt there, one for each machine.
    """
    found = []
    for name in sorted({name for _, one in facts for name in one.versions}):
        by_version: dict[str | None, list[str]] = {}
        for host, one in facts:
            by_version.setdefault(one.versions.get(name), []).append(host)
        if len(by_version) > 1:
            told = "; ".join(f"{version or 'none'} on {', '.join(hosts)}" for version, hosts in by_version.items())
            found.append(
                Finding(
                    "error", "same everywhere", f"{name}: {told}", "give all machines one environment, and one config"
                )
            )
    prints = {one.fingerprint: host for host, one in facts if one.fingerprint is not None}
    if len(prints) > 1:
        told = ", ".join(f"{fingerprint[:16]} on {host}" for fingerprint, host in prints.items())
        found.append(Finding("error", "same everywhere", f"other datasets: {told}", "give all machines the same store"))
    return found or [Finding("ok", "same everywhere", "versions and dataset")]


def device_of(ranks: Ranks) -> str | None:
    """What tells this rank's GPU from all others; None on cores."""
    if ranks.device.type != "cuda":
        return None
    return str(torch.cuda.get_device_properties(ranks.device).uuid)


def devices(used: Sequence[tuple[str, str | None]]) -> list[Finding]:
    """Ranks that cannot exchange gradients: some without a GPU beside some with one, or several on one.

    Args:
        used: Host and GPU of each rank.
    """
    found = []
    without = sorted({host for host, gpu in used if gpu is None})
    having = sorted({host for host, gpu in used if gpu is not None})
    if without and having:
        text = f"ranks compute on cores on {', '.join(without)}, but on GPUs on {', '.join(having)}"
        remedy = "mend the driver, torch or CUDA_VISIBLE_DEVICES where GPUs are missing, or hide them from all ranks"
        found.append(Finding("error", "devices", text, remedy))
    if crowded := sorted({host for host, gpu in used if gpu is not None and used.count((host, gpu)) > 1}):
        text = f"several ranks share a GPU on {', '.join(crowded)}, which NCCL refuses"
        remedy = "start one rank for each GPU, and let each see all or its own"
        found.append(Finding("error", "devices", text, remedy))
    return found


def shared_folder(ranks: Ranks, output: Path) -> list[Finding]:
    """Whether all ranks see the disk of the run folder, and whether a lock that rank 0 holds keeps them out."""
    with ExitStack() as stack:
        mark: Path | None = None
        if ranks.rank == 0:
            try:
                mark = stack.enter_context(scratch(existing(output))) / "lock"
                file = stack.enter_context(open(mark, "xb"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (OSError, ConfigError):
                mark = None  # what is wrong with that disk is a finding of its own
        mark = ranks.broadcast(mark)
        if mark is None:
            return []
        told = ranks.gather_objects((socket.gethostname(), *_look(mark, ranks.rank)))
    blind = sorted({host for host, sees, _ in told if not sees})
    loose = sorted({host for host, sees, is_kept_out in told if sees and not is_kept_out})
    found = []
    if blind:
        remedy = "give them the shared disk; else start rank 0 on the same machine each time"
        text = f"not seen from {', '.join(blind)}: they write no checkpoints"
        found.append(Finding("note", "shared output", text, remedy))
    if loose:
        text = f"a lock of {told[0][0]} keeps nobody out on {', '.join(loose)}"
        found.append(Finding("warning", "shared output", text, NO_LOCKS))
    return found or [Finding("ok", "shared output", "seen from all ranks, and locks reach them")]


def _look(mark: Path, rank: int) -> tuple[bool, bool]:
    """Whether a file of rank 0 is seen here, and its lock keeps this process out."""
    if rank == 0:
        return True, True
    deadline = time.monotonic() + SEEN_S
    while not mark.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        with open(mark, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True, True
    except OSError:
        return mark.is_file(), mark.is_file()
    return True, False
