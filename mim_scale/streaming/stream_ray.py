"""A stream from a pool of Ray actors: the same batches as from threads, read wherever the cluster has cores.

An actor that dies is started again and its requests are repeated: a batch is a function of its positions, so nothing is
lost.
"""

import os
import pickle
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from mim_scale.errors import ClusterError, MimScaleError
from mim_scale.ray_cluster import ray, ray_cluster
from mim_scale.streaming.batch import Batch
from mim_scale.streaming.reader import Reader

START_LIMIT_S = 120.0
"""How long the pool may take until its first actor and its last one answer."""
RETRIES = 3
"""How often one batch is asked for again after the death of its actor; a batch that kills each time is an error."""


class _Feeder:
    """What an actor runs: a copy of the reader, made in the first call so that its errors are answers, not deaths."""

    def __init__(self, packed: bytes) -> None:
        self._packed = packed
        self._reader: Reader | None = None

    def process(self) -> int:
        """The actor's process id, once it can read."""
        self._open()
        return os.getpid()

    def batch(self, positions: Sequence[int]) -> Batch:
        return self._open().batch(positions)

    def _open(self) -> Reader:
        if self._reader is None:
            self._reader = pickle.loads(self._packed)
        return self._reader


class RayStream:
    """Batches in order, read by `workers` actors of a core each, at most `read_ahead` begun before they are asked for.

    Joins the cluster of RAY_ADDRESS; without one, starts its own and ends it with the stream.

    Raises:
        ClusterError: no cluster, or one that has no room for the actors.
    """

    def __init__(self, reader: Reader, workers: int, read_ahead: int) -> None:
        self._read_ahead = read_ahead
        self._asked = 0
        self._closing = ExitStack()
        self._actors: list[Any] = []
        self._packed: Any = None
        try:
            self._closing.enter_context(ray_cluster(workers))
            self._start(reader, workers)
        except BaseException:
            self.close()
            raise

    def batches(self, schedule: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """As Stream.batches. Arrays are read-only views of the cluster's shared memory."""
        items = iter(schedule)
        ahead: deque[Any] = deque()
        try:
            while True:
                while len(ahead) <= self._read_ahead and (positions := next(items, None)) is not None:
                    ahead.append(self._ask(positions))
                if not ahead:
                    return
                yield _result(ahead.popleft())
        finally:
            for request in ahead:
                ray.cancel(request)

    def close(self) -> None:
        """End the actors, and the cluster where it is this stream's own."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        self._packed = None
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, reader: Reader, workers: int) -> None:
        feeder = ray.remote(_Feeder).options(
            num_cpus=1, max_restarts=-1, max_task_retries=RETRIES, scheduling_strategy="SPREAD"
        )
        # Kept as long as the actors: one that is started again needs it again.
        self._packed = ray.put(pickle.dumps(reader))
        self._actors = [feeder.remote(self._packed) for _ in range(workers)]
        ready = [actor.process.remote() for actor in self._actors]
        started, waiting = ray.wait(ready, num_returns=workers, timeout=START_LIMIT_S)
        if waiting:
            raise ClusterError(
                f"Ray started {len(started)} of {workers} stream workers in {START_LIMIT_S:.0f} s: each takes a core "
                f"and the cluster has {ray.cluster_resources().get('CPU', 0):.0f}, some taken; lower data.workers"
            )
        for reference in ready:
            _result(reference)

    def _ask(self, positions: Sequence[int]) -> Any:
        actor = self._actors[self._asked % len(self._actors)]
        self._asked += 1
        return actor.batch.remote(positions)


def _result(request: Any) -> Any:
    """The answer to a request, or the error that its actor met, as if it had been met here."""
    try:
        return ray.get(request)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, MimScaleError):
            raise cause from None
        raise
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())[:300]
        raise ClusterError(f"Ray lost a stream worker and could not replace it: {reason}") from None
