"""Words are a pure function of their name, and names never share words."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mim_scale.sampling.rng import Purpose, below, permutation, words

big = st.integers(0, 2**63 - 1)
names = st.tuples(big, st.sampled_from(Purpose), big, st.integers(0, 2**40))


@given(names, st.integers(0, 50), st.integers(0, 50))
def test_a_longer_stream_begins_with_the_shorter(name, short, more):
    seed, purpose, index, sub = name
    long = words(seed, purpose, index, short + more, sub)
    assert long.dtype == np.uint64
    np.testing.assert_array_equal(words(seed, purpose, index, short, sub), long[:short])


@given(names, names)
def test_streams_of_different_names_never_coincide(a, b):
    if a == b:
        return
    first, second = (words(seed, purpose, index, 8, sub) for seed, purpose, index, sub in (a, b))
    # 64 pairs of 64-bit words: a chance meeting has probability 2**-58.
    assert not set(first.tolist()) & set(second.tolist())


def test_neighbouring_names_share_no_word():
    streams = [
        words(seed, purpose, index, 16, sub)
        for seed in range(3)
        for purpose in Purpose
        for index in range(4)
        for sub in range(3)
    ]
    every = np.concatenate(streams)
    assert len(np.unique(every)) == len(every)


def test_held_out_purposes_are_their_own():
    training = [Purpose.ORDER, Purpose.CROP, Purpose.MASK, Purpose.CHILDREN]
    assert [purpose.held_out(False) for purpose in training] == training
    assert not {purpose.held_out(True) for purpose in training} & set(training)


def philox4x64(counter, key):
    """Philox-4x64-10 from its publication (Salmon et al. 2011), in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(b >> 64) ^ c[1] ^ k[0], b % 2**64, (a >> 64) ^ c[3] ^ k[1], a % 2**64]
        k = [(k[0] + 0x9E3779B97F4A7C15) % 2**64, (k[1] + 0xBB67AE8584CAA73B) % 2**64]
    return c


@given(names)
def test_words_are_the_published_philox(name):
    seed, purpose, index, sub = name
    expected = [word for block in (1, 2) for word in philox4x64([block, index, sub, 0], [seed, int(purpose)])]
    assert words(seed, purpose, index, 8, sub).tolist() == expected


@given(st.integers(0, 2**64 - 1), st.integers(1, 2**40))
def test_below_is_in_range_and_keeps_order(word, limit):
    assert 0 <= below(word, limit) < limit
    assert below(0, limit) == 0
    assert below(2**64 - 1, limit) == limit - 1
    assert below(word, limit) <= below(min(word + 2**24, 2**64 - 1), limit)


def test_below_is_even():
    counts = np.bincount([below(word, 7) for word in words(1, Purpose.CROP, 0, 14000).tolist()], minlength=7)
    assert len(counts) == 7
    assert abs(counts - 2000).max() < 200


@given(st.lists(st.integers(0, 5), max_size=40))
def test_permutation_is_stable(values):
    order = permutation(np.array(values, np.uint64))
    assert order.tolist() == sorted(range(len(values)), key=lambda place: values[place])
