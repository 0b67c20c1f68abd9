"""The scaling model: what must hold of it whatever the numbers, and a few that can be worked out by hand."""

import math
import random
import statistics
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mim_scale.estimate.scaling import (
    Cluster,
    Failures,
    Link,
    Pace,
    Work,
    all_reduce_s,
    best_interval_s,
    expected_largest,
    fit_link,
    ring_s,
    step_time,
    with_failures,
)

SECONDS = st.floats(1e-4, 100)
SMALL = st.floats(0, 1)
LINKS = st.builds(Link, st.floats(0, 1e-2), st.floats(1e6, 1e12))
PACES = st.builds(
    Pace,
    micro_batch_s=SECONDS,
    spread_s=SMALL,
    update_s=SMALL,
    read_s=SMALL,
    read_core_s=SMALL,
    is_on_cores=st.booleans(),
    crowding=SMALL,
    copy_s=SMALL,
    write_s=SECONDS,
    held_out_s=SECONDS,
)
WORKS = st.builds(
    Work,
    micro_batches=st.integers(1, 64),
    gradient_bytes=st.floats(0, 1e11),
    exchanges=st.floats(1, 100),
    messages=st.integers(0, 1000),
    readers=st.integers(0, 16),
    is_update_shared=st.booleans(),
    save_every=st.integers(1, 1000),
    held_out_every=st.integers(1, 1000),
    held_out_turns=st.integers(1, 64),
)


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    per_node = draw(st.integers(1, 16))
    nodes = draw(st.integers(1, 64))
    ranks = draw(st.integers(1, per_node)) if nodes == 1 else nodes * per_node
    return Cluster(ranks, per_node, draw(st.integers(1, 128)), draw(LINKS), draw(LINKS))


@settings(max_examples=50)
@given(PACES, WORKS, clusters())
def test_every_part_is_a_time_and_nobody_beats_a_rank_alone(pace: Pace, work: Work, cluster: Cluster) -> None:
    step = step_time(pace, work, cluster)
    assert all(part >= -1e-12 * step.total and math.isfinite(part) for part in vars(step).values())
    assert 0 < step.efficiency <= 1
    assert step.total == pytest.approx(sum(vars(step).values()))


@settings(max_examples=50)
@given(PACES, WORKS, clusters(), st.integers(2, 8))
def test_more_nodes_never_make_a_step_shorter(pace: Pace, work: Work, cluster: Cluster, times: int) -> None:
    """Of what ranks do not share: shared updates and saves get shorter as they should."""
    pace, work = replace(pace, copy_s=0, write_s=0, held_out_s=0), replace(work, is_update_shared=False)
    full = replace(cluster, ranks=cluster.nodes * cluster.ranks_per_node)
    more = replace(full, ranks=full.ranks * times)
    one, many = step_time(pace, work, full), step_time(pace, work, more)
    assert one.total <= many.total * (1 + 1e-12)
    assert many.efficiency <= one.efficiency * (1 + 1e-12)
    assert one.slowest <= many.slowest
    assert one.exchange <= many.exchange


@settings(max_examples=50)
@given(PACES, WORKS, clusters())
def test_more_ranks_on_a_node_never_make_a_step_shorter(pace: Pace, work: Work, cluster: Cluster) -> None:
    pace, work = replace(pace, copy_s=0, write_s=0, held_out_s=0), replace(work, is_update_shared=False)
    steps = [step_time(pace, work, replace(cluster, ranks=n)).total for n in range(1, cluster.ranks_per_node + 1)]
    assert all(fewer <= more * (1 + 1e-12) for fewer, more in pairwise(steps))


@settings(max_examples=50)
@given(PACES, WORKS)
def test_a_rank_alone_with_nothing_to_wait_for_is_all_efficiency(pace: Pace, work: Work) -> None:
    alone = replace(pace, read_s=0, read_core_s=0, update_s=0, copy_s=0, write_s=0, held_out_s=0)
    step = step_time(alone, work, Cluster(1, 8, 1, None, None))
    assert step.efficiency == 1
    assert step.total == pytest.approx(work.micro_batches * pace.micro_batch_s)


def test_limits_of_an_all_reduce() -> None:
    """Far beyond two members a ring moves each byte twice; latency grows with the members, bytes do not."""
    fast, slow = Link(1e-6, 100e9), Link(1e-5, 10e9)
    assert ring_s(1e9, 1, None) == 0
    assert ring_s(1e9, 2, fast) == pytest.approx(1e9 / 100e9, rel=1e-3)
    assert ring_s(1e12, 100_000, Link(0, 100e9)) == pytest.approx(2 * 1e12 / 100e9, rel=1e-4)
    assert ring_s(0, 513, fast) == pytest.approx(1024 * 1e-6)
    both = Cluster(64, 8, 64, fast, slow)
    assert all_reduce_s(1e9, both) == pytest.approx(ring_s(1e9, 8, fast) + ring_s(1e9, 8, slow))
    with pytest.raises(ValueError, match="no link"):
        all_reduce_s(1e9, replace(both, between=None))


def test_ranks_beyond_the_cores_take_turns() -> None:
    pace = Pace(micro_batch_s=1.0, spread_s=0.0, update_s=0.0)
    work = Work(2, 0, 1, 0, 2, False, 100, 100, 1)
    link = Link(0, 1e9)
    assert step_time(pace, work, Cluster(4, 4, 2, link, None)).total == pytest.approx(4.0)
    assert step_time(replace(pace, is_on_cores=False), work, Cluster(4, 4, 2, link, None)).total == pytest.approx(2.0)
    # Readers want cores too: two ranks of 1 s and 0.5 s of reading on two cores take 1.5 s.
    reading = replace(pace, read_s=0.5, read_core_s=0.5)
    assert step_time(reading, work, Cluster(2, 2, 2, link, None)).total == pytest.approx(3.0)
    assert step_time(replace(pace, read_s=6.0), work, Cluster(1, 1, 8, None, None)).reading == pytest.approx(4.0)
    assert step_time(reading, replace(work, readers=0), Cluster(1, 1, 8, None, None)).reading == pytest.approx(1.0)
    crowded = step_time(replace(pace, crowding=0.1), work, Cluster(2, 2, 2, link, None))
    assert crowded.sharing == pytest.approx(0.2)


@pytest.mark.parametrize("count", [1, 2, 4, 64])
def test_the_slowest_of_many_is_as_late_as_draws_say(count: int) -> None:
    draws = random.Random(count)
    means = [max(draws.gauss(10, 1) for _ in range(count)) for _ in range(2000)]
    assert expected_largest(10, 1, count) == pytest.approx(statistics.fmean(means), abs=0.06)


@settings(max_examples=50)
@given(st.floats(1e-7, 1e-2), st.floats(1e6, 1e11), st.integers(2, 64))
def test_a_link_is_found_again_in_its_own_times(latency: float, rate: float, members: int) -> None:
    sizes = [4.0, 1e4, 1e6, 1e8, 1e10]
    link = fit_link(sizes, [ring_s(size, members, Link(latency, rate)) for size in sizes], members)
    for size in sizes:
        assert ring_s(size, members, link) == pytest.approx(ring_s(size, members, Link(latency, rate)), rel=1e-3)


def test_noise_makes_no_link_that_takes_less_than_nothing() -> None:
    link = fit_link([1e3, 1e6], [2e-3, 1e-3], 2)
    assert link.latency_s > 0
    assert 0 < link.bytes_per_s < math.inf


def test_failures_lengthen_a_run_until_it_never_ends() -> None:
    cluster, work = Cluster(8, 8, 8, Link(0, 1e9), None), Work(1, 0, 1, 0, 1, False, 100, 100, 1)
    step = step_time(Pace(1.0, 0.0, 0.0), work, cluster)
    # 100 steps of a second between saves: 50 s of lost work and 50 of restart, every 1000 s.
    assert with_failures(900.0, step, work, cluster, Failures(1000.0, 50.0)) == pytest.approx(1000.0)
    assert with_failures(900.0, step, work, cluster, Failures(1e12, 50.0)) == pytest.approx(900.0)
    assert with_failures(900.0, step, work, cluster, Failures(100.0, 50.0)) == math.inf
    assert best_interval_s(0.5, cluster, Failures(3600.0, 50.0)) == pytest.approx(60.0)


@settings(max_examples=50)
@given(PACES, WORKS, clusters(), st.floats(1e3, 1e9), st.floats(1, 1e4))
def test_no_failure_is_a_gain(pace: Pace, work: Work, cluster: Cluster, between: float, restart: float) -> None:
    step = step_time(pace, work, cluster)
    often = with_failures(1e6, step, work, cluster, Failures(between, restart))
    seldom = with_failures(1e6, step, work, cluster, Failures(between * 2, restart))
    assert 1e6 <= seldom <= often
