"""What a rank tells the supervisor that had it started: that it lives, where its run folder is, the code it ends with.

Launchers answer with codes of their own when a rank is gone (247, 1, 137), so the ranks say themselves why they end:
one file a process, lines of JSON, in the folder that MIM_SCALE_EXIT names. Nothing is written where it names none. A
rank that was killed has begun and has told no code.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = "MIM_SCALE_EXIT"
"""The variable that names the folder."""


@dataclass(frozen=True)
class ExitReport:
    """What one process told: its rank, the run folder once its config was read, its exit code once it ended."""

    pid: int
    rank: int
    output: str | None = None
    code: int | None = None


def tell_supervisor(environment: Mapping[str, str], **facts: int | str) -> None:
    """Add facts (the fields of `ExitReport`) to this process's file; to no avail where the supervisor has gone."""
    if FOLDER not in environment:
        return
    with contextlib.suppress(OSError), open(Path(environment[FOLDER]) / f"{os.getpid()}.jsonl", "a") as file:
        file.write(json.dumps({"pid": os.getpid(), **facts}) + "\n")


def read_reports(folder: Path) -> list[ExitReport]:
    """What was told in a folder, in order of rank; a line that a killed process left unfinished is passed over."""
    reports = []
    for path in folder.glob("*.jsonl"):
        facts: dict[str, int | str] = {"rank": -1}
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                facts.update(json.loads(line))
        if "pid" in facts:
            reports.append(ExitReport(**facts))  # type: ignore[arg-type]  # written by tell_supervisor
    return sorted(reports, key=lambda report: report.rank)
