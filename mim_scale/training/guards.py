"""Whether a step is made or left out; the same on every rank, and again after a restart.

What it remembers is in the journal: losses of the last steps, and which ones were left out.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Any

from mim_scale.config import GuardsConfig

WINDOW = 128
"""Losses that a new one is compared with; before there are so many, none counts as a spike."""
SIGMAS = 6.0
NOT_FINITE = "the loss is not finite"
NOT_FINITE_GRADIENT = "the gradient is not finite"
SPIKE = "the loss is a spike"


class Guards:
    """Judges steps by their global loss, in order."""

    def __init__(self, config: GuardsConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self.updates = 0
        """Steps that were made, the optimizer's own count."""
        self.in_a_row = 0
        """The last steps that were left out because something was not finite."""

    def recall(self, rows: Iterable[dict[str, Any]], step: int, updates: int) -> None:
        """Take up a run after `step` steps, `updates` of them made; its journal's rows may go on beyond them."""
        for row in rows:
            if row["kind"] == "step" and row["step"] <= step:
                self.note(row["loss"], row.get("left_out", ""))
        self.updates = updates

    def judge(self, loss: float) -> str:
        """Why a step with this loss is noteworthy; empty where it is not."""
        if not math.isfinite(loss):
            return NOT_FINITE
        return SPIKE if self._is_spike(loss) else ""

    def leaves_out(self, reason: str) -> bool:
        """Whether a step that is noteworthy for this reason is left out."""
        return bool(reason) and (reason != SPIKE or self._config.spikes == "skip")

    def note(self, loss: float | None, reason: str) -> None:
        """Remember a step that was made (no reason) or left out."""
        if reason:
            self.in_a_row = 0 if reason == SPIKE else self.in_a_row + 1
            return
        self.updates += 1
        self.in_a_row = 0
        if loss is not None:
            self._losses.append(loss)

    @property
    def has_enough(self) -> bool:
        """Whether more steps in a row were left out than the config allows."""
        return self.in_a_row > self._config.skips_in_a_row

    def _is_spike(self, loss: float) -> bool:
        if len(self._losses) < WINDOW:
            return False
        mean = statistics.fmean(self._losses)
        return loss > mean + SIGMAS * statistics.pstdev(self._losses, mean)
