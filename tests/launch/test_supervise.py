"""The supervisor: what is started again and what is not, who hears a signal, and that nothing is left behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from mim_scale.training import supervise
from mim_scale.training.exit_report import FOLDER, ExitReport, read_reports, tell_supervisor
from mim_scale.training.supervise import judge
from tests.launch.runs import SUPERVISE, ended, family, gone, supervised

STAND_INS = str(Path(__file__).with_name("stand_ins.py"))
LIMIT_S = 60


def stand_ins(folder: Path, *plans: str) -> tuple[str, ...]:
    return (sys.executable, STAND_INS, "launch", str(folder), *plans)


def until(happened: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while not (found := happened()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def starts(folder: Path) -> int:
    return len(list(folder.glob("start_*")))


def ranks_of(folder: Path, alive: int = 2) -> list[psutil.Process]:
    """The stand-ins that live, once so many do."""
    until(lambda: len(list(folder.glob("alive_*"))) >= alive)
    found = []
    for path in folder.glob("alive_*"):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(int(path.name.removeprefix("alive_"))))
    return found


KILLED, LOST, DONE = ExitReport(7, 1), ExitReport(8, 0, "run", 75), ExitReport(9, 0, "run", 0)


@pytest.mark.parametrize(
    ("code", "reports", "is_known_good", "may_help", "ends_with"),
    [
        (0, [DONE], False, False, 0),
        (0, [], False, False, 0),
        (143, [DONE, DONE], False, False, 0),
        (0, [LOST, DONE], False, True, 75),
        (0, [KILLED], False, True, 75),
        (247, [LOST, KILLED], False, True, 247),
        (1, [LOST, KILLED], False, True, 1),
        (137, [KILLED], False, True, 137),
        (1, [LOST], False, True, 1),
        (75, [LOST], False, True, 75),
        (1, [DONE, KILLED], False, True, 1),
        (1, [ExitReport(3, 0, None, 2), KILLED], False, False, 2),
        (247, [LOST, ExitReport(3, 1, "run", 3)], False, False, 3),
        (1, [ExitReport(3, 0, "run", 1), LOST], False, False, 1),
        (130, [ExitReport(3, 0, "run", 130)], False, False, 130),
        (2, [], False, False, 2),
        (2, [KILLED], True, False, 2),
        (1, [], False, False, 1),
        (1, [], True, True, 1),
        (137, [], False, True, 137),
    ],
)
def test_what_may_help(
    code: int, reports: list[ExitReport], is_known_good: bool, may_help: bool, ends_with: int
) -> None:
    verdict = judge(code, reports, is_known_good)
    assert (verdict.may_help, verdict.code) == (may_help, ends_with)
    assert verdict.why


def test_what_a_killed_rank_told_is_read(tmp_path: Path) -> None:
    told = {FOLDER: str(tmp_path)}
    tell_supervisor(told, rank=3)
    tell_supervisor(told, output="/run")
    with open(tmp_path / f"{os.getpid()}.jsonl", "a") as file:
        file.write('{"code": 7')
    assert read_reports(tmp_path) == [ExitReport(os.getpid(), 3, "/run")]
    tell_supervisor({}, rank=3)
    tell_supervisor({FOLDER: str(tmp_path / "gone")}, rank=3)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_lost_rank_is_made_good_and_a_mistake_is_not(tmp_path: Path) -> None:
    with supervised(*stand_ins(tmp_path, "75,kill", "2,2", "0,0")) as job:
        code, lines = ended(job)
    assert (code, starts(tmp_path)) == (2, 2)
    assert "rank 1 ended without a word, the launcher with 247; starting again in 1 s (restart 1 of 5" in lines[0]
    assert lines[1:] == ["supervisor: rank 0 ended with 2; not started again"]


def test_a_launcher_that_cannot_be_started_is_a_mistake(tmp_path: Path) -> None:
    with supervised("/no/such/launcher") as job:
        code, lines = ended(job)
    assert code == 2
    assert lines[0] == "error: /no/such/launcher: cannot be started (No such file or directory)"


def test_without_progress_restarts_end(tmp_path: Path) -> None:
    with supervised(*stand_ins(tmp_path, "kill,kill"), options=("--restarts", "1")) as job:
        code, lines = ended(job)
    assert (code, starts(tmp_path)) == (247, 2)
    assert "not started again (restarts without a step after 0: 1, in " in lines[-1]


def test_a_step_makes_restarts_count_from_nothing(tmp_path: Path) -> None:
    plans = ("step,75", "step,75", "step,75", "0,0")
    with supervised(*stand_ins(tmp_path, *plans), options=("--restarts", "1", "--within", "30")) as job:
        code, lines = ended(job)
    assert (code, starts(tmp_path)) == (0, 4)
    assert [line.split("after ")[1] for line in lines] == ["1)", "2)", "3)"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_reaches_the_ranks_and_ends_with_75(tmp_path: Path, number: signal.Signals) -> None:
    with supervised(*stand_ins(tmp_path, "wait,wait")) as job:
        ranks_of(tmp_path)
        job.send_signal(number)
        code, lines = ended(job)
    assert (code, starts(tmp_path)) == (75, 1)
    assert lines == [f"supervisor: asked to stop by {number.name}: the same command goes on"]
    assert len(list(tmp_path.glob(f"asked_*_{number.name}"))) == 2


def test_a_signal_in_the_pause_is_heard(tmp_path: Path) -> None:
    with supervised(*stand_ins(tmp_path, "kill,kill")) as job:
        assert job.stderr is not None
        job.stderr.readline()
        job.terminate()
        assert ended(job)[0] == 75
    assert starts(tmp_path) == 1


def test_a_launcher_whose_ranks_live_elsewhere_is_given_the_signal(tmp_path: Path) -> None:
    """As srun is, which passes it on."""
    code = "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); print(1); time.sleep(60)"
    with supervised(sys.executable, "-c", code) as job:
        until(lambda: len(family(job)) == 2)
        time.sleep(0.5)
        job.send_signal(signal.SIGUSR1)
        assert ended(job)[0] == 75


def test_a_killed_launcher_leaves_no_orphan_and_is_started_again(tmp_path: Path) -> None:
    with supervised(*stand_ins(tmp_path, "wait,wait", "0,0")) as job:
        ranks = ranks_of(tmp_path)
        ranks[0].parent().kill()
        code, lines = ended(job)
        assert gone(ranks, within_s=0.1)
    assert (code, starts(tmp_path)) == (0, 2)
    assert "no rank ended by itself, the launcher with 137; starting again" in lines[0]


def test_a_rank_that_stays_stopped_is_killed(tmp_path: Path) -> None:
    """One rank has no other that could miss it. Looks count, not seconds, so none passes here."""
    looks: dict[int, int] = {}
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as rank:
        (tmp_path / "1.jsonl").write_text(json.dumps({"pid": rank.pid, "rank": 0}) + "\n")
        for signum, polls in (
            (signal.SIGCONT, 300),
            (signal.SIGSTOP, 150),
            (signal.SIGCONT, 150),
            (signal.SIGSTOP, 250),
        ):
            assert rank.poll() is None, "killed without need"
            rank.send_signal(signum)
            is_stopped = signum == signal.SIGSTOP
            until(lambda stopped=is_stopped: (psutil.Process(rank.pid).status() == psutil.STATUS_STOPPED) == stopped)
            for _ in range(polls):
                supervise._kill_stopped(os.getpid(), tmp_path, looks)
        assert rank.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("who", ["supervisor", "keeper"])
def test_a_killed_supervisor_leaves_nothing_behind(tmp_path: Path, who: str) -> None:
    """Nor does the process between it and the launcher; that one is replaced."""
    with supervised(*stand_ins(tmp_path, "wait,wait", "0,0")) as job:
        ranks = ranks_of(tmp_path)
        everyone = family(job)
        assert len(everyone) == 4
        (job if who == "supervisor" else psutil.Process(job.pid).children()[0]).kill()
        assert gone(everyone)
        assert set(ranks) <= set(everyone)
        code, _ = ended(job)
    assert (code, starts(tmp_path)) == ((-signal.SIGKILL, 1) if who == "supervisor" else (0, 2))


def test_no_command_is_told_in_one_line() -> None:
    job = subprocess.run(SUPERVISE, capture_output=True, text=True, check=False)
    assert job.returncode == 2
    assert job.stderr.startswith("error: no command to run: put it after --")
