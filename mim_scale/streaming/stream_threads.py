"""A stream from threads of this process: the plain twin and the default on one node."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from mim_scale.streaming.batch import Batch
from mim_scale.streaming.reader import SampleReader


class ThreadStream:
    """Batches in order, read by `workers` threads, at most `read_ahead` of them begun before they are asked for."""

    def __init__(self, reader: SampleReader, workers: int, read_ahead: int) -> None:
        self._reader = reader
        self._read_ahead = read_ahead
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="mim-stream")

    def batches(self, schedule: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """As Stream.batches."""
        items = iter(schedule)
        ahead: deque[Future[Batch]] = deque()
        try:
            while True:
                for positions in _take(items, self._read_ahead + 1 - len(ahead)):
                    ahead.append(self._pool.submit(self._reader.batch, positions))
                if not ahead:
                    return
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def close(self) -> None:
        """End the threads; a read under way is awaited, one not begun is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _take(items: Iterator[Sequence[int]], count: int) -> Iterator[Sequence[int]]:
    for _ in range(count):
        try:
            yield next(items)
        except StopIteration:
            return
