"""Dataset descriptions that are broken, which stop the scan with one line, and look-alikes, which are ignored."""

import shutil
from collections.abc import Callable
from pathlib import Path

from mim_scale.store.volume import Volume
from tests.pipeline.bad_descriptions import BAD_DESCRIPTIONS
from tests.pipeline.corpus.case import STOPS, Case, refused

FAMILY = "dataset descriptions"


def _made(make: Callable[[Path], Path]) -> Callable[[Path, Volume], None]:
    def write(root: Path, good: Volume) -> None:
        made = root.parent / "made"
        shutil.copytree(make(made), root, dirs_exist_ok=True, symlinks=True)
        shutil.rmtree(made)

    return write


# The images beside a look-alike are three files of a few bytes.
CASES = [
    Case(FAMILY, name, _made(make), (STOPS,) if pattern else (refused("unreadable"),) * 3)
    for name, make, pattern in BAD_DESCRIPTIONS
]
