"""A rank that stands still or says nothing ends all of them, soon, with its name and everybody's stacks."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from mim_scale.training import watchdog as module
from mim_scale.training.journal import read_journal
from mim_scale.training.processes import ProcessId
from mim_scale.training.watchdog import EXCHANGE, LEAST_LIMIT_S, STACKS, Watchdog, _First
from tests.synthetic import make_dataset
from tests.training.jobs import PRETRAIN, ROOT, environment, free_port, write_config
from tests.training.standin import small_config

SITE = """
import os, time
import mim_scale.training.step as step
real = step._next_on_all
def slow(batches, ranks, watchdog):
    if ranks.rank == 1 and os.path.exists(os.environ["HANG"]):
        watchdog.beat("reading data")
        time.sleep(600)
    return real(batches, ranks, watchdog)
step._next_on_all = slow
"""


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watchdog")
    make_dataset(folder / "store")
    return write_config(small_config(str(folder / "store"), str(folder / "run"), steps=4000), folder)


def start_two(config: Path, output: Path, **changes: str) -> list[subprocess.Popen[str]]:
    """Two ranks without a launcher, which would end the other one by itself."""
    port = str(free_port())
    return [
        subprocess.Popen(
            [
                os.sys.executable,  # type: ignore[attr-defined]
                PRETRAIN,
                "--config",
                str(config),
                f"output={output}",
                "held_out.every=4000",
                "checkpoint.every=4000",
            ],
            cwd=ROOT,
            env=environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                **changes,
            ),
            stdout=subprocess.DEVNULL,
            stderr=open(output.parent / f"stderr_{rank}.txt", "w"),
            text=True,
        )
        for rank in range(2)
    ]


def wait_for_steps(output: Path, jobs: list[subprocess.Popen[str]], count: int = 3) -> None:
    deadline = time.monotonic() + 200
    while sum(row["kind"] == "step" for row in read_journal(output / "journal.jsonl")) < count:
        assert all(job.poll() is None for job in jobs), (output.parent / "stderr_0.txt").read_text()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.dist
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_a_stopped_rank(config_path: Path, tmp_path: Path, victim: int) -> None:
    output = tmp_path / "run"
    jobs = start_two(config_path, output)
    try:
        wait_for_steps(output, jobs)
        psutil.Process(jobs[victim].pid).suspend()
        began = time.monotonic()
        assert jobs[1 - victim].wait(120) == 75
        # A loaded machine may be slow to notice; asserting the 30 s of an idle one is for `make soak`.
        print(f"noticed after {time.monotonic() - began:.1f} s")
        assert jobs[victim].wait(10) == -signal.SIGKILL, "a launcher would wait for the stopped one"
    finally:
        for job in jobs:
            job.send_signal(signal.SIGKILL)
            job.wait()
    told = (tmp_path / f"stderr_{1 - victim}.txt").read_text()
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert f"rank {victim}" in line
    assert "has said nothing" in line
    assert "start the same command again to go on" in line
    stacks = (output / STACKS / f"rank_{1 - victim:05d}.txt").read_text()
    assert "train_step" in stacks


@pytest.mark.soak
@pytest.mark.dist
def test_a_rank_that_stands_still(config_path: Path, tmp_path: Path) -> None:
    output, hang = tmp_path / "run", tmp_path / "hang"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    jobs = start_two(config_path, output, PYTHONPATH=f"{tmp_path / 'site'}{os.pathsep}{ROOT}", HANG=str(hang))
    try:
        wait_for_steps(output, jobs)
        hang.touch()
        assert [job.wait(150) for job in jobs] == [75, 75]
    finally:
        for job in jobs:
            job.send_signal(signal.SIGKILL)
            job.wait()
    (line,) = [x for x in (tmp_path / "stderr_0.txt").read_text().splitlines() if x.startswith("error: ")]
    assert line.startswith("error: rank 1 on ")
    assert "in reading data" in line
    assert "rank 0" not in line
    assert all((output / STACKS / f"rank_{rank:05d}.txt").is_file() for rank in range(2))
    assert "slow" in (output / STACKS / "rank_00001.txt").read_text()


class TestWatchdog:
    def test_a_limit_follows_the_pace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [100.0]
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
        own = Watchdog()

        def after(seconds: float) -> float:
            now[0] += seconds
            return own.still()[0]

        assert after(1000) == 0, "the start has no limit"
        own.beat("computing")
        assert after(30) == 0
        own.beat("reading data")
        own.arm()
        assert after(119) == 0
        assert after(2) == 121, "four times the 30 s before"

        other = Watchdog()
        other.beat("computing")
        other.arm()
        with other.patient("saving"):
            now[0] += 5000
            assert other.still()[0] == 0
        other.beat("reading data")
        now[0] += 21
        assert other.still() == (21, "reading data"), "saving says nothing about the pace"

    def test_its_own_limit_holds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [0.0]
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
        own = Watchdog(limit_s=5)
        own.beat("computing")
        own.arm()
        now[0] += 6
        assert own.still() == (6, "computing")

    @pytest.mark.parametrize(
        ("still", "told"),
        [
            ({0: (25.0, EXCHANGE), 1: (26.0, "reading data"), 2: (24.0, EXCHANGE)}, ["rank 1", "reading data"]),
            ({0: (25.0, EXCHANGE), 1: (0.0, "saving"), 2: (24.0, EXCHANGE)}, []),
            ({0: (25.0, EXCHANGE), 1: (25.0, EXCHANGE), 2: (25.0, EXCHANGE)}, ["rank 0", "rank 1", "rank 2"]),
            ({0: (0.0, "computing"), 1: (0.0, EXCHANGE), 2: (0.0, EXCHANGE)}, []),
        ],
    )
    def test_who_waits_for_others_is_not_to_blame(self, still: dict[int, tuple[float, str]], told: list[str]) -> None:
        first = _First(Watchdog(), 3, None, "", threading.Event())
        first._still = still
        verdict = first._judge()
        assert all(words in verdict for words in told)
        assert verdict.count("rank ") == sum(words.startswith("rank ") for words in told)

    def test_silence_is_judged_of_those_who_have_spoken(self) -> None:
        first = _First(Watchdog(), 3, None, "", threading.Event())
        first._heard = {1: time.monotonic(), 2: time.monotonic() - LEAST_LIMIT_S}
        assert first._judge().startswith("rank 2 has said nothing for 20 s")

    def test_a_connection_that_ends_without_a_word_is_told_as_that(self) -> None:
        first = _First(Watchdog(), 3, None, "", threading.Event())
        first._gone = {2: time.monotonic() - 6}
        assert first._judge().startswith("rank 2 ended without a word 6 s ago")
        first._gone = {2: time.monotonic() - 4}
        assert first._judge() == "", "it may have said why it ends"


class TestProcessId:
    def test_only_the_same_process_of_this_machine_is_killed(self) -> None:
        job = subprocess.Popen(["sleep", "600"])
        told = {"machine": ProcessId.own().machine, "pid": job.pid}
        born = int(Path(f"/proc/{job.pid}/stat").read_text().rpartition(")")[2].split()[19])
        assert not ProcessId(**told, born=born - 1).kill(), "an earlier process had this number"
        assert not ProcessId(machine="another", pid=job.pid, born=born).kill()
        assert not ProcessId(machine="", pid=job.pid, born=born).kill()
        assert job.poll() is None
        assert ProcessId(**told, born=born).kill()
        assert job.wait(10) == -signal.SIGKILL
        assert not ProcessId(**told, born=born).kill()
