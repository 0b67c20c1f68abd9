"""The table of a GPU in bfloat16, eager and compiled: samples a second, utilisation, GB/s and peak memory."""

import statistics
from dataclasses import dataclass

import torch

from mim_scale.bench.arithmetic import measure_work, visible_flops
from mim_scale.config import PretrainConfig
from mim_scale.config_file import check_config, config_values
from mim_scale.methods.build import build_method
from mim_scale.methods.noise import noise_batch
from mim_scale.training.compiled import compile_blocks

PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense bfloat16 by a part of the device's name, as the maker states them for the SXM kind."""


@dataclass(frozen=True)
class OnGpu:
    """One way of running a config's step."""

    way: str
    samples_per_second: float
    mfu: float | None
    """Of visible-only FLOPs; None where the device's peak or the formula is not known."""
    gigabytes_per_second: float | None
    """As if nothing stayed in a cache; None where compiled, as operations are then other ones."""
    peak_bytes: int
    loss: float


def measure_on_gpu(config: PretrainConfig, runs: int) -> list[OnGpu]:
    """Eager and compiled, on the same weights and batch; forward, backward and fused AdamW."""
    found = []
    for way in ("eager", "compiled"):
        values = config_values(config)
        values["train"] |= {"precision": "bf16"}
        found.append(_measure(check_config(PretrainConfig, values, "bench step"), way, runs))
        torch.cuda.empty_cache()
    return found


def _measure(config: PretrainConfig, way: str, runs: int) -> OnGpu:
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    batch, method = noise_batch(config, device), build_method(config).to(device)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-4, fused=True)
    if way == "compiled":
        compile_blocks(method, config)

    def passes() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            total: torch.Tensor = method(batch).total
        total.backward()  # type: ignore[no-untyped-call]
        return total.detach()

    loss = float(passes())
    seconds = []
    for _ in range(runs + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        passes()
        optimizer.step()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
    peak = torch.cuda.max_memory_allocated()
    each, samples = statistics.median(seconds[2:]), config.train.micro_batch
    moved = measure_work(passes).moved_bytes if way == "eager" else None
    needed = visible_flops(config)
    most = next((flops for part, flops in PEAK_FLOPS.items() if part in torch.cuda.get_device_name()), None)
    return OnGpu(
        way,
        samples / each,
        needed * samples / each / most if needed and most else None,
        moved / each / 1e9 if moved else None,
        peak,
        loss,
    )
