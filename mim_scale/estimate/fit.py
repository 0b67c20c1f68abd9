"""Settings that fit a memory: micro-batch, checkpointing policy and ZeRO stage, with the reason."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from mim_scale.config import Checkpointing, PretrainConfig
from mim_scale.config_file import check_config, config_values
from mim_scale.errors import ConfigError
from mim_scale.methods.cost import FEWEST_FIRST, USABLE, Cost, cost_of
from mim_scale.training.rank_memory import RankMemory, rank_memory

GIB = 2**30
SHOWN = 4
"""Of what was tried before, how much a reason tells."""
Stage = Literal[0, 1, 2, 3]


@dataclass(frozen=True)
class Proposal:
    """What fits."""

    overrides: tuple[str, ...]
    """As they are typed behind a config; only what differs from it."""
    reason: str
    config: PretrainConfig
    cost: Cost
    """Of its micro-batch; arithmetic was not counted."""
    memory: RankMemory


def propose(config: PretrainConfig, world: int, room_bytes: float, is_on_host: bool) -> Proposal:
    """The settings that compute least again among those that fit; of these, the most samples at once.

    Stages below 3 come first, as 3 fetches weights over the link again and again; views in chunks come last.

    Args:
        room_bytes: What the device has for a rank.

    Raises:
        ConfigError: nothing fits, or the ranks do not divide the batch.
    """
    group, batch = config.method.samples_together, config.train.batch
    if batch % (world * group):
        raise ConfigError(
            f"train.batch {batch} cannot be shared by {world} ranks"
            + (f" in groups of {group}" if group > 1 else "")
            + ": take another number of ranks, or another batch"
        )
    usable, costs, told = USABLE * room_bytes, _Costs(), []
    for views, stage, policy in _candidates(config):
        changed = _changed(config, stage, policy, group, views)
        if changed is None:
            continue
        needed = rank_memory(costs.of(changed), changed, world, world, is_on_host).needed(is_on_host)
        told.append((needed, f"{policy} at stage {stage}{f' and {views} views' if views else ''} {needed / GIB:.2f}"))
        if needed <= usable:
            largest, grown, memory = _most_at_once(changed, costs, world, usable, is_on_host)
            size = largest.train.micro_batch
            end = "a rank's whole share of the batch" if size == batch // world else "no more fit"
            reason = (
                f"of {room_bytes / GIB:.2f} GiB {USABLE:.0%} can be used; GiB with a micro-batch of {group}: "
                f"{', '.join(line for _, line in told[-SHOWN:])}; with {size}: {memory.needed(is_on_host) / GIB:.2f} "
                f"({end})"
            )
            return Proposal(_differing(config, largest), reason, largest, grown, memory)
    least, line = min(told)
    raise ConfigError(
        f"nothing fits {room_bytes / GIB:.2f} GiB for a rank, of which {USABLE:.0%} can be used: the least is {line} "
        f"GiB: take devices of {least / USABLE / GIB:.1f} GiB, more ranks, or a smaller model"
    )


def _candidates(config: PretrainConfig) -> Iterator[tuple[int | None, Stage, Checkpointing]]:
    """(views at once or None for the config's own, stage, policy), the cheapest in time first."""
    stages: tuple[Stage, ...] = (0,) if config.train.engine == "plain" else get_args(Stage)
    low, high = [stage for stage in stages if stage < 3], [stage for stage in stages if stage == 3]
    for views in (None, 4, 1):
        for some in (low, high):
            for policy in FEWEST_FIRST:
                # The config's own stage first: among those below 3, time hardly differs.
                own = config.train.stage
                for stage in sorted(some, key=lambda one: (one != own, one)):
                    yield views, stage, policy


def _changed(
    config: PretrainConfig, stage: Stage | Literal["auto"], policy: Checkpointing, micro_batch: int, views: int | None
) -> PretrainConfig | None:
    """The config with these settings; None where they do not go together."""
    values = config_values(config)
    train: dict[str, Any] = {"activation_checkpointing": policy, "micro_batch": micro_batch}
    if config.train.engine == "deepspeed":
        train["zero_stage"] = stage
    if views is not None:
        train["views_at_once"] = views
    values["train"] |= train
    try:
        return check_config(PretrainConfig, values, "--fit")
    except ConfigError:
        return None


def _most_at_once(
    config: PretrainConfig, costs: "_Costs", world: int, usable: float, is_on_host: bool
) -> tuple[PretrainConfig, Cost, RankMemory]:
    """The largest micro-batch that divides a rank's share and fits; activations grow alike with each sample."""
    train, cost = config.train, costs.of(config)
    group, share = train.micro_batch, train.batch // world
    best = config, cost, rank_memory(cost, config, world, world, is_on_host)
    by_sample: float | None = None
    for size in range(2 * group, share + 1, group):
        larger = _changed(config, train.zero_stage, _policy(config), size, None) if share % size == 0 else None
        if larger is None:
            continue
        if by_sample is None:
            by_sample = (costs.of(larger).activation_bytes - cost.activation_bytes) / (size - group)
        activations = int(cost.activation_bytes + by_sample * (size - group))
        grown = replace(cost, activation_bytes=activations, batch_bytes=cost.batch_bytes // group * size)
        memory = rank_memory(grown, larger, world, world, is_on_host)
        if memory.needed(is_on_host) > usable:
            break
        best = larger, grown, memory
    return best


def _differing(before: PretrainConfig, after: PretrainConfig) -> tuple[str, ...]:
    old, new = config_values(before)["train"], config_values(after)["train"]
    names = ("micro_batch", "activation_checkpointing", "zero_stage", "views_at_once")
    return tuple(f"train.{name}={new[name]}" for name in names if old.get(name) != new.get(name))


def _policy(config: PretrainConfig) -> Checkpointing:
    policy = config.train.activation_checkpointing
    assert policy != "auto"
    return policy


class _Costs:
    """Costs of micro-batches; each is traced once, since the stage does not change it."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Cost] = {}

    def of(self, config: PretrainConfig) -> Cost:
        """Of a config that names its policy."""
        train = config.train
        key = (train.micro_batch, train.views_at_once, train.activation_checkpointing)
        if key not in self._known:
            self._known[key] = cost_of(config, _policy(config), is_counted=False)
        return self._known[key]
