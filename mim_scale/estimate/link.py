"""How fast ranks exchange, within a node and between nodes: all-reduces of several sizes, timed where they will run."""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mim_scale.errors import ClusterError
from mim_scale.estimate.files import LinkFile, TimedFile, read_file
from mim_scale.estimate.scaling import Link, fit_link, ring_s
from mim_scale.training.host import usable_cores

if TYPE_CHECKING:
    from mim_scale.training.ranks import Ranks

SIZES = (4, 16 << 10, 256 << 10, 2 << 20, 16 << 20, 128 << 20)
"""Bytes: from a number to the gradient of 32 million parameters."""
REPEATS = 15
LONG_S = 2.0
"""After an exchange of so long no larger one is tried."""


@dataclass(frozen=True)
class Timed:
    """One kind of link, as measured."""

    link: Link
    members: int
    """Ranks of a node; or nodes."""
    sizes: tuple[int, ...]
    """Bytes."""
    seconds: tuple[float, ...]
    """Median of the repeats, on the slowest rank; between nodes less what goes on within them."""

    @property
    def off(self) -> float:
        """How far the fitted link is off a measured time at most, as a share of it."""
        pairs = zip(self.sizes, self.seconds, strict=True)
        return max(abs(ring_s(size, self.members, self.link) / seconds - 1) for size, seconds in pairs)


@dataclass(frozen=True)
class Links:
    """What joins the ranks of a cluster."""

    device: str
    """cpu (gloo) or cuda (NCCL)."""
    cores: int
    """Of the first rank's node."""
    within: Timed | None
    between: Timed | None


def measure_links(ranks: "Ranks", say: Callable[[str], None] = print) -> Links:
    """Time the links between the ranks that were started; all of them call it.

    Raises:
        ClusterError: there is one rank, or nodes have different numbers of them.
    """
    import torch.distributed as dist

    if ranks.world == 1:
        raise ClusterError(
            "one rank has nobody to exchange with: start several, for example `torchrun --nproc_per_node 2 "
            "launch/measure_link.py --out link.json`"
        )
    hosts = ranks.gather_objects(socket.gethostname())
    nodes = {host: [rank for rank, other in enumerate(hosts) if other == host] for host in dict.fromkeys(hosts)}
    sizes = {len(members) for members in nodes.values()}
    if len(sizes) > 1:
        raise ClusterError(f"nodes have {sorted(sizes)} ranks: start as many on each")
    (per_node,) = sizes
    within = between = None
    if per_node > 1:
        # Every rank makes every group, its own or not.
        groups = {host: dist.new_group(members) for host, members in nodes.items()}
        within = _timed(*_all_reduces(ranks, groups[hosts[ranks.rank]]), per_node)
        say(told("within a node", within))
    if len(nodes) > 1:
        measured, seconds = _all_reduces(ranks, None)
        link = within.link if within is not None else None
        inside = [ring_s(size, per_node, link) for size in measured]
        rest = tuple(max(s - i, _LEAST * s) for s, i in zip(seconds, inside, strict=True))
        between = _timed(measured, rest, len(nodes))
        say(told("between nodes", between))
    return Links(ranks.device.type, usable_cores(), within, between)


_LEAST = 0.05
"""Share of an exchange over all nodes that is between them, at least: noise may leave less than nothing."""


def _timed(sizes: tuple[int, ...], seconds: tuple[float, ...], members: int) -> Timed:
    return Timed(fit_link(sizes, seconds, members), members, sizes, seconds)


def _all_reduces(ranks: "Ranks", group: Any) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Sizes, and the seconds of an all-reduce of each on the slowest rank."""
    from mim_scale.training.all_reduce import time_all_reduce

    sizes: list[int] = []
    found: list[float] = []
    for size in SIZES:
        seconds, is_right = time_all_reduce(ranks, size, REPEATS, ranks.device, group)
        if not is_right:
            raise ClusterError(f"an all-reduce of {size:,} bytes gave wrong sums: `mim-scale doctor` says more")
        sizes.append(size)
        found.append(seconds)
        if found[-1] > LONG_S:
            break
    return tuple(sizes), tuple(found)


def told(what: str, timed: Timed) -> str:
    """A link as a line for people."""
    link, times = timed.link, zip(timed.sizes, timed.seconds, strict=True)
    return (
        f"{what}, {timed.members} members: {link.latency_s * 1e6:,.0f} us a message, {link.bytes_per_s / 1e9:.2f} GB/s "
        f"(off by {timed.off:.0%} at most); all-reduce of "
        + ", ".join(f"{size:,} bytes {seconds * 1e3:.2f} ms" for size, seconds in times)
    )


def as_values(links: Links) -> dict[str, Any]:
    """For a file, and for scripts."""
    values: dict[str, Any] = {"kind": "mim-scale link", "device": links.device, "cores": links.cores}
    for name in ("within", "between"):
        timed = getattr(links, name)
        values[name] = timed and {
            "latency_s": timed.link.latency_s,
            "bytes_per_s": timed.link.bytes_per_s,
            "members": timed.members,
            "sizes": timed.sizes,
            "seconds": timed.seconds,
        }
    return values


def read_links(path: Path) -> Links:
    """What `launch/measure_link.py --out` wrote.

    Raises:
        ConfigError: the file is missing or another one.
    """
    wanted, remedy = "not what launch/measure_link.py --out writes", "; make it with launch/measure_link.py --out"
    found = read_file(LinkFile, path, "--link", wanted, remedy)
    return Links(found.device, found.cores, _timed_of(found.within), _timed_of(found.between))


def _timed_of(found: TimedFile | None) -> Timed | None:
    if found is None:
        return None
    return Timed(Link(found.latency_s, found.bytes_per_s), found.members, found.sizes, found.seconds)
