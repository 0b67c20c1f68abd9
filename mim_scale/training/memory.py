"""How much memory a rank may use, and the checkpointing policy that fits it."""

import resource
import socket
import sys
from pathlib import Path

import torch

from mim_scale.config import Checkpointing, PretrainConfig
from mim_scale.config_file import check_config, config_values
from mim_scale.errors import ConfigError
from mim_scale.methods.cost import FEWEST_FIRST, USABLE, Cost, choose_policy, cost_of
from mim_scale.training.host import free_memory
from mim_scale.training.rank_memory import rank_memory
from mim_scale.training.ranks import Ranks


def resolve_stage(config: PretrainConfig, ranks: Ranks, writers: int = 1) -> tuple[PretrainConfig, str]:
    """The config with a ZeRO stage in the place of `auto`, the same on all ranks, and a line that says why.

    Args:
        writers: As in `resolve_checkpointing`.
    """
    if config.train.engine != "deepspeed" or config.train.zero_stage != "auto":
        return config, ""
    room, is_on_host = _room(ranks), ranks.device.type != "cuda"
    policy = config.train.activation_checkpointing
    # On the first rank alone, and all of them end where it is refused there: whoever computes must not decide.
    stage, why = ranks.on_first(lambda: choose_stage(config, policy, room, ranks.world, writers, is_on_host))
    return with_stage(config, stage), why


def choose_stage(
    config: PretrainConfig, policy: Checkpointing, room_bytes: int, world: int, writers: int, is_on_host: bool
) -> tuple[int, str]:
    """The lowest of stages 1 to 3 that fits, and why; with checkpointing `auto` the least recomputation counts for 1
    and 2, which cost no time, and the most for 3, which does. Where none fits, the one that needs least."""
    gentle, thorough = (FEWEST_FIRST[0], FEWEST_FIRST[-1]) if policy == "auto" else (policy, policy)
    tried: list[tuple[float, int]] = []
    fits = False
    for stage, of_policy in dict.fromkeys([(1, gentle), (2, gentle), (1, thorough), (2, thorough), (3, thorough)]):
        try:
            changed = with_stage(config, stage)
        except ConfigError:
            continue  # another setting does not go with it
        needed = rank_memory(cost_of(config, of_policy), changed, world, writers, is_on_host).needed(is_on_host)
        if stage == 3 and needed >= tried[-1][0]:
            continue  # what it gathers for a while is more than what it shares out
        tried.append((needed, stage))
        fits = tried[-1][0] <= (USABLE_AT_3 if stage == 3 else USABLE) * room_bytes
        if fits:
            break
    stage = tried[-1][1] if fits else min(tried)[1]
    told = ", ".join(f"{one} {needed / 2**30:.2f}" for needed, one in tried)
    verdict = "fits" if fits else "is the least there is"
    return stage, f"ZeRO stage auto: {stage} {verdict} (GiB: {told} of {room_bytes / 2**30:.2f} for a rank)"


USABLE_AT_3 = 0.65
"""Of the memory at stage 3, where predictions were a quarter too low (docs/benchmarks)."""


def with_stage(config: PretrainConfig, stage: int) -> PretrainConfig:
    """The config at another ZeRO stage, checked again."""
    values = config_values(config)
    values["train"]["zero_stage"] = stage
    return check_config(PretrainConfig, values, "train.zero_stage auto")


def _room(ranks: Ranks) -> int:
    """What the rank that has least may use, in bytes."""
    hosts = ranks.gather_objects(socket.gethostname())
    shared_by = hosts.count(hosts[ranks.rank]) if ranks.device.type != "cuda" else 1
    return int(min(ranks.gather([float(free_bytes(ranks.device) // shared_by)])[:, 0]))


def resolve_checkpointing(config: PretrainConfig, ranks: Ranks, writers: int = 1) -> tuple[Checkpointing, str]:
    """The policy of a run, the same on all ranks, and for `auto` a line that says why.

    Args:
        writers: Ranks that share the writing of checkpoints, and with it the copy in host memory.
    """
    policy = config.train.activation_checkpointing
    if policy != "auto":
        return policy, ""
    least, is_on_host = _room(ranks), ranks.device.type != "cuda"

    def needed_bytes(cost: Cost) -> float:
        return rank_memory(cost, config, ranks.world, writers, is_on_host).needed(is_on_host)

    return ranks.on_first(lambda: choose_policy(config, least, needed_bytes))


def free_bytes(device: torch.device) -> int:
    """What is free on the device now; on a CPU what the cgroup leaves, with what files are cached in."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory()[0]


def peak_resident_bytes() -> int:
    """The largest resident size that this process had, or had since its record was reset."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not getrusage: a process that was started by vfork begins with its parent's figure there.
    return resident_bytes("VmHWM")


def resident_bytes(name: str = "VmRSS") -> int:
    """A figure of /proc/self/status: what is resident now, or by "VmHWM" was at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)
