"""Other numbers of ranks and workers in mid-epoch: what follows are the samples that would have followed anyway."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice

import numpy as np
import pytest
import torch

from mim_scale.config import PretrainConfig
from mim_scale.config_file import check_config, config_values
from mim_scale.store.dataset import Dataset
from mim_scale.streaming.batch import Batch, Sample, collate
from mim_scale.streaming.reader import SampleReader
from mim_scale.streaming.stream_threads import ThreadStream
from mim_scale.training.loop import _schedule
from mim_scale.training.ranks import Ranks
from tests.faults.faulty_disk import still_disk
from tests.synthetic import make_dataset
from tests.training.standin import small_config

COUNT = 300
VOLUMES = 41
"""A prime above every batch: no step ends where an epoch does."""
STEPS = 2


@dataclass(frozen=True)
class Change:
    """(ranks, workers) of the first step, and of the second."""

    before: tuple[int, int]
    then: tuple[int, int]
    batch: int
    micro_batch: int


def changes() -> Iterator[Change]:
    """Different ones, drawn; batches that both numbers of ranks divide."""
    shots, drawn = random.Random(0), set[Change]()
    while len(drawn) < COUNT:
        before, then = ((shots.randint(1, 8), shots.randint(0, 8)) for _ in range(2))
        micro_batch = shots.choice([1, 1, 1, 2])
        batch = math.lcm(before[0], then[0]) * micro_batch
        change = Change(before, then, batch, micro_batch)
        if before != then and batch < VOLUMES and change not in drawn:
            drawn.add(change)
            yield change


CHANGES = list(changes())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    still = still_disk()
    try:
        return make_dataset(tmp_path_factory.mktemp("worlds") / "store", [(12, 10, 9)] * VOLUMES)
    finally:
        still.undo()


def config_of(dataset: Dataset, change: Change) -> PretrainConfig:
    values = config_values(small_config(str(dataset.path), batch=change.batch))
    values["train"] |= {"micro_batch": change.micro_batch, "steps": STEPS}
    values["optimizer"]["warmup_steps"] = 0
    values["plan"] |= {"box": [8, 8, 8], "view": [8, 8, 8], "token": [4, 4, 4]}
    values["plan"]["levels"][1]["views"] = values["plan"]["levels"][2]["views"] = 1
    return check_config(PretrainConfig, values, "worlds")


@pytest.fixture(scope="module")
def reader(dataset: Dataset) -> SampleReader:
    """One for all ranks, so that it opens every volume once."""
    config = config_of(dataset, CHANGES[0])
    return SampleReader(dataset, dataset.rows, config.plan, config.seed)


@pytest.fixture(scope="module")
def alone(reader: SampleReader) -> Callable[[int], Sample]:
    """Position after position, with no rank, worker or stream."""
    return cache(reader.sample)


def life(reader: SampleReader, config: PretrainConfig, place: tuple[int, int], steps: range) -> list[list[Batch]]:
    """What each rank takes in these steps; its schedule is all that is left of the run."""
    world, workers = place
    taken = []
    for rank in range(world):
        ranks = Ranks(rank, world, rank, torch.device("cpu"))
        count = len(steps) * config.train.batch // config.train.micro_batch // world
        with ThreadStream(reader, workers, read_ahead=1) as stream:
            taken.append(list(islice(stream.batches(_schedule(config, ranks, steps.start)), count)))
    return taken


def global_batches(shares: list[list[Batch]], num_steps: int) -> Iterator[list[Batch]]:
    """The micro-batches of each step, one rank's after the other's."""
    rounds = len(shares[0]) // num_steps
    for step in range(num_steps):
        yield [batch for share in shares for batch in share[step * rounds : (step + 1) * rounds]]


def test_every_number_of_ranks_and_workers_is_there() -> None:
    places = {place for change in CHANGES for place in (change.before, change.then)}
    assert {world for world, _ in places} == set(range(1, 9))
    assert {workers for _, workers in places} == set(range(9))
    assert all(change.batch % VOLUMES for change in CHANGES)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_changed_in_mid_epoch(
    dataset: Dataset, reader: SampleReader, alone: Callable[[int], Sample], change: Change
) -> None:
    config = config_of(dataset, change)
    found: list[list[Batch]] = []
    for place, steps in ((change.before, range(1)), (change.then, range(1, STEPS))):
        found += global_batches(life(reader, config, place, steps), len(steps))
    assert [batch.positions.tolist() for step in found for batch in step] == [
        list(range(first, first + change.micro_batch)) for first in range(0, STEPS * change.batch, change.micro_batch)
    ]
    for step, batches in enumerate(found):
        expected = collate([alone(p) for p in range(step * change.batch, (step + 1) * change.batch)])
        assert sum((batch.keys for batch in batches), ()) == expected.keys
        assert np.array_equal(np.concatenate([batch.blocks for batch in batches]), expected.blocks)
        for level, other in enumerate(expected.levels):
            parts = [batch.levels[level] for batch in batches]
            assert sum((part.num_visible for part in parts), ()) == other.num_visible
            assert all(np.array_equal(part.parent, other.parent) for part in parts)
            for name in ("starts", "cell", "tokens", "draws"):
                assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(other, name))
