"""How much memory a rank may use, and the checkpointing policy that fits it."""

import os
import resource
import socket
import sys
from pathlib import Path

import torch

from mim_scale.config import Checkpointing, PretrainConfig
from mim_scale.methods.cost import Cost, choose_policy
from mim_scale.training.rank_memory import rank_memory
from mim_scale.training.ranks import Ranks


def resolve_checkpointing(config: PretrainConfig, ranks: Ranks, writers: int = 1) -> tuple[Checkpointing, str]:
    """The policy of a run, the same on all ranks, and for `auto` a line that says why.

    Args:
        writers: Ranks that share the writing of checkpoints, and with it the copy in host memory.
    """
    policy = config.train.activation_checkpointing
    if policy != "auto":
        return policy, ""
    hosts = ranks.gather_objects(socket.gethostname())
    is_on_host = ranks.device.type != "cuda"
    room = free_bytes(ranks.device) // (hosts.count(hosts[ranks.rank]) if is_on_host else 1)
    least = int(min(ranks.gather([float(room)])[:, 0]))

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
