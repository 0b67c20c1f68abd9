"""Batches in order from whichever transport the config names."""

from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self

from mim_scale.config import PretrainConfig
from mim_scale.store.dataset import Dataset
from mim_scale.store.manifest import Row
from mim_scale.streaming.batch import Batch
from mim_scale.streaming.reader import SampleReader


class Stream(Protocol):
    """Reads ahead, a bounded number of batches, on workers of its own. Use it in a `with`."""

    def batches(self, schedule: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """One batch for each item of the schedule, which lists positions; in order. The schedule may be endless.

        Raises:
            MimScaleError: what a worker met, at the item it belongs to; batches before it have been given out.
        """
        ...

    def close(self) -> None:
        """End the workers. A second call does nothing."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_stream(config: PretrainConfig, dataset: Dataset, rows: Sequence[Row], held_out: bool = False) -> Stream:
    """The stream that config.data names, over these rows.

    Raises:
        ConfigError: rows is empty.
        ClusterError: the Ray transport finds or starts no cluster.
    """
    reader = SampleReader(dataset, rows, config.plan, config.seed, held_out)
    match config.data.transport:
        case "threads":
            from mim_scale.streaming.stream_threads import ThreadStream

            return ThreadStream(reader, config.data.workers, config.data.read_ahead)
        case "ray":
            from mim_scale.streaming.stream_ray import RayStream

            return RayStream(reader, config.data.workers, config.data.read_ahead)
