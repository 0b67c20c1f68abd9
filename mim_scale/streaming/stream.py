"""Batches in order from whichever transport the config names."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from mim_scale.config import DataConfig, PretrainConfig
from mim_scale.errors import StoreError
from mim_scale.store.dataset import RECORD, Dataset, read_record
from mim_scale.store.manifest import Row
from mim_scale.streaming.batch import Batch
from mim_scale.streaming.reader import Reader, SampleReader


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


def open_dataset(data: DataConfig) -> Dataset:
    """The dataset that a run samples from: the store, or what its pack says of the store.

    Raises:
        StoreError: there is none, or the pack is not of the store.
        DamagedError: its record or its manifest is damaged.
    """
    if data.pack is None:
        return Dataset.open(data.store)
    from mim_scale.streaming.pack import Pack

    packed = Pack.open(data.pack).dataset
    if (Path(data.store) / RECORD).is_file():
        # Where the store is at hand, the two must agree; a pack serves where it is not.
        stored = str(read_record(Path(data.store))["fingerprint"])
        if stored != packed.fingerprint:
            raise StoreError(
                f"{data.pack}: is a pack of the dataset {packed.fingerprint[:16]}, but data.store {data.store} holds "
                f"{stored[:16]}; pack again, or change one of them"
            )
    return packed


def refuse_short_pack(config: PretrainConfig, dataset: Dataset, positions: range, num_held_out: int) -> None:
    """See, before the first step, that the pack holds all that the run will ask for.

    Args:
        positions: Of training samples, to the run's last step.
        num_held_out: Held-out samples that are measured.

    Raises:
        StoreError: it does not, or it was made for another run.
    """
    if config.data.pack is None:
        return
    from mim_scale.streaming.pack import Pack, refuse_missing

    pack = Pack.open(config.data.pack)
    pack.refuse_other_run(config, dataset.fingerprint)
    refuse_missing(pack, positions, num_held_out)


def open_stream(config: PretrainConfig, dataset: Dataset, rows: Sequence[Row], held_out: bool = False) -> Stream:
    """The stream that config.data names, over these rows of the dataset from `open_dataset`.

    Raises:
        ConfigError: rows is empty.
        StoreError: the pack was made for another run.
        ClusterError: the Ray transport finds or starts no cluster.
    """
    reader = _reader(config, dataset, rows, held_out)
    match config.data.transport:
        case "threads":
            from mim_scale.streaming.stream_threads import ThreadStream

            return ThreadStream(reader, config.data.workers, config.data.read_ahead)
        case "ray":
            from mim_scale.streaming.stream_ray import RayStream

            return RayStream(reader, config.data.workers, config.data.read_ahead)


def _reader(config: PretrainConfig, dataset: Dataset, rows: Sequence[Row], held_out: bool) -> Reader:
    if config.data.pack is None:
        return SampleReader(dataset, rows, config.plan, config.seed, held_out)
    from mim_scale.streaming.pack import Pack, PackReader

    return PackReader(Pack.open(config.data.pack), dataset, rows, config, held_out)
