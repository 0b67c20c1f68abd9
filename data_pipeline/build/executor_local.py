"""Tasks on processes of this machine."""

import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from data_pipeline.build.executor import MAX_RETRIES, Work
from data_pipeline.build.task import Task, TaskResult, died

_MEMORY_SHARE = 0.7
"""Of the machine's memory, for tasks at once."""


class LocalExecutor:
    """A pool of processes; as many tasks at once as there are workers and memory for.

    Args:
        workers: processes; None takes one for each core this process may use.
    """

    def __init__(self, workers: int | None) -> None:
        self._workers = workers or len(os.sched_getaffinity(0))
        self._memory_bytes = int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * _MEMORY_SHARE)

    def run(self, work: Work, tasks: Iterable[Task]) -> Generator[TaskResult]:
        """One result for each task, in the order in which they end."""
        waiting = _Waiting(tasks)
        deaths: Counter[str] = Counter()
        alone: deque[Task] = deque()
        while waiting or alone:
            # Nobody can tell which task of a broken pool killed its worker: those that ran then run alone from now on.
            batch, workers = (_Waiting([alone.popleft()]), 1) if alone else (waiting, self._workers)
            suspects: list[Task] = []
            yield from self._run_pool(work, batch, workers, suspects)
            for task in suspects:
                deaths[task.key] += 1
                if deaths[task.key] > MAX_RETRIES:
                    yield died(task, f"its worker died {deaths[task.key]} times, for want of memory or in a decoder")
                else:
                    alone.append(task)

    def _run_pool(self, work: Work, waiting: "_Waiting", workers: int, suspects: list[Task]) -> Iterator[TaskResult]:
        """Run until nothing waits or the pool breaks; what ran when it broke is put into suspects."""
        # spawn: the parent has threads, and a forked copy of their locks can hang.
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_end_with_parent)
        running: dict[Future[TaskResult], Task] = {}
        try:
            while waiting or running:
                while waiting and len(running) < workers and self._fits(running.values(), waiting.first):
                    task = waiting.take()
                    running[pool.submit(work, task)] = task
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task = running.pop(future)
                    if isinstance(future.exception(), BrokenProcessPool):
                        suspects.append(task)
                    else:
                        yield future.result()
                if suspects:
                    suspects.extend(running.values())
                    return
        except BrokenProcessPool:
            # The pool broke between a result and the next submit: the popped task was never started.
            suspects.extend([*running.values(), task])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _fits(self, running: Iterable[Task], task: Task) -> bool:
        needed = [other.memory_bytes for other in running]
        return not needed or sum(needed) + task.memory_bytes <= self._memory_bytes


class _Waiting:
    """Tasks that wait, of which only the next one is in memory."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks = iter(tasks)
        self._next = next(self._tasks, None)

    def __bool__(self) -> bool:
        return self._next is not None

    @property
    def first(self) -> Task:
        """The next one, which stays."""
        assert self._next is not None
        return self._next

    def take(self) -> Task:
        """The next one, which goes."""
        task, self._next = self.first, next(self._tasks, None)
        return task


def _end_with_parent() -> None:
    """Workers of a killed build would wait for ever for tasks: each watches its parent."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
