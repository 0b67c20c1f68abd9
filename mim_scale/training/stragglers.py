"""Which rank the others wait for: seconds of its own work in a step, before it meets the others.

Own work is waiting for data and the forward pass. The backward pass holds the reduction, in which all wait for the
slowest, so it says nothing about one rank; at ZeRO stage 3 the forward pass gathers weights, and lags are blurred.
"""

import statistics
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

WINDOW = 20
"""Steps that a rank is judged by."""
TIMES = 1.4
"""A rank that takes so many times what the ranks take in the middle is a straggler."""
CAUGHT_UP = 1.2
"""One that takes less than so many times is none any more."""
LEAST_SHARE = 0.05
"""Of a step's time that all must wait for it: less is not worth a line."""


class ForwardClock:
    """Seconds that a module's forward passes take on this rank; on a GPU nothing waits for it. Use it in a `with`."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module, self._is_cuda = module, device.type == "cuda"
        self._passes: list[tuple[Any, Any]] = []

    def take(self) -> float:
        """Seconds since the last call; the passes must be over, as they are once their losses were read."""
        passes, self._passes = self._passes, []
        if self._is_cuda:
            return float(sum(begin.elapsed_time(end) for begin, end in passes)) / 1000
        return float(sum(end - begin for begin, end in passes))

    def __enter__(self) -> Self:
        self._hooks = [
            self._module.register_forward_pre_hook(lambda *_: self._begin()),
            self._module.register_forward_hook(lambda *_: self._end()),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self) -> None:
        self._started = self._now()

    def _end(self) -> None:
        self._passes.append((self._started, self._now()))

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


class Stragglers:
    """Names ranks that lag behind the others, each once until it has caught up.

    Args:
        hosts: The machine of each rank.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._recent: deque[Sequence[float]] = deque(maxlen=WINDOW)
        self._named: set[int] = set()

    def note(self, own_s: Sequence[float], step_s: float) -> list[str]:
        """Take the seconds of each rank's own work in a step, and of the whole step; a line for each new straggler."""
        self._recent.append(own_s)
        if len(own_s) < 2 or len(self._recent) < WINDOW:
            return []
        usual = [statistics.median(column) for column in zip(*self._recent, strict=True)]
        # The lower of two in the middle: of two ranks the slow one must not be its own measure.
        middle = statistics.median_low(usual)
        still = {rank for rank in self._named if usual[rank] > CAUGHT_UP * middle}
        most = max(TIMES * middle, middle + LEAST_SHARE * step_s)
        slow = {rank for rank, seconds in enumerate(usual) if seconds > most}
        new, self._named = slow - still, slow | still
        return [
            f"rank {rank} on {self._hosts[rank]} is slow: {usual[rank]:.2f} s of data and forward pass a step, "
            f"{middle:.2f} s in the middle of the ranks; all wait for it: look at that machine"
            for rank in sorted(new)
        ]


def slowest(own_s: Sequence[float]) -> tuple[int, float]:
    """(rank, how many times the middle of the ranks it takes), of the one that takes longest in a step."""
    most = max(own_s)
    return list(own_s).index(most), most / max(statistics.median_low(own_s), 1e-9)
