"""What `mim-scale doctor` looks at on a disk: room, speed, and whether the calls that saving rests on work there.

All that is written lies in one folder under a temporary name, some 64 MiB for a second or so, and goes with the check,
or with the process where the check does not end.
"""

import atexit
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from mim_scale import disk
from mim_scale.commit import TEMPORARY, remove, write_all
from mim_scale.doctor.finding import Finding, Level, gib, short
from mim_scale.errors import ConfigError

PIECE = 8 << 20
PIECES = 8
"""Pieces of PIECE bytes that are written at most."""
SECONDS = 1.0
"""After so long no further piece is begun."""
SHARE = 16
"""No more than this part of what is free is written."""
SMALL_SYNCS = 16
OLD_S = 600.0
"""What is younger may be another node's, which looks at the same disk right now."""
SLOW_MB_S, SLOW_SYNC_S = 20.0, 0.2
MB = 1e6
MOUNTS = Path("/proc/self/mountinfo")
NO_LOCKS = "mount it with locks (NFS: without nolock), or never start a run twice"
_TRY_LOCK = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'rb'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
_REFUSED = "BlockingIOError"


def existing(path: Path) -> Path:
    """The folder itself, or the nearest above it that is there: where a run would make it.

    Raises:
        ConfigError: what is there is no folder.
    """
    path = path.absolute()
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder; choose another one")
    return path


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder to write into, gone after the `with`, or with the process."""
    path = folder / f"{TEMPORARY}doctor-{uuid.uuid4().hex[:8]}"
    clean = partial(remove, path)
    atexit.register(clean)
    try:
        disk.mkdir(path)
        yield path
    finally:
        clean()
        atexit.unregister(clean)


def room(name: str, path: Path, needed: int = 0, least: int = 0, what: str = "") -> Iterator[Finding]:
    """Free space and kind of the file system that a path lies, or would lie, on.

    Args:
        name: The check's.
        path: A folder, there or not.
        needed: Bytes that should be free.
        least: Bytes without which nothing works.
        what: What they are for.
    """
    folder = existing(path)
    free, kind = shutil.disk_usage(folder).free, kind_of(folder)
    told = f"{gib(free)} free on {kind} at {folder}"
    if needed:
        told += f"; {what} take {gib(needed)}"
    if free < least or (needed and free < needed):
        level: Level = "error" if free < least else "warning"
        yield Finding(level, name, told, "free space, choose another disk, or lower checkpoint.keep (2 at least)")
    else:
        yield Finding("ok", name, told)
    names = os.statvfs(folder)
    if names.f_files and names.f_favail < 1000:
        yield Finding("warning", name, f"{names.f_favail} more files fit", "delete files, or choose another disk")
    if kind in {"tmpfs", "ramfs"}:
        yield Finding("warning", name, f"{folder} is memory: gone when the machine restarts", "choose a real disk")
    elif kind == "overlay":
        yield Finding("note", name, f"{folder} goes when its container does", "mount a volume for what is to stay")


def kind_of(folder: Path) -> str:
    """The type of the file system that a folder lies on, as the kernel calls it."""
    best, kind = -1, "an unknown file system"
    here = str(folder.resolve())
    for line in MOUNTS.read_text(errors="surrogateescape").splitlines() if MOUNTS.is_file() else ():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4])
        # The later of two mounts at one place hides the earlier.
        if (here == point or here.startswith(point.rstrip("/") + "/")) and len(point) >= best:
            best, kind = len(point), after.split()[0]
    return kind


def writing(path: Path, save_bytes: int = 0) -> Iterator[Finding]:
    """Speed of the disk that a run folder lies on, and what the calls do there that saving and locking rest on.

    Args:
        path: The run folder, there or not.
        save_bytes: Of a checkpoint, to say how long one takes; 0 where that is not known.
    """
    folder, full = existing(path), "free space there, or choose another output"
    try:
        with scratch(folder) as inside:
            yield from _speed(inside, save_bytes)
            yield from _calls(inside)
    except OSError as error:
        text = f"{folder}: cannot be written: {error.strerror or short(error)}"
        remedy = "choose another output, or have it made writable for you"
        yield Finding("error", "writing", text, full if "space" in text or "quota" in text else remedy)
    left = [entry.name for entry in folder.glob(f"{TEMPORARY}doctor-*") if _is_old(entry)]
    if left:
        yield Finding("note", "writing", f"{folder}: {', '.join(left)} left by a doctor", "delete it once none runs")


def _is_old(entry: Path) -> bool:
    try:
        return time.time() - entry.stat().st_mtime > OLD_S
    except FileNotFoundError:
        return False


def _speed(folder: Path, save_bytes: int) -> Iterator[Finding]:
    path, data = folder / "speed", os.urandom(PIECE)
    pieces = max(1, min(PIECES, shutil.disk_usage(folder).free // (SHARE * PIECE)))
    with disk.create(path) as file:
        written, start = 0, time.perf_counter()
        while written < pieces and (time.perf_counter() - start < SECONDS or not written):
            write_all(file, data)
            disk.fsync(file)
            written += 1
        write_s = time.perf_counter() - start
        # Without this the memory would be measured; where it is refused, it is.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    is_same = all(piece == data for piece in _pieces(path))
    read_s = time.perf_counter() - start
    syncs = []
    with disk.create(folder / "small") as file:
        for _ in range(SMALL_SYNCS):
            start = time.perf_counter()
            write_all(file, data[:4096])
            disk.fsync(file)
            syncs.append(time.perf_counter() - start)
            if sum(syncs) > SECONDS:
                break
    rate, sync_s = written * PIECE / write_s / MB, statistics.median(syncs)
    told = f"{rate:,.0f} MB/s written and synced, {written * PIECE / read_s / MB:,.0f} MB/s read"
    told += f", {sync_s * 1e3:.1f} ms a sync"
    if save_bytes:
        told += f"; a checkpoint takes about {save_bytes / MB / rate:,.1f} s"
    if not is_same:
        yield Finding(
            "error", "disk speed", f"{folder.parent}: other bytes were read than written", "replace that disk"
        )
    if rate < SLOW_MB_S or sync_s > SLOW_SYNC_S:
        remedy = "choose a faster disk for output, or a larger checkpoint.every"
        yield Finding("warning", "disk speed", told, remedy)
    else:
        yield Finding("ok", "disk speed", told)


def _pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(PIECE):
            yield piece


def _calls(folder: Path) -> Iterator[Finding]:
    """Renames in one step, exchanges, and locks that another process sees."""
    one, other = folder / "one", folder / "other"
    for path in (one, other):
        disk.mkdir(path)
    has_exchange = disk.exchange(one, other)
    (one / "a").write_bytes(b"new")
    (one / "b").write_bytes(b"old")
    disk.rename(one / "a", one / "b")
    disk.sync(one)
    if (one / "b").read_bytes() != b"new" or (one / "a").exists():
        yield Finding("error", "renames", f"{folder.parent}: a rename does not replace", "choose another file system")
    elif not has_exchange:
        yield Finding(
            "note",
            "renames",
            f"{folder.parent}: two folders cannot change names in one step; a save again of one step has an instant "
            "without either",
            "nothing is lost by it; local disks have the call",
        )
    else:
        yield Finding("ok", "renames", "a rename replaces, two folders change names in one step")
    yield _locks(folder)


def _locks(folder: Path) -> Finding:
    import fcntl

    path = folder / "lock"
    with disk.create(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            text = f"{folder.parent} has no file locks ({error.strerror}): a second run is noticed on one machine only"
            return Finding("warning", "locks", text, NO_LOCKS)
        other = subprocess.run(
            [sys.executable, "-S", "-c", _TRY_LOCK, str(path)], capture_output=True, text=True, timeout=10, check=False
        )
    if _REFUSED in other.stderr:
        return Finding("ok", "locks", "a second run in one folder is kept out")
    text = f"{folder.parent}: a lock does not keep another process out"
    return Finding("warning", "locks", text, NO_LOCKS)
