"""How the data verbs talk: a progress bar, tables, and numbers as people read them."""

import io
import sys
from collections import Counter
from types import TracebackType
from typing import Any, Self

from rich import progress as bars
from rich.console import Console
from rich.table import Table

_WIDTH = 110
"""Of tables where the output is no terminal."""


class Bar:
    """A progress bar with rate and time left; silent where nobody watches."""

    def __init__(self, what: str = "volumes") -> None:
        self._what = what
        self._bars = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[rate]}"),
            bars.TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task: bars.TaskID | None = None
        self._headers: bars.TaskID | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def looked(self, done: int, total: int) -> None:
        """So many files were looked at."""
        if self._headers is None:
            self._headers = self._bars.add_task("headers read", total=total, rate="")
        self._bars.update(self._headers, completed=done, total=total)

    def began(self, done: int, total: int) -> None:
        """So many volumes are done already."""
        self._task = self._bars.add_task(self._what, total=total, completed=done, rate="")

    def advanced(self) -> None:
        """One more volume is done."""
        if self._task is not None:
            self._bars.advance(self._task)
            speed = self._bars.tasks[self._task].speed
            self._bars.update(self._task, rate=f"{speed * 60:.1f} a minute" if speed else "")

    def at(self, done: int, total: int) -> None:
        """So many of so many are done."""
        if self._task is None:
            self.began(0, total)
        while self._task is not None and self._bars.tasks[self._task].completed < done:
            self.advanced()


def console() -> Console:
    """Where verbs print."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of folders need not be valid text: they are printed as the system wrote them.
        sys.stdout.reconfigure(errors="surrogateescape")
    # Paths and details are shown as they are: square brackets in them are no markup.
    width = None if sys.stdout.isatty() else _WIDTH
    return Console(width=width, highlight=False, soft_wrap=True, markup=False, emoji=False)


def table(title: str, *columns: str) -> Table:
    """An empty table; columns that start with > are right-aligned."""
    rows = Table(title=title, title_justify="left", show_header=any(columns[1:]))
    for name in columns:
        rows.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    return rows


def reasons_table(title: str, reasons: Counter[str]) -> Table:
    """Inputs by reason, most frequent first."""
    rows = table(title, "reason", ">inputs")
    for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])):
        rows.add_row(reason, str(count))
    return rows


def shown_bytes(count: float) -> str:
    """A count of bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def shown(name: str, value: Any) -> str:
    """A value of a statistic, in a few words."""
    if name.startswith("bytes") and isinstance(value, int):
        return shown_bytes(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(str(key), inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return " ".join(shown("", inner) for inner in value)
    return str(value)
