"""The one progress bar of the verbs: what is counted, rate, time left; silent where nobody watches."""

import sys
import time
from types import TracebackType
from typing import Self

from rich import progress as bars
from rich.console import Console


class Bar:
    """A progress bar on standard error.

    Args:
        what: is counted, as shown before the bar.
        in_bytes: What is counted are bytes.
    """

    def __init__(self, what: str = "volumes", in_bytes: bool = False) -> None:
        self._what = what
        counts: tuple[bars.ProgressColumn, ...] = (bars.MofNCompleteColumn(), bars.TextColumn("{task.fields[rate]}"))
        self._bars = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            *((bars.DownloadColumn(), bars.TransferSpeedColumn()) if in_bytes else counts),
            bars.TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task: bars.TaskID | None = None
        self._headers: bars.TaskID | None = None
        self._started = time.monotonic()
        self._bytes = 0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def looked(self, done: int, total: int) -> None:
        """So many files were looked at: a bar of its own, above."""
        if self._headers is None:
            self._headers = self._bars.add_task("headers read", total=total, rate="")
        self._bars.update(self._headers, completed=done, total=total)

    def began(self, done: int, total: int) -> None:
        """So many are done already, of so many."""
        self._task = self._bars.add_task(self._what, total=total, completed=done, rate="")
        self._started = time.monotonic()

    def advanced(self, count: int = 1, num_bytes: int = 0) -> None:
        """So many more are done; `num_bytes` is what they took, where it tells something."""
        if self._task is None:
            return
        self._bytes += num_bytes
        self._bars.advance(self._task, count)
        if speed := self._bars.tasks[self._task].speed:
            rate = f"{speed:.1f} a second" if speed >= 1 else f"{speed * 60:.1f} a minute"
            if self._bytes:
                rate += f", {self._bytes / max(time.monotonic() - self._started, 1e-3) / 1e6:.0f} MB/s"
            self._bars.update(self._task, rate=rate)

    def at(self, done: int, total: int) -> None:
        """So many of so many are done."""
        if self._task is None:
            self.began(0, total)
        if self._task is not None and done > self._bars.tasks[self._task].completed:
            self.advanced(done - int(self._bars.tasks[self._task].completed))
