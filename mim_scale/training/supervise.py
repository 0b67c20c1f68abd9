"""Runs a launch command, and again when it ended for a reason that starting again cures; leaves no process behind.

Between supervisor and command stands a keeper, a fork that ends whatever came of the command when the command ends or
the supervisor is gone; a keeper that was killed leaves its processes to the supervisor, which does the same.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from mim_scale.errors import EXIT_REQUEUE, ConfigError
from mim_scale.training.exit_report import FOLDER, ExitReport, read_reports
from mim_scale.training.journal import read_journal
from mim_scale.training.processes import adopt_orphans, descendants, end_descendants, is_stopped
from mim_scale.training.run_folder import JOURNAL
from mim_scale.training.stop import SIGNALS

POLL_S = 0.1
LONGEST_PAUSE_S = 60.0
LOOKS_APART = 10
"""Polls between two looks at whether ranks are stopped."""
STOPPED_S = 20.0
"""Longer than the watch over several ranks takes."""
TRACKING_S = 60.0
"""How long MLflow may take to hear of the end of a run."""
EXITS_THAT_STAND = (2, 3)
"""A user's mistake and damaged data: no restart mends them, whoever says so."""
EXITS_BY_SIGNAL = 128
"""Shells and launchers add the signal's number to this."""


@dataclass(frozen=True)
class Verdict:
    """What follows from the end of a launch: whether starting again may help, the code if it is not done, and why."""

    may_help: bool
    code: int
    why: str


def judge(code: int, reports: Sequence[ExitReport], is_known_good: bool) -> Verdict:
    """What the end of a launch means.

    Args:
        code: The launcher's exit code; above 128 when a signal killed it.
        reports: What its ranks told.
        is_known_good: Whether ranks came to life under this command before.
    """
    told = [report for report in reports if report.code is not None]
    stands = next((report for report in told if report.code not in (0, EXIT_REQUEUE)), None)
    # DeepSpeed's launcher answers 0 when a part of its own was killed, and is not 0 where it alone heard a signal.
    if (code == 0 or reports) and all(report.code == 0 for report in reports):
        return Verdict(False, 0, "done")
    if stands is not None:
        who = "a rank" if stands.rank < 0 else f"rank {stands.rank}"
        return Verdict(False, stands.code or 1, f"{who} ended with {stands.code}")
    if code in EXITS_THAT_STAND:
        return Verdict(False, code, f"it ended with {code}")
    if not reports:
        may_help = code > EXITS_BY_SIGNAL or is_known_good
        return Verdict(may_help, code, f"no rank began, the launcher ended with {code}: its own lines say why")
    killed = ", ".join(str(report.rank) for report in reports if report.code is None)
    if not killed:
        why = f"all ranks ended in order ({EXIT_REQUEUE}: start again)"
    else:
        why = f"rank {killed} ended without a word" if told or len(reports) == 1 else "no rank ended by itself"
    return Verdict(True, code or EXIT_REQUEUE, f"{why}, the launcher with {code}")


class Supervisor:
    """Starts a command until it is done, cannot be helped, or was asked to stop.

    Args:
        command: The launcher and its arguments. Its ranks run on this machine, or the launcher passes signals on.
        restarts: How many restarts are made without a new step in the run's journal.
        within_s: For how many seconds restarts are made without a new step; None for ever.
    """

    def __init__(self, command: Sequence[str], restarts: int, within_s: float | None) -> None:
        self._command, self._restarts = list(command), restarts
        self._within_s = float("inf") if within_s is None else within_s
        self._signals: list[int] = []
        self._output: str | None = None
        self._step, self._tries, self._failing_since = 0, 0, 0.0
        self._has_begun = False

    def run(self) -> int:
        """The code to end with: the run's own, or 75 when asked to stop.

        Raises:
            ConfigError: the folder that MIM_SCALE_EXIT names cannot be written.
        """
        adopt_orphans()
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: self._signals.append(number))
        while True:
            code, reports = self._launch()
            self._has_begun |= bool(reports)
            verdict = judge(code, reports, self._has_begun)
            if not verdict.may_help:
                if verdict.code:
                    _say(f"{verdict.why}; not started again")
                return self._tracked(verdict.code, reports)
            if not self._signals and not self._may_try_again(verdict):
                return self._tracked(verdict.code, reports)
            if self._signals:
                _say(f"asked to stop by {signal.Signals(self._signals[0]).name}: the same command goes on")
                return self._tracked(EXIT_REQUEUE, reports)

    def _launch(self) -> tuple[int, list[ExitReport]]:
        """Run the command once, to the end of all that came of it."""
        try:
            folder = Path(tempfile.mkdtemp(prefix="mim-scale-exit-", dir=os.environ.get(FOLDER)))
        except OSError as error:
            raise ConfigError(f"{FOLDER}={os.environ.get(FOLDER)}: {error.strerror}; name a folder") from None
        alive, ours = os.pipe()
        keeper = os.fork()
        if keeper == 0:
            os.close(ours)
            _keep(self._command, {**os.environ, FOLDER: str(folder)}, alive, folder)
        os.close(alive)
        try:
            sent: set[tuple[int, int]] = set()
            looks: dict[int, int] = {}
            while not (ended := os.waitpid(keeper, os.WNOHANG))[0]:
                self._pass_on(keeper, folder, sent)
                _kill_stopped(keeper, folder, looks)
                time.sleep(POLL_S)
            end_descendants()
            reports = read_reports(folder)
        finally:
            os.close(ours)
            shutil.rmtree(folder, ignore_errors=True)
        self._output = next((report.output for report in reports if report.output), self._output)
        return _positive(os.waitstatus_to_exitcode(ended[1])), reports

    def _tracked(self, code: int, reports: Sequence[ExitReport]) -> int:
        """The code, once MLflow was told how the run ended, where rank 0 ended without a word."""
        if self._output is not None and any(report.rank == 0 and report.code is None for report in reports):
            status = "KILLED" if self._signals else "FAILED"
            command = [sys.executable, "-m", "mim_scale.training.tracking_end", self._output, status]
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(command, timeout=TRACKING_S, check=False)
        return code

    def _pass_on(self, keeper: int, folder: Path, sent: set[tuple[int, int]]) -> None:
        """Give the ranks every signal that came, once; a launcher gets it only where no rank of it lives here."""
        if not self._signals:
            return
        family = descendants(keeper)
        ranks = [report.pid for report in read_reports(folder) if report.pid in family]
        for number, signum in enumerate(list(self._signals)):
            for pid in ranks or family[:1]:
                if (number, pid) not in sent:
                    sent.add((number, pid))
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signum)

    def _may_try_again(self, verdict: Verdict) -> bool:
        """Wait before the next start, or until a stop is asked for; False when there were too many without a step."""
        step = _last_step(self._output)
        if step > self._step or self._tries == 0:
            self._step, self._tries, self._failing_since = max(step, self._step), 0, time.monotonic()
        failing_s = time.monotonic() - self._failing_since
        if self._tries >= self._restarts or failing_s > self._within_s:
            _say(
                f"{verdict.why}; not started again (restarts without a step after {self._step}: {self._tries}, in "
                f"{failing_s:.0f} s): look at the lines above, mend that, start again"
            )
            return False
        pause_s = min(2.0**self._tries, LONGEST_PAUSE_S)
        self._tries += 1
        _say(
            f"{verdict.why}; starting again in {pause_s:.0f} s "
            f"(restart {self._tries} of {self._restarts} without a step after {self._step})"
        )
        until = time.monotonic() + pause_s
        while time.monotonic() < until and not self._signals:
            time.sleep(POLL_S)
        return True


def _kill_stopped(keeper: int, folder: Path, looks: dict[int, int]) -> None:
    """Kill ranks that stay stopped: the watch of several ranks is quicker, but one rank has nobody to miss it.

    Looks are counted, not seconds: where a scheduler stops all, the supervisor counts none meanwhile.
    """
    looks[-1] = looks.get(-1, 0) + 1
    if looks[-1] % LOOKS_APART:
        return
    family = descendants(keeper)
    for report in read_reports(folder):
        stopped = report.pid in family and is_stopped(report.pid)
        looks[report.pid] = looks.get(report.pid, 0) + 1 if stopped else 0
        if looks[report.pid] * LOOKS_APART * POLL_S > STOPPED_S:
            _say(f"rank {report.rank} was stopped (SIGSTOP) and has not gone on for {STOPPED_S:.0f} s: it is killed")
            with contextlib.suppress(ProcessLookupError):
                os.kill(report.pid, signal.SIGKILL)


def _keep(command: list[str], environment: dict[str, str], alive: int, folder: Path) -> NoReturn:
    """The keeper: run the command in a session of its own, end all that came of it, and end with its code."""
    code = 1
    try:
        # The supervisor decides what becomes of a signal; ignored ones would be ignored by the command too.
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: None)
        os.setsid()
        adopt_orphans()
        launcher = subprocess.Popen(command, env=environment, start_new_session=True)
        watched = select.poll()
        watched.register(os.pidfd_open(launcher.pid), select.POLLIN)
        watched.register(alive, select.POLLIN)
        has_supervisor = alive not in [descriptor for descriptor, _ in watched.poll()]
        if has_supervisor:
            code = _positive(launcher.wait())
        end_descendants()
        if not has_supervisor:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        print(f"error: {command[0]}: cannot be started ({error.strerror})", file=sys.stderr, flush=True)
        code = 2
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _last_step(output: str | None) -> int:
    """The last step in the journal of a run folder; 0 where there is none to be read here."""
    if output is None:
        return 0
    return max((int(row["step"]) for row in read_journal(Path(output) / JOURNAL) if row["kind"] == "step"), default=0)


def _positive(code: int) -> int:
    return code if code >= 0 else EXITS_BY_SIGNAL - code


def _say(line: str) -> None:
    print(f"supervisor: {line}", file=sys.stderr, flush=True)
