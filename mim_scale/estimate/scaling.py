"""How long a step and a run take on a cluster, by what was measured of one rank and of the link: functions of numbers.

All ranks begin each micro-batch together, so the slowest sets the pace; then gradients are exchanged and weights
updated. Nothing is taken to overlap: exchanges wait for the last gradient, saves and measurements stop the step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Link:
    """What carries exchanges: between the ranks of a node, or between nodes."""

    latency_s: float
    """Of one message."""
    bytes_per_s: float
    """Of a rank within its node; of all ranks of a node together between nodes."""


@dataclass(frozen=True)
class Cluster:
    """Ranks on equal nodes, all of them full, or one that is not."""

    ranks: int
    ranks_per_node: int
    cores: int
    """Of a node."""
    within: Link | None
    """None where no node has two ranks."""
    between: Link | None
    """None where there is one node."""

    @property
    def nodes(self) -> int:
        """How many of them have ranks."""
        return math.ceil(self.ranks / self.ranks_per_node)

    @property
    def on_a_node(self) -> int:
        """Ranks side by side on a node."""
        return min(self.ranks, self.ranks_per_node)


@dataclass(frozen=True)
class Pace:
    """Of one rank, as measured: seconds of a micro-batch and of what else a run does."""

    micro_batch_s: float
    """Alone on its node: median."""
    spread_s: float
    """Standard deviation of that."""
    update_s: float
    """Of all weights."""
    read_s: float = 0.0
    """Of a micro-batch's samples, by one thread."""
    read_core_s: float = 0.0
    """Core time of the same."""
    is_on_cores: bool = True
    """Whether ranks compute on the node's cores."""
    crowding: float = 0.0
    """Share by which each further busy core slows a rank: they share memory and caches."""
    copy_s: float = 0.0
    """Of the whole state, by one rank: what a save stops training for. All ranks share it, likewise the next."""
    write_s: float = 0.0
    """Of the copy to disk, by one rank, while training goes on."""
    held_out_s: float = 0.0
    """Of a measurement on all held-out samples, by one rank."""


@dataclass(frozen=True)
class Work:
    """What each rank does in a step, and what all do now and then."""

    micro_batches: int
    gradient_bytes: float
    exchanges: float
    """All-reduces of the gradient's size in a step: 1, or what ZeRO's stage makes of it."""
    messages: int
    """Small exchanges in a step."""
    readers: int
    """Threads of a rank that read ahead; with none it reads by itself, between micro-batches."""
    is_update_shared: bool
    """Whether each rank updates its part alone."""
    save_every: int
    held_out_every: int
    held_out_turns: int
    """Micro-batches of a held-out measurement, shared by the ranks."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what they go to; saves and measurements as a step's share of them."""

    computing: float
    """What a rank alone would compute."""
    sharing: float
    """More than that, since ranks and readers share the node's cores and memory."""
    reading: float
    """Waiting for data."""
    slowest: float
    """Waiting for the slowest rank."""
    exchange: float
    update: float
    saves: float
    held_out: float

    @property
    def training(self) -> float:
        """Without saves and measurements."""
        return self.computing + self.sharing + self.reading + self.slowest + self.exchange + self.update

    @property
    def total(self) -> float:
        """All of it."""
        return self.training + self.saves + self.held_out

    @property
    def efficiency(self) -> float:
        """The share that is computing: 1 is a rank alone that never waits, saves or updates."""
        return self.computing / self.total


@dataclass(frozen=True)
class Failures:
    """How often a node fails, and how long a run stands still then."""

    mean_between_s: float
    """Of one node."""
    restart_s: float


def expected_largest(mean: float, spread: float, count: int) -> float:
    """The expected maximum of `count` times of a normal distribution (Blom's approximation, off by 4 % at most)."""
    return mean + spread * NormalDist().inv_cdf((count - 0.375) / (count + 0.25))


def ring_s(size: float, members: int, link: Link | None) -> float:
    """Seconds of a ring all-reduce of `size` bytes: 2 (n - 1) messages of an n-th each."""
    if members == 1:
        return 0.0
    if link is None:
        raise ValueError(f"{members} members exchange over no link")
    return 2 * (members - 1) * (link.latency_s + size / members / link.bytes_per_s)


def all_reduce_s(size: float, cluster: Cluster, is_on_cores: bool = False) -> float:
    """Seconds of a hierarchical all-reduce: rings within nodes, and between nodes rings of what each node has summed.

    Args:
        size: Bytes.
        is_on_cores: Whether the ranks' cores move the bytes within a node, so that too few of them slow it down.
    """
    inside = ring_s(size, cluster.on_a_node, cluster.within) * (_share_of_cores(cluster) if is_on_cores else 1.0)
    return inside + ring_s(size, cluster.nodes, cluster.between)


def step_time(pace: Pace, work: Work, cluster: Cluster) -> StepTime:
    """What a step of this work takes on this cluster."""
    ranks, cores = cluster.on_a_node, cluster.cores
    slowed = pace.micro_batch_s
    if pace.is_on_cores:
        slowed *= 1 + pace.crowding * (min(ranks, cores) - 1)
    on_cores = (slowed if pace.is_on_cores else 0.0) + pace.read_core_s
    shared = max(slowed, ranks * on_cores / cores)
    paced = max(shared, pace.read_s / work.readers) if work.readers else shared + pace.read_s
    spread = pace.spread_s * paced / pace.micro_batch_s
    share = _share_of_cores(cluster) if pace.is_on_cores else 1.0
    message_s = all_reduce_s(0, cluster, pace.is_on_cores) / 2
    step = StepTime(
        computing=work.micro_batches * pace.micro_batch_s,
        sharing=work.micro_batches * (shared - pace.micro_batch_s),
        reading=work.micro_batches * (paced - shared),
        slowest=work.micro_batches * (expected_largest(paced, spread, cluster.ranks) - paced),
        exchange=work.exchanges * all_reduce_s(work.gradient_bytes, cluster, pace.is_on_cores)
        + work.messages * message_s,
        update=pace.update_s * share / (cluster.ranks if work.is_update_shared else 1),
        saves=0.0,
        held_out=pace.held_out_s
        * (math.ceil(work.held_out_turns / cluster.ranks) / work.held_out_turns)
        * share
        / work.held_out_every,
    )
    writing = max(0.0, pace.write_s / cluster.ranks - work.save_every * step.training)
    return StepTime(**{**vars(step), "saves": (pace.copy_s / cluster.ranks + writing) / work.save_every})


def with_failures(seconds: float, step: StepTime, work: Work, cluster: Cluster, failures: Failures) -> float:
    """Seconds of a run that nodes interrupt: each time a restart, and half an interval between saves made again.

    Infinite where failures come faster than a run can make good what they cost.
    """
    lost_s = failures.restart_s + work.save_every * step.total / 2
    share = lost_s * cluster.nodes / failures.mean_between_s
    return seconds / (1 - share) if share < 1 else math.inf


def best_interval_s(stall_s: float, cluster: Cluster, failures: Failures) -> float:
    """Seconds between saves at which stalls and lost work together cost least (Young's approximation)."""
    return math.sqrt(2 * stall_s * failures.mean_between_s / cluster.nodes)


def fit_link(sizes: Sequence[float], seconds: Sequence[float], members: int) -> Link:
    """The latency and the rate that a ring's measured times show, relative errors counting alike at all sizes.

    Args:
        sizes: Bytes of each all-reduce; several, far apart.
        seconds: Of each.
        members: Ranks of the ring, or nodes.
    """
    messages = [second / (2 * (members - 1)) for second in seconds]
    weights = [1 / message**2 for message in messages]
    of_all = sum(weights)
    size, message = (sum(w * v for w, v in zip(weights, values, strict=True)) / of_all for values in (sizes, messages))
    rows = list(zip(weights, sizes, messages, strict=True))
    slope = sum(w * (s - size) * (m - message) for w, s, m in rows) / sum(w * (s - size) ** 2 for w, s, _ in rows)
    slope = max(slope, _FASTEST)
    return Link(max(0.0, message - slope * size), 1 / (slope * members))


_FASTEST = 1e-15
"""Seconds a byte that no link falls short of: noise alone may say that more bytes take less time."""


def _share_of_cores(cluster: Cluster) -> float:
    """How many times longer what a rank computes takes, where ranks are more than cores."""
    return max(1.0, cluster.on_a_node / cluster.cores)
