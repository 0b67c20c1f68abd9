"""How long ranks take to add numbers up, and whether the sums are right: what doctor and estimate measure links by."""

import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from mim_scale.training.ranks import Ranks

WARM_UP = 2
"""The first ones set connections up."""


def time_all_reduce(
    ranks: Ranks, num_bytes: int, repeats: int, device: torch.device, group: Any = None
) -> tuple[float, bool]:
    """(seconds, whether every sum was exact) of an all-reduce of float32; all ranks call it.

    Args:
        num_bytes: Of the numbers that each rank gives.
        repeats: Of which the median is taken, then the slowest rank's.
        device: Where they lie, which chooses gloo or NCCL.
        group: The ranks that add up, this one among them; None for all.
    """
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    own = (torch.arange(num_bytes // 4, device=device) % 1024).float() + ranks.rank
    times, total = [], own
    for _ in range(WARM_UP + repeats):
        total = own.clone()
        # All begin together.
        ranks.gather([0.0])
        _finish(device)
        start = time.perf_counter()
        dist.all_reduce(total, group=group)
        _finish(device)
        times.append(time.perf_counter() - start)
    shift = float(sum(members) - len(members) * ranks.rank)
    is_right = torch.equal(total, own * len(members) + shift)
    told = ranks.gather([statistics.median(times[WARM_UP:]), float(is_right)])
    return float(told[:, 0].max()), bool(told[:, 1].all())


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
