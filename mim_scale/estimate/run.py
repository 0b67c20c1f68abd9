"""`mim-scale estimate` for a run on a cluster: what was asked for is put together, and told."""

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mim_scale.config import Checkpointing, PretrainConfig
from mim_scale.errors import ConfigError
from mim_scale.estimate import link, projection
from mim_scale.estimate import pace as calibrate
from mim_scale.estimate.commands import GIB, LATENCY_US
from mim_scale.estimate.fit import propose
from mim_scale.estimate.link import Links
from mim_scale.estimate.pace import Calibration, RunTimes
from mim_scale.estimate.scaling import Cluster, Failures, Link, Pace, StepTime, Work, step_time
from mim_scale.methods.cost import Cost, choose_policy, cost_of
from mim_scale.training.host import usable_cores
from mim_scale.training.memory import choose_stage, free_bytes, with_stage
from mim_scale.training.progress import duration
from mim_scale.training.rank_memory import RankMemory, rank_memory


@dataclass(frozen=True)
class _Asked:
    """What the numbers are of."""

    config: PretrainConfig
    policy: Checkpointing
    cost: Cost
    cluster: Cluster
    device: str
    """cpu or cuda."""
    failures: Failures

    def work(self, world: int, share: int | None = None) -> Work:
        return projection.work_of(self.config, self.cost, self.policy, world, share)


def fit_memory(
    config: PretrainConfig, options: argparse.Namespace, values: dict[str, Any]
) -> tuple[PretrainConfig, Cost]:
    """The config with settings that fit, and its cost; prints them, or puts them into `values` for scripts.

    Raises:
        ConfigError: nothing fits.
    """
    cluster, device = _cluster(options, _links(options)), _device(options)
    found = propose(config, cluster.ranks, _room(options, cluster, device), is_on_host=device == "cpu")
    memory = found.memory
    values["fit"] = {
        "overrides": found.overrides,
        "reason": found.reason,
        "memory": asdict(memory) | {"device": memory.device, "host": memory.host},
    }
    if not options.json:
        ranks = f"{cluster.ranks} rank{'s' * (cluster.ranks > 1)}"
        print(
            f"fits {ranks}: {' '.join(found.overrides) or 'the config as it is'}\nbecause: {found.reason}", flush=True
        )
    return found.config, found.cost


def estimate_run(
    config: PretrainConfig, options: argparse.Namespace, values: dict[str, Any], cost: Cost | None = None
) -> None:
    """Print what the run takes, or put it into `values` for scripts.

    Args:
        cost: Of a micro-batch of the config, where it is known.

    Raises:
        MimScaleError: options that do not go together, files that are others, what the measuring met.
    """
    say: Callable[[str], None] = (lambda line: None) if options.json else (lambda line: print(line, flush=True))
    corpus = projection.find_corpus(config, options.volumes, options.plan)
    config = projection.steps_of(config, corpus, options.epochs)
    asked = _asked(config, options, cost, say)
    config = asked.config
    asked.work(asked.cluster.ranks)
    row_bytes, found = None, None
    if options.run_steps is not None:
        busy = os.getloadavg()[0]
        if busy > usable_cores() / 2:
            say(f"beware: others keep this machine busy (load {busy:.1f} on {usable_cores()} cores): it looks slower")
        found = calibrate.measure_pace(config, options.run_steps, _copies(asked.cluster))
    elif options.source is not None and options.source.is_dir():
        run = calibrate.read_run(options.source)
        row_bytes, found = run.row_bytes, _pace_of(run, asked, options)
    elif options.source is not None:
        found = calibrate.read_calibration(options.source)
    if found is not None:
        values["calibration"] = calibrate.as_values(found)
        say(_told_pace(found))
        if found.device != asked.device:
            say(f"beware: that was on {found.device}, and the cluster's ranks are taken to compute on {asked.device}")
        asked = replace(asked, cluster=replace(asked.cluster, cores=options.cores or found.cores))
        if found.policy != asked.policy:
            say(f"beware: that was with checkpointing {found.policy}, the config has {asked.policy}")
    say(_told_cluster(asked, options))
    _tell_run(asked, found.pace if found is not None else None, corpus, row_bytes, values, say)
    if found is not None:
        _tell_scaling(asked, found.pace, values, say)
        _tell_beside(asked, found.pace, options.beside, values, say)


def _asked(
    config: PretrainConfig, options: argparse.Namespace, cost: Cost | None, say: Callable[[str], None]
) -> _Asked:
    links = _links(options)
    cluster = _cluster(options, links)
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
    device = _device(options)
    config, policy = _chosen(config, cluster, device, options, say)
    cost = cost or cost_of(config, policy, is_counted=False)
    return _Asked(config, policy, cost, cluster, device, Failures(options.mtbf * 3600, options.restart))


def _links(options: argparse.Namespace) -> Links | None:
    return link.read_links(options.link) if options.link is not None else None


def _cluster(options: argparse.Namespace, links: Links | None) -> Cluster:
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


def _device(options: argparse.Namespace) -> str:
    """What ranks compute on: cpu or cuda."""
    if options.device is not None:
        return str(options.device)
    links = _links(options)
    if links is not None:
        return links.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _room(options: argparse.Namespace, cluster: Cluster, device: str) -> int:
    """Bytes that a rank may use: as told, or what is free here."""
    if options.memory is not None:
        return int(options.memory * GIB)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("this machine has no GPU whose memory could be looked at: give --memory GIB")
    return free_bytes(torch.device(device)) // (cluster.on_a_node if device == "cpu" else 1)


def _chosen(
    config: PretrainConfig, cluster: Cluster, device: str, options: argparse.Namespace, say: Callable[[str], None]
) -> tuple[PretrainConfig, Checkpointing]:
    """Stage and policy, what is `auto` chosen as a run on this cluster would choose it."""
    train = config.train
    policy, world, is_on_host = train.activation_checkpointing, cluster.ranks, device == "cpu"
    if "auto" not in (policy, train.zero_stage):
        return config, policy
    room = _room(options, cluster, device)
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


def _copies(cluster: Cluster) -> int:
    """As many processes side by side as a node will have ranks, and this machine can do at once."""
    here = torch.cuda.device_count() if torch.cuda.is_available() else usable_cores()
    return min(cluster.on_a_node, here)


def _pace_of(run: RunTimes, asked: _Asked, options: argparse.Namespace) -> Calibration:
    is_on_cores = asked.device == "cpu"
    cores = options.cores or asked.cluster.cores
    exchange_s = 0.0
    if run.world > 1:
        at = replace(asked.cluster, ranks=run.world, cores=cores, ranks_per_node=run.world)
        if at.within is None:
            raise ConfigError(
                f"--from {options.source}: ran on {run.world} ranks, whose exchanges cannot be told from their "
                "computing: give the --link they had, or a run on one rank"
            )
        policy = run.config.train.activation_checkpointing
        work = projection.work_of(run.config, asked.cost, policy, run.world)
        exchange_s = step_time(Pace(1.0, 0.0, 0.0, is_on_cores=is_on_cores), work, at).exchange
    return calibrate.pace_of_run(run, exchange_s, is_on_cores, cores, options.source)


def _told_pace(found: Calibration) -> str:
    pace = found.pace
    where = "cores" if pace.is_on_cores else "a GPU"
    line = (
        f"pace: {found.source}, on {where}: micro-batch {pace.micro_batch_s:.4f} s (spread {pace.spread_s:.4f}), "
        f"update {pace.update_s:.4f} s, reading {pace.read_s:.4f} s"
    )
    if pace.crowding:
        line += f"; each further busy core slows a rank by {pace.crowding:.0%}"
    if found.peak_bytes:
        line += f"; held at most {found.peak_bytes / GIB:.2f} GiB"
    return line


def _told_cluster(asked: _Asked, options: argparse.Namespace) -> str:
    cluster = asked.cluster
    line = (
        f"cluster: {cluster.ranks} rank{'s' * (cluster.ranks > 1)} on {cluster.nodes} node{'s' * (cluster.nodes > 1)}"
    )
    line += f" of {cluster.cores} cores"
    for name, known, source in (
        ("within a node", cluster.within, "measured"),
        ("between nodes", cluster.between, "measured" if options.network is None else "as told"),
    ):
        if known is not None:
            line += f"; {name} {known.bytes_per_s / 1e9:.2f} GB/s, {known.latency_s * 1e6:.0f} us a message ({source})"
    return line


def _tell_run(
    asked: _Asked,
    pace: Pace | None,
    corpus: projection.Corpus,
    row_bytes: float | None,
    values: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    config, cluster, cost = asked.config, asked.cluster, asked.cost
    train, world = config.train, cluster.ranks
    is_on_host = asked.device == "cpu"
    disk = projection.disk_of(config, cost, corpus, row_bytes)
    memory = projection.memory_of(config, cost, world, is_on_host)
    work = asked.work(world)
    step = step_time(pace, work, cluster) if pace is not None else None
    samples = train.steps * train.batch
    of = f": {samples / corpus.volumes:,.1f} epochs of {corpus.volumes:,} volumes" if corpus.volumes else ""
    say(f"run: {train.steps:,} steps of {train.batch} samples, {samples:,} in all{of}")
    seconds = math.nan
    if step is not None:
        seconds = projection.run_seconds(config, step, work, cluster, asked.failures)
        say(_told_step(step))
        say(_told_time(asked, step, work, seconds))
    else:
        say("time: not known without a pace: give --run-steps or --from")
    say(_told_disk(disk))
    say(_told_memory(asked, memory, is_on_host))
    values["run"] = projection.as_values(config, step, seconds, cluster, disk, memory)
    values["run"] |= {"epochs": samples / corpus.volumes if corpus.volumes else None, "volumes": corpus.volumes}


def _told_step(step: StepTime) -> str:
    parts = ", ".join(f"{name.replace('_', '-')} {seconds:.4f}" for name, seconds in asdict(step).items())
    return f"step: {step.total:.4f} s ({parts}): efficiency {step.efficiency:.0%}"


def _told_time(asked: _Asked, step: StepTime, work: Work, seconds: float) -> str:
    cluster, failures, train = asked.cluster, asked.failures, asked.config.train
    undisturbed = train.steps * step.total
    each = f"one failure a node in {failures.mean_between_s / 3600:,.0f} h, {failures.restart_s:.0f} s to restart"
    if math.isinf(seconds):
        return f"time: it never ends: with {each}, more is lost than made: lower checkpoint.every"
    unit = "GPU-hours" if asked.device == "cuda" else "rank-hours"
    best = projection.best_every(step, work, cluster, failures) if step.saves else asked.config.checkpoint.every
    return (
        f"time: {duration(seconds)} ({seconds / 3600:,.2f} h), {seconds / 3600 * cluster.ranks:,.1f} {unit}; failures "
        f"are {seconds / undisturbed - 1:.1%} of it ({each}); least is lost at checkpoint.every={best:,}"
    )


def _told_disk(disk: projection.Disk) -> str:
    kept, one = disk.checkpoints / 1e9, disk.checkpoint / 1e9
    line = f"disk: checkpoints {kept:,.2f} GB ({one:,.3f} each, one more while saving)"
    line += f", journal {disk.journal / 1e9:,.3f} GB"
    if disk.tracking:
        line += f", MLflow about {disk.tracking / 1e9:,.2f} GB"
    return line + ("; store not known: give --plan" if disk.store is None else f"; store {disk.store / 1e9:,.2f} GB")


def _told_memory(asked: _Asked, memory: RankMemory, is_on_host: bool) -> str:
    train = asked.config.train
    stage = f"ZeRO-{train.stage}" if train.engine == "deepspeed" else "plain engine"
    names = ("activations", "weights", "optimizer", "gradients", "buffers")
    parts = ", ".join(f"{name} {getattr(memory, name) / GIB:.3f}" for name in names)
    line = f"memory: a rank {memory.needed(is_on_host) / GIB:.3f} GiB ({stage}, checkpointing {asked.policy}): {parts}"
    line += f"{', ' if is_on_host else '; on the host '}copy of a save {memory.host_copy / GIB:.3f}"
    return line + (f", offloaded {memory.host_optimizer / GIB:.3f}" if memory.host_optimizer else "")


def _tell_scaling(asked: _Asked, pace: Pace, values: dict[str, Any], say: Callable[[str], None]) -> None:
    rows = list(projection.scaled(asked.config, pace, asked.work, asked.cluster, asked.failures))
    values["scaling"] = [asdict(row) | {"hours": row.hours if math.isfinite(row.hours) else None} for row in rows]
    own = asked.config.train.batch
    say("weak scaling, the batch growing with the ranks; last, a step of the config's own batch:")
    heads = ("ranks", "nodes", "batch", "step s", "samples/s", "efficiency", "exchange", "slowest", "hours")
    say("".join(f"{head:>11}" for head in heads) + f"{f'at {own}':>11}")
    for row in rows:
        cells = (
            f"{row.ranks:,}",
            f"{row.nodes:,}",
            f"{row.batch:,}",
            f"{row.step_s:.4f}",
            f"{row.samples_per_second:,.2f}",
            f"{row.efficiency:.1%}",
            f"{row.exchange:.1%}",
            f"{row.slowest:.1%}",
            f"{row.hours:,.3f}" if row.hours < 1 else f"{row.hours:,.1f}",
            "-" if row.fixed_batch_s is None else f"{row.fixed_batch_s:.4f}",
        )
        say("".join(f"{cell:>11}" for cell in cells))
    if rows and rows[-1].ranks < projection.MOST_RANKS:
        what = "--link" if asked.cluster.within is None else "--network GBIT"
        say(f"more than {rows[-1].ranks} ranks: give {what}")


def _tell_beside(
    asked: _Asked, pace: Pace, folders: list[Path], values: dict[str, Any], say: Callable[[str], None]
) -> None:
    """Runs on one node of the cluster, each with the prediction for its own batch and ranks."""
    if not folders:
        return
    say("beside runs that were made, steps without saves and held-out measurements:")
    say(f"{'ranks':>7}{'batch':>7}{'measured s':>12}{'predicted s':>13}{'off':>8}   run")
    values["beside"] = []
    for folder in folders:
        run = calibrate.read_run(folder)
        at = replace(asked.cluster, ranks=run.world, ranks_per_node=max(run.world, asked.cluster.ranks_per_node))
        if run.world > 1 and at.within is None:
            raise ConfigError(f"--beside {folder}: ran on {run.world} ranks, whose link is not known: give --link")
        work = projection.work_of(run.config, asked.cost, asked.policy, run.world)
        predicted = step_time(pace, work, at).training
        off = predicted / run.step_s - 1
        values["beside"].append(
            {"run": str(folder), "ranks": run.world, "measured_s": run.step_s, "predicted_s": predicted}
        )
        batch = run.config.train.batch
        say(f"{run.world:>7}{batch:>7}{run.step_s:>12.4f}{predicted:>13.4f}{off:>+8.1%}   {folder}")
