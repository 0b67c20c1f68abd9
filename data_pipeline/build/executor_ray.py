"""Tasks on a Ray cluster: the one that RAY_ADDRESS names, or one that is started on this machine for the build."""

from collections.abc import Generator, Iterable, Iterator
from typing import Any

from data_pipeline.build.executor import MAX_RETRIES, Work
from data_pipeline.build.task import Task, TaskResult, died
from mim_scale.errors import ClusterError
from mim_scale.ray_cluster import ray, ray_cluster

_AHEAD = 2
"""Tasks handed to Ray for each that can run: no core waits, and what is under way stays bounded."""
_MEMORY_SHARE = 0.9
"""Of a node's memory, for one task: a larger request would wait for ever."""


class RayExecutor:
    """One Ray task a source, one core each, with the memory it is expected to need.

    Args:
        workers: tasks at once; None takes every core of the cluster.
    """

    def __init__(self, workers: int | None) -> None:
        self._workers = workers

    def run(self, work: Work, tasks: Iterable[Task]) -> Generator[TaskResult]:
        """One result for each task, in the order in which they end."""
        with ray_cluster(self._workers):
            cores = int(ray.cluster_resources().get("CPU", 0))
            if cores < 1:
                raise ClusterError("the Ray cluster has no CPU: add a worker node, or build with --executor local")
            most_bytes = _MEMORY_SHARE * max(
                node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]
            )
            remote = ray.remote(work)
            window = min(self._workers or cores, cores) * _AHEAD
            running: dict[Any, Task] = {}
            try:
                for task in tasks:
                    if len(running) >= window:
                        yield from _next_results(running)
                    options = {
                        "num_cpus": 1,
                        "max_retries": MAX_RETRIES,
                        "memory": int(min(task.memory_bytes, most_bytes)),
                    }
                    running[remote.options(**options).remote(task)] = task
                while running:
                    yield from _next_results(running)
            finally:
                for reference in running:
                    ray.cancel(reference, force=True)


def _next_results(running: dict[Any, Task]) -> Iterator[TaskResult]:
    """Wait for at least one task to end."""
    done, _ = ray.wait(list(running), num_returns=1)
    for reference in done:
        task = running.pop(reference)
        try:
            result: TaskResult = ray.get(reference)
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError):
            result = died(task, f"its worker died {MAX_RETRIES + 1} times, for want of memory or in a decoder")
        except ray.exceptions.RayTaskError as error:
            # Ray wraps what the task raised; the build wants to see the error itself.
            raise error.cause from None
        yield result
