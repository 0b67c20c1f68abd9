"""A stream from threads of this process: the plain twin and the default on one node."""

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

from mim_scale.streaming.batch import Batch
from mim_scale.streaming.reader import Reader

Item = TypeVar("Item")
Result = TypeVar("Result")


class ThreadStream:
    """Batches in order, read by `workers` threads, at most `read_ahead` of them begun before they are asked for.

    With no workers each is read when it is asked for, by whoever asks.
    """

    def __init__(self, reader: Reader, workers: int, read_ahead: int) -> None:
        self._reader = reader
        self._read_ahead = read_ahead
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="mim-stream") if workers else None

    def batches(self, schedule: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """As Stream.batches."""
        if self._pool is None:
            return (self._reader.batch(positions) for positions in schedule)
        return in_order(self._pool, self._reader.batch, schedule, self._read_ahead)

    def close(self) -> None:
        """End the threads; a read under way is awaited, one not begun is dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def in_order(
    pool: Executor, compute: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Generator[Result, None, None]:
    """compute(item) for each item, in order, at most `ahead` of them begun before they are asked for."""
    waiting = iter(items)
    begun: deque[Future[Result]] = deque()
    try:
        while True:
            for item in itertools.islice(waiting, ahead + 1 - len(begun)):
                begun.append(pool.submit(compute, item))
            if not begun:
                return
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()
