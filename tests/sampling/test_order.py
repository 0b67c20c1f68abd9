"""Order: every epoch a permutation; ranks cut a step and nothing is lost, whatever their number."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mim_scale.errors import ConfigError
from mim_scale.sampling.order import micro_batches, volume_at
from tests.sampling.strategies import seeds


@given(seeds, st.integers(1, 60), st.integers(0, 2**40), st.booleans())
def test_every_epoch_is_a_permutation(seed, num_volumes, epoch, held_out):
    start = epoch * num_volumes
    order = [volume_at(position, num_volumes, seed, held_out) for position in range(start, start + num_volumes)]
    assert sorted(order) == list(range(num_volumes))


def first_epoch(seed, held_out=False):
    return [volume_at(position, 64, seed, held_out) for position in range(64)]


@given(seeds, seeds)
def test_seeds_differ_from_the_first_epoch_on(a, b):
    assert (first_epoch(a) == first_epoch(b)) == (a == b)


@given(seeds)
def test_epochs_and_sides_differ(seed):
    second = [volume_at(position, 64, seed) for position in range(64, 128)]
    assert first_epoch(seed) != second
    assert first_epoch(seed) != first_epoch(seed, held_out=True)


def test_order_does_not_depend_on_what_was_asked_before():
    straight = [volume_at(position, 10, 5) for position in range(100)]
    assert [volume_at(position, 10, 5) for position in reversed(range(100))] == straight[::-1]


@pytest.mark.parametrize("world", range(1, 17))
@given(micro_batch=st.integers(1, 4), rounds=st.integers(1, 3), step=st.integers(0, 10**9))
def test_ranks_one_after_another_are_the_global_order(world, micro_batch, rounds, step):
    batch = world * micro_batch * rounds
    shares = [micro_batches(step, batch, micro_batch, rank, world) for rank in range(world)]
    assert all(len(share) == rounds and all(len(part) == micro_batch for part in share) for share in shares)
    assert [p for share in shares for part in share for p in part] == list(range(step * batch, (step + 1) * batch))


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 16))
def test_a_world_that_does_not_divide_is_refused(batch, micro_batch, world):
    if batch % (world * micro_batch):
        with pytest.raises(ConfigError, match=f"train.batch {batch} is not a multiple of {world} ranks"):
            micro_batches(0, batch, micro_batch, 0, world)
    else:
        micro_batches(0, batch, micro_batch, 0, world)
