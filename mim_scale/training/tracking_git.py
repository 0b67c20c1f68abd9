"""Which code a run ran: the commit of the checkout that this package lies in, where it lies in one."""

import functools
import subprocess
from pathlib import Path
from typing import Any

GIT_S = 10.0
"""How long git may take on a slow file system before the run starts without its answer."""


@functools.cache
def git_state(package: Path = Path(__file__).parents[1]) -> dict[str, Any]:
    """`commit`, and `is_dirty`: whether files that git tracks differ from it.

    Args:
        package: A folder of code; one that merely lies inside some other checkout (a virtual environment) is not of it.

    Returns:
        Nothing where the code is of no checkout, or git is missing or does not answer.
    """
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return {}
    commit, changes = _git(package, "rev-parse", "HEAD"), _git(package, "status", "--porcelain", "-uno")
    if commit is None or changes is None:
        return {}
    return {"commit": commit, "is_dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        # No optional locks: asking must not get in the way of the user's own git.
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        job = subprocess.run(command, capture_output=True, text=True, timeout=GIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return job.stdout.strip()
