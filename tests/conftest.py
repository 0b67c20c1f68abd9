"""Settings of the whole suite."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# No deadline: a loaded machine is no fault. Derandomized: the same examples each time, so that a failure is repeatable.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(scope="session", autouse=True)
def _own_home() -> None:
    """What a user's account holds (pseudonym key, headers of earlier scans) is the tests' own, also in subprocesses."""
    folder = Path(tempfile.mkdtemp(prefix="mim-scale-tests-"))
    os.environ["XDG_CONFIG_HOME"], os.environ["XDG_CACHE_HOME"] = str(folder / "config"), str(folder / "cache")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: one that starts last would keep one core busy while the others have nothing left to do."""
    items.sort(key=lambda item: not any(item.get_closest_marker(name) for name in ("launcher", "dist", "ray")))
