"""How busy a node's processor, memory, disks and network are: rows of kind `system`, for the tracker.

One process a node writes them, into `system/<host>.jsonl` in the run folder. Not into the journal, which one process
writes and which holds what a run needs to go on; not to MLflow, which one process speaks to, so that it may be a SQLite
file, and which may be away. A node that does not see the run folder tells nothing. In a container the numbers are the
machine's.
"""

import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from mim_scale.config import PretrainConfig
from mim_scale.errors import MimScaleError
from mim_scale.training.journal import Journal, read_journal
from mim_scale.training.run_folder import SYSTEM

EVERY_S = 30.0
MB = 1e6


@contextmanager
def system_rows(config: PretrainConfig, is_written_here: bool) -> Iterator[None]:
    """Write rows in a thread until left; nothing without a tracker, or where another process does it.

    Args:
        config: The run's.
        is_written_here: Whether this process is the one of its node.
    """
    if not is_written_here or config.tracking.mlflow is None:
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_write_rows, args=(Path(config.output), stop), name="mim-system", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(1.0)


def _write_rows(output: Path, stop: threading.Event) -> None:
    host = re.sub(r"[^\w.-]", "_", socket.gethostname())
    path = output / SYSTEM / f"{host}.jsonl"
    try:
        step = len(read_journal(path))
        journal = Journal(path)
        before, since = _counters(), time.monotonic()
        psutil.cpu_percent()
        while not stop.wait(EVERY_S):
            now, at = _counters(), time.monotonic()
            rates = {name: (now[name] - before.get(name, now[name])) / MB / (at - since) for name in now}
            before, since = now, at
            step += 1
            values = {f"{host}/{name}": round(value, 3) for name, value in (_levels(output) | rates).items()}
            journal.write("system", step, host=host, system=values, time=time.time())
        journal.close()
    except (MimScaleError, OSError, psutil.Error) as error:
        print(f"tracking: no more system metrics of {host}: {error}", file=sys.stderr, flush=True)


def _levels(output: Path) -> dict[str, float]:
    memory = psutil.virtual_memory()
    return {
        "cpu_percent": psutil.cpu_percent(),
        "memory_percent": memory.percent,
        "memory_used_mb": (memory.total - memory.available) / MB,
        "disk_free_mb": psutil.disk_usage(str(output)).free / MB,
    }


def _counters() -> dict[str, int]:
    """Bytes so far; a container may be told of no disk or no network."""
    disk, network = psutil.disk_io_counters(), psutil.net_io_counters()
    found: dict[str, int] = {}
    if disk is not None:
        found |= {"disk_read_mb_per_s": disk.read_bytes, "disk_write_mb_per_s": disk.write_bytes}
    if network is not None:
        found |= {"network_sent_mb_per_s": network.bytes_sent, "network_received_mb_per_s": network.bytes_recv}
    return found
