"""What a run takes on a cluster: its steps in hours, its disk and its memory, from a config, a cost and a pace."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mim_scale.config import Checkpointing, PretrainConfig
from mim_scale.errors import ConfigError, StoreError
from mim_scale.estimate.files import PlanFile, read_file
from mim_scale.estimate.scaling import (
    Cluster,
    Failures,
    Pace,
    StepTime,
    Work,
    best_interval_s,
    step_time,
    with_failures,
)
from mim_scale.estimate.timed_steps import has_data
from mim_scale.methods.cost import Cost
from mim_scale.sampling.order import micro_batches
from mim_scale.store.manifest import split_subjects
from mim_scale.streaming.stream import open_dataset
from mim_scale.training.rank_memory import RankMemory, checkpoint_bytes, rank_memory

MOST_RANKS = 512
"""Of the table of weak scaling."""
ROW_BYTES = 510
"""Of a step in the journal, about; a run's own are taken where they are known."""
TRACKED_BYTES = 4000
"""Of a step in MLflow's database, about."""


@dataclass(frozen=True)
class Corpus:
    """What is trained on."""

    volumes: int | None
    store_bytes: float | None
    source: str
    """For people."""


@dataclass(frozen=True)
class Disk:
    """Bytes on disk at the end of a run; while it saves, one checkpoint more."""

    checkpoint: float
    """One of them."""
    checkpoints: float
    """All that are kept, and the one that is being written."""
    journal: float
    tracking: float
    """MLflow's database in the run folder; 0 where there is none."""
    store: float | None


@dataclass(frozen=True)
class Scaled:
    """A row of the table of scaling."""

    ranks: int
    nodes: int
    batch: int
    """Each rank's share is that of the cluster in question."""
    step_s: float
    samples_per_second: float
    efficiency: float
    exchange: float
    """Share of the step, likewise the next."""
    slowest: float
    hours: float
    """Of as many samples as the run has, failures included; infinite where it never ends."""
    fixed_batch_s: float | None
    """A step of the config's own batch on so many ranks; None where they do not divide it."""


def work_of(config: PretrainConfig, cost: Cost, policy: Checkpointing, world: int, share: int | None = None) -> Work:
    """What each of `world` ranks does in a step.

    Args:
        share: Micro-batches of a rank; left out, what the batch gives it.

    Raises:
        ConfigError: the ranks do not divide the batch.
    """
    train = config.train
    if share is None:
        share = len(micro_batches(0, train.batch, train.micro_batch, 0, world))
    stage = train.stage
    # Stages 1 and 2 sum gradients on all ranks, then bring the updated weights together; stage 3 fetches weights for
    # every pass through the network, and sums gradients, each time half of an all-reduce.
    passes = 2.0 if policy == "none" else 2.5
    exchanges = {0: 1.0, 1: 1.5, 2: 1.5, 3: 0.5 * (passes + 1) * share}[stage]
    # Ranks agree before each micro-batch; a step's losses, norm and overflow are exchanged. Weights come by the layer.
    messages = share + 4 + (cost.tensors * share if stage == 3 else 0)
    return Work(
        micro_batches=share,
        gradient_bytes=cost.gradient_bytes,
        exchanges=exchanges,
        messages=messages,
        readers=config.data.workers,
        is_update_shared=stage > 0,
        save_every=config.checkpoint.every,
        held_out_every=config.held_out.every,
        held_out_turns=math.ceil(config.held_out.samples / train.micro_batch),
    )


def find_corpus(config: PretrainConfig, volumes: int | None, plan: Path | None) -> Corpus:
    """The corpus in question: a number, a plan of a build, or the config's store where there is one.

    Args:
        volumes: A number of volumes; of the size that the plan or the store has on average.
        plan: What `mim-scale data plan --json` printed.

    Raises:
        ConfigError: the plan is none.
        StoreError: the store is damaged.
    """
    found, per_volume = _known_corpus(config, plan)
    if volumes is None:
        return found
    if per_volume is None:
        return Corpus(volumes, None, "")
    return Corpus(volumes, per_volume * volumes, f"as large as those of {found.source}")


def _known_corpus(config: PretrainConfig, plan: Path | None) -> tuple[Corpus, float | None]:
    """(corpus, bytes of a volume)."""
    if plan is not None:
        wanted, remedy = "not what `mim-scale data plan --json` prints", "; make it with `mim-scale data plan --json`"
        found = read_file(PlanFile, plan, "--plan", wanted, remedy)
        count, size = found.num_sources - found.num_refused, found.bytes_stored
        return Corpus(count, size, str(plan)), size / count if count else None
    if not has_data(config):
        return Corpus(None, None, ""), None
    rows = open_dataset(config.data).rows
    trained, _ = split_subjects(rows, config.seed, config.data.held_out_subjects)
    size = float(sum(row.bytes_stored for row in rows))
    return Corpus(len(trained), size, config.data.store), size / len(rows)


def disk_of(config: PretrainConfig, cost: Cost, corpus: Corpus, row_bytes: float | None = None) -> Disk:
    """What a run leaves on disk."""
    one = checkpoint_bytes(cost.parameters)
    steps = config.train.steps
    return Disk(
        one,
        (config.checkpoint.keep + 1) * one,
        steps * (row_bytes or ROW_BYTES),
        steps * TRACKED_BYTES if config.tracking.mlflow == "auto" else 0,
        corpus.store_bytes,
    )


def memory_of(config: PretrainConfig, cost: Cost, world: int, is_on_host: bool) -> RankMemory:
    """What a rank holds, where all ranks see the run folder."""
    return rank_memory(cost, config, world, world, is_on_host)


def run_seconds(config: PretrainConfig, step: StepTime, work: Work, cluster: Cluster, failures: Failures) -> float:
    """Of all steps, failures included; infinite where they come faster than the run can make good."""
    return with_failures(config.train.steps * step.total, step, work, cluster, failures)


def scaled(
    config: PretrainConfig,
    pace: Pace,
    work_for: Callable[[int, int | None], Work],
    cluster: Cluster,
    failures: Failures,
) -> Iterator[Scaled]:
    """The table of scaling, 1 to MOST_RANKS ranks: each rank's share as on `cluster`, and the config's batch beside it.

    It ends where nodes would be joined by a link that is not known.

    Args:
        work_for: (ranks, a rank's micro-batches or None for what the batch gives) -> what each does.
    """
    train = config.train
    share = work_for(cluster.ranks, None).micro_batches
    samples = train.steps * train.batch
    for world in _worlds(cluster):
        at = replace(cluster, ranks=world)
        if (at.nodes > 1 and at.between is None) or (at.on_a_node > 1 and at.within is None):
            return
        work = work_for(world, share)
        step = step_time(pace, work, at)
        batch = share * train.micro_batch * world
        seconds = with_failures(samples / batch * step.total, step, work, at, failures)
        is_divided = train.batch % (world * train.micro_batch) == 0
        yield Scaled(
            world,
            at.nodes,
            batch,
            step.total,
            batch / step.total,
            step.efficiency,
            step.exchange / step.total,
            step.slowest / step.total,
            seconds / 3600,
            step_time(pace, work_for(world, None), at).total if is_divided else None,
        )


def _worlds(cluster: Cluster) -> list[int]:
    """Powers of two within a node, then so many full nodes; and the cluster itself."""
    powers = [2**power for power in range(MOST_RANKS.bit_length())]
    full = {power * cluster.ranks_per_node for power in powers}
    within = {power for power in powers if power < cluster.ranks_per_node}
    return sorted(world for world in full | within | {cluster.ranks} if world <= max(MOST_RANKS, cluster.ranks))


def best_every(step: StepTime, work: Work, cluster: Cluster, failures: Failures) -> int:
    """`checkpoint.every` at which stalls and lost work together cost least."""
    return max(1, round(best_interval_s(step.saves * work.save_every, cluster, failures) / step.training))


def as_values(
    config: PretrainConfig, step: StepTime | None, seconds: float, cluster: Cluster, disk: Disk, memory: RankMemory
) -> dict[str, Any]:
    """The run in question, for scripts; what is infinite is null."""
    values: dict[str, Any] = {
        "ranks": cluster.ranks,
        "nodes": cluster.nodes,
        "steps": config.train.steps,
        "samples": config.train.steps * config.train.batch,
        "disk": asdict(disk),
        "memory": asdict(memory) | {"device": memory.device, "host": memory.host},
    }
    if step is not None:
        hours = seconds / 3600 if math.isfinite(seconds) else None
        values |= {
            "step": asdict(step) | {"training": step.training, "total": step.total, "efficiency": step.efficiency},
            "hours": hours,
            "rank_hours": hours and hours * cluster.ranks,
        }
    return values


def steps_of(config: PretrainConfig, corpus: Corpus, epochs: float | None) -> PretrainConfig:
    """The config with as many steps as the epochs take.

    Raises:
        ConfigError: nobody knows how many volumes an epoch has, or they are fewer than warm-up steps need.
    """
    if epochs is None:
        return config
    if corpus.volumes is None:
        raise StoreError(f"{config.data.store}: no such store, so an epoch has no size: give --volumes or --plan")
    steps = math.ceil(epochs * corpus.volumes / config.train.batch)
    if steps <= config.optimizer.warmup_steps:
        raise ConfigError(
            f"--epochs {epochs:g} of {corpus.volumes:,} volumes are {steps:,} steps, all of them within "
            f"optimizer.warmup_steps {config.optimizer.warmup_steps:,}: give more epochs, or lower that"
        )
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})
