"""What `mim-scale estimate` was asked for: the cluster, its device and links, and what is `auto` chosen for them."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mim_scale.config import Checkpointing, PretrainConfig
from mim_scale.errors import ConfigError
from mim_scale.estimate import projection
from mim_scale.estimate.commands import GIB, LATENCY_US, MTBF_H, RESTART_S
from mim_scale.estimate.link import Links, read_links
from mim_scale.estimate.pace import Calibration, RunTimes, read_calibration, read_run
from mim_scale.estimate.same_work import work_settings
from mim_scale.estimate.scaling import Cluster, Failures, Link, Work
from mim_scale.methods.cost import Cost, choose_policy, cost_of
from mim_scale.training.host import usable_cores
from mim_scale.training.memory import choose_stage, free_bytes, with_stage
from mim_scale.training.rank_memory import rank_memory


@dataclass(frozen=True)
class Asked:
    """What the numbers are of."""

    config: PretrainConfig
    policy: Checkpointing
    cost: Cost
    cluster: Cluster
    device: str
    """cpu or cuda."""
    failures: Failures

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the pace."""
        return work_settings(self.config, self.policy)

    def work(self, world: int, share: int | None = None) -> Work:
        """Of each rank in a step."""
        return projection.work_of(self.config, self.cost, self.policy, world, share)


def ask(
    config: PretrainConfig,
    options: argparse.Namespace,
    source: RunTimes | Calibration | None,
    cost: Cost | None,
    say: Callable[[str], None],
) -> Asked:
    """All of it.

    Args:
        source: What `--from` named.
        cost: Of a micro-batch, where it is known.

    Raises:
        ConfigError: options that do not go together, or links that nobody knows.
    """
    links = links_of(options)
    cluster = cluster_of(options, links)
    has_pace = options.run_steps is not None or options.source is not None
    if has_pace and cluster.on_a_node > 1 and cluster.within is None:
        raise ConfigError(
            f"{cluster.on_a_node} ranks on a node exchange over a link that is not known: give --link, made there by "
            f"`torchrun --nproc_per_node {cluster.on_a_node} launch/measure_link.py --out link.json`"
        )
    if has_pace and cluster.nodes > 1 and cluster.between is None:
        raise ConfigError(
            f"{cluster.nodes} nodes exchange over a link that is not known: give a --link measured on several, or "
            "--network GBIT"
        )
    device = device_of(options, source)
    config, policy = _chosen(config, cluster, device, options, say)
    cost = cost or cost_of(config, policy, is_counted=False)
    failures = Failures((options.mtbf or MTBF_H) * 3600, options.restart or RESTART_S)
    return Asked(config, policy, cost, cluster, device, failures)


def source_of(options: argparse.Namespace) -> RunTimes | Calibration | None:
    """What `--from` names: a run's times or a pace."""
    if options.source is None:
        return None
    return read_run(options.source) if options.source.is_dir() else read_calibration(options.source)


def links_of(options: argparse.Namespace) -> Links | None:
    """What `--link` names."""
    return read_links(options.link) if options.link is not None else None


def cluster_of(options: argparse.Namespace, links: Links | None) -> Cluster:
    """The ranks, their nodes and what joins them; raises ConfigError where a node would not be full."""
    known = links.within.members if links is not None and links.within is not None else None
    per_node = options.ranks_per_node or known or (options.world if options.nodes is None else None) or 1
    world = options.world or (options.nodes or 1) * per_node
    per_node = min(per_node, world) if options.ranks_per_node is None else per_node
    if world > per_node and world % per_node:
        raise ConfigError(f"--world {world} is not a multiple of {per_node} ranks on a node: fill the nodes")
    return Cluster(
        world,
        per_node,
        options.cores or (links.cores if links is not None else usable_cores()),
        links.within.link if links is not None and links.within is not None else None,
        _between(links, options),
    )


def device_of(options: argparse.Namespace, source: RunTimes | Calibration | None) -> str:
    """What ranks compute on, cpu or cuda: as told, as the link or the pace was measured on, as is here."""
    if options.device is not None:
        return str(options.device)
    links = links_of(options)
    if links is not None:
        return links.device
    if source is not None and source.device is not None:
        return source.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def room_of(options: argparse.Namespace, cluster: Cluster, device: str) -> int:
    """Bytes that a rank may use: as told, or what is free here."""
    if options.memory is not None:
        return int(options.memory * GIB)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("this machine has no GPU whose memory could be looked at: give --memory GIB")
    return free_bytes(torch.device(device)) // (cluster.on_a_node if device == "cpu" else 1)


def is_auto(config: PretrainConfig) -> bool:
    """Whether a memory decides about checkpointing or ZeRO stage."""
    train = config.train
    return train.activation_checkpointing == "auto" or (train.engine == "deepspeed" and train.zero_stage == "auto")


def _chosen(
    config: PretrainConfig, cluster: Cluster, device: str, options: argparse.Namespace, say: Callable[[str], None]
) -> tuple[PretrainConfig, Checkpointing]:
    """Stage and policy, what is `auto` chosen as a run on this cluster would choose it."""
    train = config.train
    policy, world, is_on_host = train.activation_checkpointing, cluster.ranks, device == "cpu"
    if not is_auto(config):
        return config, policy
    room = room_of(options, cluster, device)
    if train.engine == "deepspeed" and train.zero_stage == "auto":
        stage, why = choose_stage(config, policy, room, world, world, is_on_host)
        say(why)
        config = with_stage(config, stage)
    if policy == "auto":
        policy, why = choose_policy(
            config, room, lambda cost: rank_memory(cost, config, world, world, is_on_host).needed(is_on_host)
        )
        say(why)
    return config, policy


def _between(links: Links | None, options: argparse.Namespace) -> Link | None:
    if options.network is None:
        return links.between.link if links is not None and links.between is not None else None
    try:
        rate, *latency = (float(word) for word in options.network.split(","))
        (latency_us,) = latency or (LATENCY_US,)
        if not (rate > 0 and latency_us >= 0 and math.isfinite(rate) and math.isfinite(latency_us)):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"--network {options.network!r}: expected Gbit/s, or Gbit/s,us: --network 100 or --network 100,5"
        ) from None
    return Link(latency_us / 1e6, rate * 1e9 / 8)
