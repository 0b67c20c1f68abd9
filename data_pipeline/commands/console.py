"""How the data verbs talk: tables, and numbers as people read them."""

import io
import sys
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

_WIDTH = 110
"""Of tables where the output is no terminal."""
_WIDE = 10_000
"""Of tables with paths there: whoever searches in them needs each in one piece."""


def console(is_wide: bool = False) -> Console:
    """Where verbs print; wide where paths are among what is printed."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of folders need not be valid text: they are printed as the system wrote them.
        sys.stdout.reconfigure(errors="surrogateescape")
    # Paths and details are shown as they are: square brackets in them are no markup.
    width = None if sys.stdout.isatty() else _WIDE if is_wide else _WIDTH
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
