"""Starts of a run that can be killed: forked from a process that has torch imported already, or through launchers."""

import contextlib
import importlib
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, Protocol

import psutil
import torch

from mim_scale.config import PretrainConfig
from mim_scale.training.loop import pretrain
from tests.launch.runs import gone
from tests.launch.told import ORDER, PIPE, tell
from tests.training.jobs import ROOT, deepspeed, environment, torchrun

TOLD = str(Path(__file__).with_name("told.py"))
LIMIT_S = 300


class Start(Protocol):
    """One start of a run."""

    log: Path
    code: int | None
    """Once it has ended; negative where a signal ended it."""

    def is_alive(self) -> bool:
        """Whether it goes on."""
        ...

    def strike(self, pids: Sequence[int], shots: random.Random) -> None:
        """Kill it, or one of its ranks, whose processes are `pids`; then it ends by itself."""
        ...

    def end(self) -> None:
        """See that nothing of it is left."""
        ...


class Forked:
    """An action in a fork of this process, which must have no threads.

    Args:
        action: What the fork does; returns its code.
        log: For its lines.
    """

    def __init__(self, action: Callable[[], int], log: Path) -> None:
        self.log, self.code = log, None
        sys.stdout.flush()
        self._pid = os.fork()
        if self._pid == 0:
            _act(action, log)

    @staticmethod
    def prepare() -> None:
        """Import what a run imports late, so that forks need not; no thread is started."""
        # Deterministic algorithms bring torch's compiler in.
        torch.use_deterministic_algorithms(True)
        torch.use_deterministic_algorithms(False)
        importlib.import_module("mim_scale.training.pictures")
        importlib.import_module("matplotlib.backends.backend_agg")
        importlib.import_module("mim_scale.streaming.stream_threads")
        names = {Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")}
        # pyarrow's allocator has a thread, and sees to forks itself.
        assert len(names - {"jemalloc_bg_thd"}) == 1, f"a fork would lack threads that imports started: {names}"

    @classmethod
    def training(cls, config: PretrainConfig, log: Path, pipe: Path | None, order: Path) -> "Forked":
        """A run of one rank."""

        def action() -> int:
            tell(pipe, order)
            return pretrain(config)

        return cls(action, log)

    def is_alive(self) -> bool:
        """As Start's."""
        if self.code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is None

    def strike(self, pids: Sequence[int], shots: random.Random) -> None:
        """As Start's."""
        os.kill(self._pid, signal.SIGKILL)

    def end(self) -> None:
        """As Start's."""
        if self.is_alive():
            os.kill(self._pid, signal.SIGKILL)
            self.code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def _act(action: Callable[[], int], log: Path) -> NoReturn:
    code = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(file, descriptor)
        code = action()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Launched:
    """A run of two ranks through torchrun or DeepSpeed's launcher, whichever is drawn."""

    def __init__(self, config: Path, log: Path, pipe: Path | None, order: Path, shots: random.Random) -> None:
        self.log, self.code = log, None
        told = {ORDER: str(order), **({} if pipe is None else {PIPE: str(pipe)})}
        with open(log, "ab") as file:
            self._job = subprocess.Popen(
                [*shots.choice([torchrun, deepspeed])(2), TOLD, "--config", str(config)],
                cwd=ROOT,
                env=environment(PYTHONPATH=str(ROOT), **told),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._family: list[psutil.Process] = []

    def is_alive(self) -> bool:
        """As Start's."""
        self.code = self._job.poll()
        return self.code is None

    def strike(self, pids: Sequence[int], shots: random.Random) -> None:
        """One rank, whose end must end the other and the launcher; or all at once, as when the power goes."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._family = psutil.Process(self._job.pid).children(recursive=True)
        victims = (
            [shots.choice(list(pids))] if shots.random() < 0.5 else [self._job.pid, *(p.pid for p in self._family)]
        )
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        """As Start's."""
        is_orphaned = not self.is_alive() and not gone(self._family, within_s=30)
        with contextlib.suppress(psutil.NoSuchProcess):
            self._family += psutil.Process(self._job.pid).children(recursive=True)
        for process in self._family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._job.kill()
        self.code = self._job.wait()
        assert not is_orphaned, "a rank outlived the launcher"


def finished(start: Start) -> None:
    """Wait for a start that ends well."""
    deadline = time.monotonic() + LIMIT_S
    try:
        while start.is_alive():
            assert time.monotonic() < deadline, "it does not end"
            time.sleep(0.005)
        assert start.code == 0, f"ended with {start.code}: {start.log.read_text()[-1000:]}"
    finally:
        start.end()
