"""`mim-scale doctor` and disks that are full, read-only, forbidden, or lack calls: made for real where they can be."""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mim_scale import disk
from mim_scale.commit import TEMPORARY
from mim_scale.doctor import disk as doctor_disk
from tests.doctor.findings import everything_below, levels
from tests.training.jobs import ROOT, environment

TELL = "import sys; from pathlib import Path; from mim_scale.doctor.disk import *; {}"
WRITING = TELL.format(
    "print(*[f'{one.level} {one.check}: {one.found}' for one in writing(Path(sys.argv[1]))], sep='\\n')"
)


def mounted(folder: Path, options: str, code: str) -> str:
    """What a program says with a tmpfs of its own at a folder; skips where nobody may mount."""
    mount = f"mount -t tmpfs -o {options} tmpfs {folder}"
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode
    ):
        pytest.skip("this machine lets nobody mount a file system of his own")
    job = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'{mount} && "$@"; ls -A {folder}', "sh", sys.executable, "-c", code, folder],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in job.stderr, job.stderr
    return job.stdout


def test_a_read_only_disk(tmp_path: Path) -> None:
    said = mounted(tmp_path, "ro,size=2m", WRITING)
    assert said.splitlines() == [f"error writing: {tmp_path}: cannot be written: Read-only file system"]


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    # Of root alone modes ask nothing, unless it gives that right up.
    lesser = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-all"] if os.geteuid() == 0 else []
    if lesser and (shutil.which("setpriv") is None or subprocess.run([*lesser, "true"], check=False).returncode):
        pytest.skip("this machine's root can write anywhere")
    job = subprocess.run(
        [*lesser, sys.executable, "-c", WRITING, tmp_path / "run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    tmp_path.chmod(0o755)
    assert job.stdout.splitlines() == [f"error writing: {tmp_path}: cannot be written: Permission denied"], job.stderr


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small one, filled up by what is measured, and any one at the first byte; nothing is left on either."""
    said = mounted(tmp_path, "size=4m", WRITING)
    assert said.splitlines() == [f"error writing: {tmp_path}: cannot be written: No space left on device"]

    def full(file: Any, data: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "write", full)
    found = list(doctor_disk.writing(tmp_path))
    assert levels(found) == ["error"]
    assert "free space" in found[0].remedy
    assert everything_below(tmp_path) == set()


def test_room_for_checkpoints(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert levels(list(doctor_disk.room("disk", tmp_path / "run", free // 2, 1, "checkpoints")))[0] == "ok"
    assert levels(list(doctor_disk.room("disk", tmp_path / "run", free * 2, 1, "checkpoints")))[0] == "warning"
    assert levels(list(doctor_disk.room("disk", tmp_path / "run", free * 4, free * 2, "checkpoints")))[0] == "error"
    said = mounted(tmp_path, "size=4m", TELL.format("print([one.found for one in room('disk', Path(sys.argv[1]))])"))
    assert "is memory: gone when the machine restarts" in said


def test_a_disk_without_locks_and_without_exchanges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(file: Any, flags: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(disk, "exchange", lambda one, other: False)
    monkeypatch.setattr(fcntl, "flock", refuses)
    found = {one.check: one.level for one in doctor_disk.writing(tmp_path)}
    assert (found["renames"], found["locks"]) == ("note", "warning")
    monkeypatch.setattr(fcntl, "flock", lambda file, flags: None)  # as `nolock` mounts do: granted, and no lock
    assert {one.check: one.level for one in doctor_disk.writing(tmp_path)}["locks"] == "warning"


def test_what_a_doctor_left_is_told_and_another_at_work_is_not(tmp_path: Path) -> None:
    """Each node of a run has a doctor that looks at the same disk."""
    left, beside = (tmp_path / f"{TEMPORARY}doctor-{name}" for name in ("left", "beside"))
    left.mkdir()
    beside.mkdir()
    yesterday = time.time() - 86400
    os.utime(left, (yesterday, yesterday))
    (told,) = [one.found for one in doctor_disk.writing(tmp_path) if "left by a doctor" in one.found]
    assert left.name in told
    assert beside.name not in told
