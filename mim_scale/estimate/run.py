"""`mim-scale estimate` for a run on a cluster: what was asked for is put together, and told."""

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from mim_scale.config import PretrainConfig
from mim_scale.estimate import pace as calibrate
from mim_scale.estimate import projection
from mim_scale.estimate.asked import Asked, ask, cluster_of, device_of, links_of, room_of, source_of
from mim_scale.estimate.commands import GIB
from mim_scale.estimate.fit import propose
from mim_scale.estimate.pace import Calibration, RunTimes
from mim_scale.estimate.runs import pace_of, refuse_other_pace, tell_beside
from mim_scale.estimate.scaling import Cluster, Pace, StepTime, Work, step_time
from mim_scale.methods.cost import Cost
from mim_scale.training.host import usable_cores
from mim_scale.training.progress import duration
from mim_scale.training.rank_memory import RankMemory


def fit_memory(
    config: PretrainConfig, options: argparse.Namespace, values: dict[str, Any]
) -> tuple[PretrainConfig, Cost]:
    """The config with settings that fit, and its cost; prints them, or puts them into `values` for scripts.

    Raises:
        ConfigError: nothing fits.
    """
    cluster, device = cluster_of(options, links_of(options)), device_of(options, source_of(options))
    found = propose(config, cluster.ranks, room_of(options, cluster, device), is_on_host=device == "cpu")
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
    values["beware"] = []

    def beware(line: str) -> None:
        values["beware"].append(line)
        say(f"beware: {line}")

    corpus = projection.find_corpus(config, options.volumes, options.plan)
    config = projection.steps_of(config, corpus, options.epochs)
    source = source_of(options)
    asked = ask(config, options, source, cost, say)
    config = asked.config
    asked.work(asked.cluster.ranks)
    row_bytes = source.row_bytes if isinstance(source, RunTimes) else None
    found = _pace(asked, source, options, beware)
    if found is not None:
        values["calibration"] = calibrate.as_values(found)
        say(_told_pace(found))
        asked = replace(asked, cluster=replace(asked.cluster, cores=options.cores or found.cores))
    say(_told_cluster(asked, options))
    _tell_run(asked, found.pace if found is not None else None, corpus, row_bytes, values, say)
    if found is not None:
        _tell_scaling(asked, found.pace, values, say)
        tell_beside(asked, found.pace, options.beside, values, say, beware)


def _pace(
    asked: Asked, source: RunTimes | Calibration | None, options: argparse.Namespace, beware: Callable[[str], None]
) -> Calibration | None:
    """Of one rank, of the work that is asked about; None where none was named."""
    if options.run_steps is not None:
        busy = os.getloadavg()[0]
        if busy > usable_cores() / 2:
            beware(f"others keep this machine busy (load {busy:.1f} on {usable_cores()} cores): it looks slower")
        found = calibrate.measure_pace(asked.config, asked.policy, options.run_steps, _copies(asked.cluster))
        refuse_other_pace(found, asked, "--run-steps")
        return found
    where = f"--from {options.source}"
    if isinstance(source, RunTimes):
        return pace_of(source, asked, where, beware)
    if source is not None:
        refuse_other_pace(source, asked, where)
        if source.of is None:
            beware(f"{where}: does not say what it was measured on; taken to be the config's work")
        if source.policy == "auto":
            beware(f"{where}: does not say what checkpointing auto chose; taken to be {asked.policy}")
    return source


def _copies(cluster: Cluster) -> int:
    """As many processes side by side as a node will have ranks, and this machine can do at once."""
    here = torch.cuda.device_count() if torch.cuda.is_available() else usable_cores()
    return min(cluster.on_a_node, here)


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


def _told_cluster(asked: Asked, options: argparse.Namespace) -> str:
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
    asked: Asked,
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


def _told_time(asked: Asked, step: StepTime, work: Work, seconds: float) -> str:
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


def _told_memory(asked: Asked, memory: RankMemory, is_on_host: bool) -> str:
    train = asked.config.train
    stage = f"ZeRO-{train.stage}" if train.engine == "deepspeed" else "plain engine"
    names = ("activations", "weights", "optimizer", "gradients", "buffers")
    parts = ", ".join(f"{name} {getattr(memory, name) / GIB:.3f}" for name in names)
    line = f"memory: a rank {memory.needed(is_on_host) / GIB:.3f} GiB ({stage}, checkpointing {asked.policy}): {parts}"
    line += f"{', ' if is_on_host else '; on the host '}copy of a save {memory.host_copy / GIB:.3f}"
    return line + (f", offloaded {memory.host_optimizer / GIB:.3f}" if memory.host_optimizer else "")


def _tell_scaling(asked: Asked, pace: Pace, values: dict[str, Any], say: Callable[[str], None]) -> None:
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
