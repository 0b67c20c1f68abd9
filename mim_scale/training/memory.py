"""How much memory a rank may use, and the checkpointing policy that fits it."""

import os
import resource
import socket
import sys
from pathlib import Path

import torch

from mim_scale.config import Checkpointing, PretrainConfig
from mim_scale.config_file import check_config, config_values
from mim_scale.methods.cost import FEWEST_FIRST, USABLE, Cost, choose_policy, cost_of
from mim_scale.training.rank_memory import rank_memory
from mim_scale.training.ranks import Ranks


def resolve_stage(config: PretrainConfig, ranks: Ranks, writers: int = 1) -> tuple[PretrainConfig, str]:
    """The config with a ZeRO stage in the place of `auto`, the same on all ranks, and a line that says why.

    Args:
        writers: As in `resolve_checkpointing`.

    Raises:
        ConfigError: only stage 3 fits, and another setting rules it out.
    """
    if config.train.engine != "deepspeed" or config.train.zero_stage != "auto":
        return config, ""
    room, is_on_host = _room(ranks), ranks.device.type != "cuda"
    policy = config.train.activation_checkpointing
    stage, why = ranks.broadcast(
        choose_stage(config, policy, room, ranks.world, writers, is_on_host) if ranks.rank == 0 else (1, "")
    )
    return with_stage(config, stage), why


def choose_stage(
    config: PretrainConfig, policy: Checkpointing, room_bytes: int, world: int, writers: int, is_on_host: bool
) -> tuple[int, str]:
    """The lowest of stages 1 to 3 that fits, and why; with checkpointing `auto` the least recomputation counts for 1
    and 2, which cost no time, and the most for 3, which does."""
    gentle, thorough = (FEWEST_FIRST[0], FEWEST_FIRST[-1]) if policy == "auto" else (policy, policy)
    told = []
    for stage, of_policy in dict.fromkeys([(1, gentle), (2, gentle), (1, thorough), (2, thorough), (3, thorough)]):
        cost, changed = cost_of(config, of_policy), with_stage(config, stage)
        needed = rank_memory(cost, changed, world, writers, is_on_host).needed(is_on_host)
        told.append(f"{stage} {needed / 2**30:.2f}")
        if needed <= USABLE * room_bytes:
            break
    verdict = "fits" if needed <= USABLE * room_bytes else "is the least there is"
    return stage, f"ZeRO stage auto: {stage} {verdict} (GiB: {', '.join(told)} of {room_bytes / 2**30:.2f} for a rank)"


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

    return ranks.broadcast(choose_policy(config, least, needed_bytes) if ranks.rank == 0 else ("none", ""))


def free_bytes(device: torch.device) -> int:
    """What is free on the device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
