"""MLflow's SQLite file locked by somebody else, or on a disk that is full: training goes on, told once, caught up."""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.training.jobs import ROOT, environment, result_line
from tests.training.mlflow_server import copy_database

CALL_S = 0.5
"""100 times what a row takes with a healthy disk and no tracker at all, on a busy machine."""

JOB = """
import json, resource, sqlite3, subprocess, sys, time
from pathlib import Path
from mim_scale.training import tracking_mlflow
from mim_scale.training.journal import Journal
tracking_mlflow.POLL_S, tracking_mlflow.LONGEST_WAIT_S, tracking_mlflow.CLOSE_S = 0.05, 0.5, 300.0
folder, database = Path(sys.argv[1]), Path(sys.argv[2])
journal, times = Journal(folder / "journal.jsonl"), []
journal.write("start", 0, fingerprint="f" * 64)

def steps(first, last, pause_s=0.0):
    for step in range(first, last + 1):
        began = time.perf_counter()
        journal.write("step", step, position=step, loss=1 / step, grad_norm=1.0, time=time.time())
        times.append(time.perf_counter() - began)
        time.sleep(pause_s)

def points():
    with sqlite3.connect(database, timeout=60) as file:
        return [step for step, in file.execute("select step from metrics where key = 'position' order by step")]

def wait(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)

tracker = tracking_mlflow.MlflowTracker(f"sqlite:///{database}", "faults", folder, journal.path)
tracker.start({})
steps(1, 20)
wait(lambda: len(points()) == 20)
TROUBLE
tracker.close("FINISHED")
with sqlite3.connect(database, timeout=60) as file:
    (status,) = file.execute("select status from runs").fetchone()
told = {"points": points(), "slowest": max(times), "spent": sum(times), "failures": tracker.failures}
print("RESULT", json.dumps({**told, "delivered": tracker.delivered, "status": status}))
"""

LOCKED = """
code = ("import sqlite3, sys, time; file = sqlite3.connect(sys.argv[1], isolation_level=None)\\n"
        "file.execute('begin exclusive'); print('held', flush=True); time.sleep(float(sys.argv[2]))")
other = subprocess.Popen([sys.executable, "-c", code, str(database), "HOLD_S"], stdout=subprocess.PIPE)
other.stdout.readline()
steps(21, 200, pause_s=0.01)
assert other.poll() is None
other.wait()
"""

LIMITED = """
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (database.stat().st_size, hard))
steps(21, 600)
wait(lambda: tracker.failures > 2)
steps(601, 700)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
"""

FILLED = """
filler = database.parent / "filler"
try:
    with open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
except OSError as error:
    assert error.errno == 28
steps(21, 600)
wait(lambda: tracker.failures > 2)
steps(601, 700)
filler.unlink()
"""


def run_job(trouble: str, folder: Path, wrapped: str = "") -> subprocess.CompletedProcess[str]:
    place = folder / "place"
    place.mkdir()
    (folder / "job.py").write_text(JOB.replace("TROUBLE", textwrap.dedent(trouble)))
    arguments = [str(folder / "job.py"), str(folder), str(place / "mlflow.db")]
    fresh = (folder if wrapped else place) / "mlflow.db"
    copy_database(fresh)
    if not wrapped:
        command = [sys.executable, *arguments]
    else:
        script = f'{wrapped} "$0" && cp "$1" "$0"/mlflow.db && shift && exec "$@"'
        command = ["unshare", "-rm", "sh", "-c", script, str(place), str(fresh), sys.executable, *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def assert_caught_up(job: subprocess.CompletedProcess[str], steps: int, told: int) -> None:
    found = result_line(job)
    print(f"slowest row {found['slowest'] * 1e3:.2f} ms, {found['failures']} failures")
    assert found["points"] == list(range(1, steps + 1))
    assert (found["delivered"], found["status"]) == (True, "FINISHED")
    assert found["slowest"] < CALL_S
    assert job.stderr.count("does not take metrics") == told
    assert "Traceback" not in job.stderr


def test_locked_for_a_while(tmp_path: Path) -> None:
    """MLflow waits for a lock up to 20 s by itself, in its thread."""
    assert_caught_up(run_job(LOCKED.replace("HOLD_S", "4"), tmp_path), 200, told=0)


@pytest.mark.soak
def test_locked_for_long(tmp_path: Path) -> None:
    job = run_job(LOCKED.replace("HOLD_S", "50"), tmp_path)
    assert_caught_up(job, 200, told=1)
    assert "database is locked" in job.stderr


@pytest.mark.soak
def test_no_more_room_in_the_file(tmp_path: Path) -> None:
    job = run_job(LIMITED, tmp_path)
    assert_caught_up(job, 700, told=1)


def test_full_disk(tmp_path: Path) -> None:
    """A file system of its own with 2 MB; the journal lies elsewhere: where it does not fit, the run ends."""
    mount = "mount -t tmpfs -o size=2m tmpfs"
    probe = ["unshare", "-rm", "sh", "-c", f"{mount} {tmp_path}"]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system of his own")
    job = run_job(FILLED, tmp_path, wrapped=mount)
    assert_caught_up(job, 700, told=1)
    assert "database or disk is full" in job.stderr
