"""Tasks in, results out as they end. Two ways of doing it, one promise, one test for both.

A worker that dies is replaced and its task tried again; a task whose worker dies every time comes back as worker_died,
and the others are not touched. An exception that a task raises ends the build: tasks turn everything that is wrong with
an input into a result.
"""

from collections.abc import Callable, Generator, Iterable
from typing import Protocol

from data_pipeline.build.task import Task, TaskResult
from mim_scale.config import BuildConfig

Work = Callable[[Task], TaskResult]

MAX_RETRIES = 2
"""How often a task is started again after its worker died."""


class Executor(Protocol):
    """Runs tasks side by side."""

    def run(self, work: Work, tasks: Iterable[Task]) -> Generator[TaskResult]:
        """One result for each task, in the order in which they end; closing the iterator ends the workers."""
        ...


def make_executor(config: BuildConfig) -> Executor:
    """The executor that the config names."""
    match config.executor:
        case "local":
            from data_pipeline.build.executor_local import LocalExecutor

            return LocalExecutor(config.workers)
        case "ray":
            from data_pipeline.build.executor_ray import RayExecutor

            return RayExecutor(config.workers)
