"""Which volume stands at a position, and which positions a rank takes: functions of integers, with no history.

Position p is in epoch p // N; every epoch is its own permutation of the N volumes.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mim_scale.errors import ConfigError
from mim_scale.sampling.rng import Purpose, permutation, words


def volume_at(position: int, num_volumes: int, seed: int, held_out: bool = False) -> int:
    """Index, in key order, of the volume at a position of the endless sequence of samples."""
    epoch, place = divmod(position, num_volumes)
    return int(_epoch_order(seed, epoch, num_volumes, held_out)[place])


@lru_cache(maxsize=4)  # neighbouring epochs, of training and of held-out samples
def _epoch_order(seed: int, epoch: int, num_volumes: int, held_out: bool) -> NDArray[np.int64]:
    return permutation(words(seed, Purpose.ORDER.held_out(held_out), epoch, num_volumes))


def micro_batches(step: int, batch: int, micro_batch: int, rank: int, world: int) -> list[range]:
    """The positions that a rank takes in one step, cut into micro-batches.

    Ranks take neighbouring blocks: all ranks' positions one after another are step * batch to (step + 1) * batch - 1.

    Args:
        step: Optimizer step, counted from 0.
        batch: Samples of one step over all ranks.
        micro_batch: Samples that a rank holds at once.

    Raises:
        ConfigError: world * micro_batch does not divide batch.
    """
    if batch % (world * micro_batch):
        raise ConfigError(
            f"train.batch {batch} is not a multiple of {world} ranks x train.micro_batch {micro_batch}: "
            f"take a batch that is a multiple of {world * micro_batch}, or another number of ranks"
        )
    share = batch // world
    first = step * batch + rank * share
    return [range(start, start + micro_batch) for start in range(first, first + share, micro_batch)]
