"""`mim-scale data verify`: is every committed byte still there and as it was; --repair makes it so again."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.commands.console import console, table
from mim_scale.bar import Bar
from mim_scale.errors import DamagedError
from mim_scale.store.dataset import Dataset
from mim_scale.store.verify import Problem, strangers, volume_problems
from mim_scale.store.verify import verify as check


@dataclass(frozen=True)
class VerifyOptions:
    """How a store is verified."""

    deep: bool = False
    """Decode every voxel and compare with the manifest, too."""
    share: float = 1.0
    """Of the volumes; `seed` says which."""
    seed: int = 0
    workers: int | None = None
    """Threads; one a core by default."""
    json: bool = False
    repair: str | None = None
    """The source to build damaged volumes from again."""
    key_file: str | None = None
    """The secret behind the store's pseudonyms, for repair; the user's own by default."""


def verify(store: Path | str, values: Mapping[str, Any] | None = None) -> int:
    """Check a store against its own records; 3 where something is damaged, and stays so.

    Args:
        values: Of VerifyOptions, by name.

    Raises:
        StoreError: no store there; or it cannot be repaired from that source.
        SourceError: the source to repair from is missing.
    """
    options = VerifyOptions(**values or {})
    path = Path(store)
    checked = _Progress()
    with checked.bar:
        problems = check(
            path, options.deep, checked.at, share=options.share, seed=options.seed, workers=options.workers
        )
    if options.repair is not None and any(problem.key for problem in problems):
        problems = _repair(path, problems, options)
    others = _strangers(path)
    if options.json:
        values = {
            "store": str(store),
            "whole": not problems,
            "volumes_checked": checked.done,
            "deep": options.deep,
            "problems": [asdict(problem) for problem in problems],
            "unknown": others,
        }
        print(json.dumps(values, indent=1))
    else:
        _tell(path, problems, others, _told_volumes(path, options, checked.done), options)
    return DamagedError.exit_code if problems else 0


class _Progress:
    """A bar, and how far it came."""

    def __init__(self) -> None:
        self.bar = Bar("volumes checked")
        self.done = 0

    def at(self, done: int, total: int) -> None:
        self.done = done
        self.bar.at(done, total)


def _repair(path: Path, problems: Sequence[Problem], options: VerifyOptions) -> list[Problem]:
    """What is still wrong after the damaged volumes were built again."""
    from data_pipeline.build.repair import repair

    assert options.repair is not None
    dataset = Dataset.open(path)
    damaged = Counter(problem.key for problem in problems if problem.key)
    with Bar() as progress:
        failed = repair(dataset, damaged.keys(), options.repair, options.key_file, options.workers, progress.looked)
    remaining = [problem for problem in problems if not problem.key]
    for row in dataset.rows:
        if row.key in failed:
            remaining.append(Problem(row.key, -1, f"volume {row.key}: is damaged, and {failed[row.key]}"))
        elif row.key in damaged:
            remaining += volume_problems(dataset, row, options.deep)
    if not options.json:
        whole = len(damaged.keys() - {problem.key for problem in remaining})
        console().print(f"{path}: {whole} of {len(damaged)} damaged volumes were built again and checked")
    return remaining


def _strangers(path: Path) -> list[str]:
    """Folders that the store does not know; none where its own records cannot say."""
    try:
        return strangers(path)
    except DamagedError:
        return []


def _told_volumes(path: Path, options: VerifyOptions, done: int) -> str:
    if options.share >= 1 or not done:
        return f"{done} volumes"
    return f"{done} of {len(Dataset.open(path).rows)} volumes, drawn with seed {options.seed}"


def _tell(path: Path, problems: Sequence[Problem], others: Sequence[str], volumes: str, options: VerifyOptions) -> None:
    out = console()
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        out.print(f"volumes/ holds what is no volume of this store, and is never read: {shown}")
    if not problems:
        out.print(
            f"{path}: whole ({volumes}; every byte"
            f"{', and every voxel was decoded' if options.deep else '; --deep decodes all, too'})"
        )
        return
    rows = table(f"damage in {path} ({volumes} checked)", "volume", "level", "what")
    for problem in problems:
        rows.add_row(problem.key, "" if problem.level < 0 else str(problem.level), problem.detail)
    out.print(rows)
    if any(problem.key for problem in problems) and options.repair is None:
        out.print("mend these volumes with `mim-scale data verify STORE --repair SOURCE`; others are not touched")
    if any(not problem.key for problem in problems):
        mended = "--repair mends volumes, not the store's own records: " if options.repair is not None else ""
        out.print(f"{mended}run the same `data build`: it writes the store's own records again and keeps the volumes")
