"""Processes and threads on a virtual clock: one runs at a time, and a seed decides which, so every run can be replayed.

Tasks are greenlets. They change hands where they wait: in `World.wait`, to which sleeping, joining, waiting for an
event, exchanges between ranks and every operation of the disk come down.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from greenlet import getcurrent, greenlet

TICK_S = 1e-4
"""What a turn takes."""
MOST_TURNS = 200_000


class Crash(BaseException):
    """The process is dead: nothing that it would do later is done."""


class StuckError(Exception):
    """Every task waits, and for nothing that will come."""


@dataclass(eq=False)
class Process:
    """What dies together."""

    name: str
    seat: Any = None
    """Where it belongs: a launch and a rank."""
    is_dead: bool = False
    is_frozen: bool = False
    at_death: list[Callable[[], None]] = field(default_factory=list)
    """What the kernel does for a dead process: it lets go of its locks."""


class Task:
    """A thread of a process."""

    def __init__(self, process: Process, work: Callable[[], Any], name: str, hub: greenlet) -> None:
        self.process, self.name, self.is_done = process, name, False
        self.error: BaseException | None = None
        self.ready: Callable[[], bool] = lambda: True
        self.until = math.inf
        self.greenlet = greenlet(lambda: self._run(work), hub)
        self.greenlet.task = self

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Crash:
            pass
        except BaseException as error:
            self.error = error
        self.is_done = True


class World:
    """The clock, the tasks, and what is to happen when."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now, self.wall_offset, self.turns = 0.0, 1.7e9, 0
        self._tasks: list[Task] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._at_turns: list[tuple[int, Callable[[], None]]] = []
        self._hub = getcurrent()

    def spawn(self, process: Process, work: Callable[[], Any], name: str) -> Task:
        """A new thread of a process."""
        task = Task(process, work, name, self._hub)
        self._tasks.append(task)
        return task

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Let something happen at a time."""
        self._events.append((self.now + seconds, len(self._events), action))

    def after_turns(self, turns: int, action: Callable[[], None]) -> None:
        """Let something happen after so many turns, wherever the tasks are then."""
        self._at_turns.append((self.turns + turns, action))

    @property
    def process(self) -> Process:
        """Of the task that runs."""
        process: Process = getcurrent().task.process
        return process

    def wait(self, ready: Callable[[], bool], seconds: float = math.inf) -> bool:
        """Let others run until `ready`, or for some time; returns whether it is."""
        task: Task = getcurrent().task
        if task.process.is_dead:
            raise Crash
        task.ready, task.until = ready, self.now + seconds
        self._hub.switch()
        if task.process.is_dead:
            raise Crash
        return ready()

    def pause(self) -> None:
        """Let others run, or not."""
        self.wait(lambda: True)

    def sleep(self, seconds: float) -> None:
        """Let others run for some time."""
        self.wait(lambda: False, seconds)

    def kill(self, process: Process) -> None:
        """SIGKILL; also where a process has ended."""
        if not process.is_dead:
            process.is_dead = True
            for action in process.at_death:
                action()

    def run(self, is_over: Callable[[], bool]) -> None:
        """Let the tasks take turns until all is over.

        Raises:
            StuckError: nothing can go on.
        """
        while True:
            self._happen()
            self._reap()
            if is_over():
                return
            able = [task for task in self._tasks if self._may_run(task)]
            if not able:
                self._skip_time()
                continue
            self.now += TICK_S
            self.turns += 1
            if self.turns > MOST_TURNS:
                raise StuckError(f"no end after {self.turns} turns: {self._told()}")
            able[self.random.randrange(len(able))].greenlet.switch()

    def end(self) -> None:
        """Forget all tasks and events, as between two launches."""
        for task in self._tasks:
            self.kill(task.process)
        self._reap()
        self._events, self._at_turns = [], []

    def _may_run(self, task: Task) -> bool:
        return not task.process.is_frozen and (self.now >= task.until or task.ready())

    def _happen(self) -> None:
        due = sorted(event for event in self._events if event[0] <= self.now)
        self._events = [event for event in self._events if event[0] > self.now]
        for _, _, action in due:
            action()
        for turn, action in [entry for entry in self._at_turns if entry[0] <= self.turns]:
            self._at_turns.remove((turn, action))
            action()

    def _reap(self) -> None:
        for task in self._tasks:
            if task.process.is_dead and not task.is_done:
                if task.greenlet:  # it has begun
                    # Its `finally` blocks run, and find that nothing they do has an effect.
                    task.greenlet.throw(Crash)
                task.is_done = True
        for task in self._tasks:
            if task.is_done and task.error is not None:
                error, task.error = task.error, None
                raise error
        self._tasks = [task for task in self._tasks if not task.is_done]

    def _skip_time(self) -> None:
        times = [task.until for task in self._tasks if not task.process.is_frozen] + [
            event[0] for event in self._events
        ]
        later = min(times, default=math.inf)
        if later == math.inf:
            raise StuckError(f"all wait: {self._told()}")
        self.now = max(self.now, later)

    def _told(self) -> str:
        return ", ".join(f"{task.process.name}/{task.name}" for task in self._tasks)


class Here:
    """The world that is being simulated; what stands in for modules asks it."""

    world: World
    simulation: Any


class VirtualTime:
    """Stands in for the module `time`."""

    @staticmethod
    def time() -> float:
        """Seconds on the wall, which may jump."""
        return Here.world.now + Here.world.wall_offset

    @staticmethod
    def monotonic() -> float:
        """Seconds that only grow."""
        Here.world.now += 1e-7
        return Here.world.now

    perf_counter = monotonic

    @staticmethod
    def sleep(seconds: float) -> None:
        """Let others run."""
        Here.world.sleep(seconds)


class VirtualEvent:
    """As `threading.Event`."""

    def __init__(self) -> None:
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True

    def clear(self) -> None:
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        return Here.world.wait(self.is_set, math.inf if timeout is None else timeout)


class VirtualThread:
    """As `threading.Thread`, of the process that starts it."""

    def __init__(
        self, target: Callable[..., Any], name: str = "", args: tuple[Any, ...] = (), daemon: bool = False
    ) -> None:
        self._work, self._name = lambda: target(*args), name
        self._task: Task | None = None

    def start(self) -> None:
        self._task = Here.world.spawn(Here.world.process, self._work, self._name)

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.is_done

    def join(self, timeout: float | None = None) -> None:
        Here.world.wait(lambda: not self.is_alive(), math.inf if timeout is None else timeout)


class VirtualThreading:
    """Stands in for the module `threading`."""

    Thread = VirtualThread
    Event = VirtualEvent
