"""How far a run is: a bar on a terminal, a plain line every few seconds elsewhere; rank 0 only."""

import sys
import time
from typing import Any

PLAIN_EVERY_S = 5.0
SMOOTHING = 0.2


class Progress:
    """Shows loss, rate and time left.

    Args:
        start: Updates made already.
        steps: Updates in all.
        batch: Samples of an update.
        is_shown: False on ranks that stay silent.
    """

    def __init__(self, start: int, steps: int, batch: int, is_shown: bool) -> None:
        self._steps, self._batch, self._is_shown = steps, batch, is_shown
        self._seconds = 0.0
        self._last_line = 0.0
        self._bar: Any = None
        if is_shown and sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn

            self._bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[facts]}"))
            self._task = self._bar.add_task("training", total=steps, completed=start, facts="")
            self._bar.start()

    def step(self, done: int, loss: float, learning_rate: float, seconds: float, wait_s: float) -> None:
        """Tell of one update that took `seconds`, of which `wait_s` were spent waiting for data."""
        if not self._is_shown:
            return
        self._seconds = seconds if self._seconds == 0.0 else (1 - SMOOTHING) * self._seconds + SMOOTHING * seconds
        left = duration((self._steps - done) * self._seconds)
        facts = (
            f"step {done}/{self._steps}  loss {loss:.4f}  lr {learning_rate:.1e}  {self._batch / self._seconds:.2f} "
            "samples/s  "
            f"data wait {wait_s / seconds:.0%}  {left} left"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=done, facts=facts)
        elif time.monotonic() - self._last_line >= PLAIN_EVERY_S or done == self._steps:
            self._last_line = time.monotonic()
            print(facts, flush=True)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if not self._is_shown:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def duration(seconds: float) -> str:
    """Seconds as people say them: `41 s`, `3 min 20 s`, `5 h 12 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
