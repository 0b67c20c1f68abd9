"""What a micro-batch of a run takes, predicted without computing it, and measured where that is asked for.

For each checkpointing policy: parameters, arithmetic, memory. How long a run takes is said by `estimate_run`.
"""

import ctypes
import gc
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mim_scale.config import Checkpointing, PretrainConfig
from mim_scale.methods.build import build_method
from mim_scale.methods.cost import FEWEST_FIRST, Cost, cost_of
from mim_scale.methods.noise import noise_batch
from mim_scale.training.memory import peak_resident_bytes, resident_bytes


@dataclass(frozen=True)
class Measured:
    """Of one forward and backward pass, after another one, so that gradients are there as in most of a run."""

    flops: int
    peak_bytes: int
    """Above what the process held before the network was built; the optimizer's moments, which it lacks, added."""
    seconds: float


def estimate(config: PretrainConfig, policies: tuple[Checkpointing, ...] = FEWEST_FIRST) -> dict[Checkpointing, Cost]:
    """The predicted cost under each policy."""
    return {policy: cost_of(config, policy) for policy in policies}


def measure(config: PretrainConfig, policy: Checkpointing) -> Measured:
    """One micro-batch of noise through the network, on a GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = noise_batch(config, device)
    before = reset_peak(device)
    method = build_method(config, policy).to(device)
    precision = torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.train.precision == "bf16")
    with precision:
        method(batch).total.backward()
    reset_peak(device)
    start = time.perf_counter()
    with precision:
        method(batch).total.backward()
    seconds = time.perf_counter() - start
    trained = sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)
    peak = _peak(device) - before + trained * 8
    # In a pass of its own: the counter keeps what it has seen from being freed.
    with FlopCounterMode(display=False) as counted, precision:
        method(batch).total.backward()
    return Measured(counted.get_total_flops(), peak, seconds)


def as_values(costs: dict[Checkpointing, Cost], measured: dict[Checkpointing, Measured]) -> dict[str, Any]:
    """For scripts."""
    return {
        policy: asdict(cost)
        | {"bytes": cost.bytes}
        | ({"measured": asdict(measured[policy])} if policy in measured else {})
        for policy, cost in costs.items()
    }


def reset_peak(device: torch.device) -> int:
    """Forget the highest use so far, give freed memory back; bytes in use now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if platform.system() == "Linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes()


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_resident_bytes()
