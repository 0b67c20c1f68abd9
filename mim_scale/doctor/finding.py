"""What a check of `mim-scale doctor` says. A check that raises, or does not end, has found something too."""

import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from mim_scale.errors import MimScaleError, host_error

Level = Literal["ok", "note", "warning", "error"]

EXIT: dict[Level, int] = {"ok": 0, "note": 0, "warning": 1, "error": 2}
"""What a finding makes of the exit code: 1 something will hurt, 2 a run cannot work."""
LIMIT_S = 60.0
"""How long a check may take: a dead file server or driver answers never, a slow one takes its time to import torch."""
GIB = 2**30
INSTALL = "install the project again: pip install -c constraints.txt -e ."


_TO_DO = re.compile(
    r"(.+)(?:; |: (?=(?:check|choose|give|have|leave|look|lower|make|raise|set|start|take|use|write)\b))(.+)", re.DOTALL
)
"""Our messages say what is wrong, then what to do."""


@dataclass(frozen=True)
class Finding:
    """How bad, by which check, what was found, and what to do about it in one line."""

    level: Level
    check: str
    found: str
    remedy: str = ""


Check = Callable[[], Iterable[Finding]]


def run_check(name: str, check: Check, limit_s: float = LIMIT_S) -> list[Finding]:
    """What a check finds; what it raises, and that it does not end in time, is a finding beside those before it."""
    found: list[Finding] = []

    def collect() -> None:
        try:
            for finding in check():
                found.append(finding)
        except Exception as error:
            found.append(failure(name, error))

    # A daemon: the process must be able to end although a system call of the check never does.
    thread = threading.Thread(target=collect, name=f"mim-doctor-{name}", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        collect()  # no more threads may start, which a check will say
        return found
    thread.join(limit_s)
    if thread.is_alive():
        hint = "look for a file server, a driver or a server that hangs"
        return [*found, Finding("error", name, f"no answer within {limit_s:g} s", hint)]
    return found


def failure(name: str, error: Exception) -> Finding:
    """An exception as a finding: an error where it is the user's to mend, else a warning that the check is broken."""
    if isinstance(error, ImportError) and error.name:
        return Finding("error", name, f"{error.name} cannot be imported: {short(error)}", INSTALL)
    known = host_error(error) if isinstance(error, OSError) else error
    if isinstance(known, MimScaleError):
        parts = _TO_DO.fullmatch(str(known))
        return Finding("error", name, *(parts.groups() if parts else (str(known), "mend what the line names")))
    text = f"the check itself failed: {type(error).__name__}: {short(error)}"
    return Finding("warning", name, text, "please report it, with this line")


def short(error: BaseException | str) -> str:
    """An error's text in one line."""
    return " ".join(str(error).split())[:200]


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / GIB:,.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"
