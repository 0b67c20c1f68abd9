"""What this process may use of its machine: cores and memory, as affinity and cgroups (both versions) leave them.

No torch, so that it answers at once.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

PROC, SYS = Path("/proc"), Path("/sys")
PAGES = 1 << 60
"""A limit above this is none."""


def usable_cores() -> int:
    """Cores that this process may run on, and its cgroup pays for; at least 1."""
    mine = allowed_cores()
    return max(1, min(mine, int(cpu_quota() or mine)))


def allowed_cores() -> int:
    """Cores that the scheduler may put this process on, whatever its cgroup pays for."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota() -> float | None:
    """Cores that the cgroup pays for; None for as many as there are."""
    shares = []
    for text in cgroup("cpu", "cpu.max"):
        allowed, period = text.split()
        shares += [int(allowed) / int(period)] if allowed != "max" else []
    for allowed, period in zip(cgroup("cpu", "cpu.cfs_quota_us"), cgroup("cpu", "cpu.cfs_period_us"), strict=False):
        shares += [int(allowed) / int(period)] if int(allowed) > 0 else []
    return min(shares, default=None)


def memory_limit() -> int | None:
    """Bytes that the cgroup allows; None where it allows all."""
    texts = [*cgroup("memory", "memory.max"), *cgroup("memory", "memory.limit_in_bytes")]
    return min((int(text) for text in texts if text.isdigit() and int(text) < PAGES), default=None)


def free_memory() -> tuple[int, int]:
    """Bytes that this machine, or the cgroup, has left, what files are cached in counted as left; and those in all."""
    import psutil

    found, limit = psutil.virtual_memory(), memory_limit()
    free, whole = int(found.available), int(found.total)
    for limits, uses, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        groups = zip(*(cgroup("memory", name) for name in (limits, uses, "memory.stat")), strict=False)
        for most, used, stat in groups:
            # What files hold of it is given back when memory is short.
            files = re.search(rf"^{cached} (\d+)$", stat, re.MULTILINE)
            if most.isdigit():
                free = min(free, max(0, int(most) - int(used) + (int(files[1]) if files else 0)))
    return free, min(whole, limit or whole)


def cgroup(controller: str, name: str) -> Iterator[str]:
    """What a file of this process's cgroup says, and those above it, in either version of cgroups."""
    lines = [line.split(":", 2) for line in _text(PROC / "self" / "cgroup").splitlines()]
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers and controller not in controllers.split(","):
            continue
        inside = Path(path.lstrip("/"))
        # Version 1 mounts each set of controllers by its name. A container may see its own group at the top, whatever
        # path it is told.
        for top in dict.fromkeys((controllers, controllers and controller)):
            for folder in (inside, *inside.parents):
                if text := _text(SYS / "fs" / "cgroup" / top / folder / name):
                    yield text


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
