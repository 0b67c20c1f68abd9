"""Random integers as a pure function of (seed, purpose, index, sub): counter-based, the same on every machine.

Only the raw words of Philox are taken from numpy, whose value is fixed by the published algorithm; turning words into
integers and permutations is done here.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

WORD_LIMIT = 2**64
"""One more than the largest word."""


class Purpose(IntEnum):
    """What a stream of words is for. Numbers are part of the sampling contract: never change one, only add."""

    ORDER = 1
    CROP = 2
    MASK = 3
    CHILDREN = 4
    RATIO = 5
    VIEWS = 6
    AUGMENT = 7
    HELD_OUT_ORDER = 17
    HELD_OUT_CROP = 18
    HELD_OUT_MASK = 19
    HELD_OUT_CHILDREN = 20
    HELD_OUT_RATIO = 21
    HELD_OUT_VIEWS = 22
    HELD_OUT_AUGMENT = 23

    def held_out(self, is_held_out: bool) -> "Purpose":
        """The purpose's twin for held-out samples, which share no word with training."""
        return Purpose(self + 16) if is_held_out else self


def words(seed: int, purpose: Purpose, index: int, count: int, sub: int = 0) -> NDArray[np.uint64]:
    """`count` uniform 64-bit words, uint64 [count]. Two streams that differ in any argument but count share no counter.

    Args:
        seed: 0 to 2**64 - 1.
        index: Sample position or epoch, 0 to 2**64 - 1.
        sub: Part of the sample, such as a level, 0 to 2**64 - 1.
    """
    counter = np.array([0, index, sub, 0], dtype=np.uint64)
    key = np.array([seed, int(purpose)], dtype=np.uint64)
    return np.random.Philox(counter=counter, key=key).random_raw(count).astype(np.uint64, copy=False)


def below(word: int, limit: int) -> int:
    """A word turned into 0 to limit - 1, by multiply and shift; the bias is under limit / 2**64."""
    return (int(word) * limit) >> 64


def permutation(of_words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The order that sorts the words along the last axis, ties by place: a uniform permutation of 0 to n - 1."""
    return np.argsort(of_words, axis=-1, kind="stable")
