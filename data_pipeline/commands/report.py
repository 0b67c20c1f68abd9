"""`mim-scale data report`: what a store holds, as one page to look at."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from data_pipeline.commands.console import console, shown_bytes
from mim_scale.bar import Bar
from mim_scale.errors import ConfigError, DamagedError


def report(
    store: Path,
    out: Path = Path("report.html"),
    leakage: Path | None = None,
    num_sample: int = 24,
    seed: int = 0,
    as_json: bool = False,
) -> int:
    """Write the report of a store, or print its numbers as JSON; 3 where a volume that was to be drawn is damaged.

    Raises:
        StoreError: no store there.
        SourceError: the leakage certificate cannot be used.
    """
    from data_pipeline.report import make
    from data_pipeline.report.leakage import read_certificate

    if num_sample < 0:
        raise ConfigError(f"--sample is {num_sample}, expected how many volumes to draw, 0 or more")
    found = read_certificate(leakage) if leakage is not None else None
    if as_json:
        print(json.dumps(make.as_json(store) | {"leakage": found}, indent=1))
        return 0
    with _Bars() as bars:
        made = make.make_report(store, out, found, num_sample, seed, bars)
    say = console().print
    say(f"{out}: {made.num_volumes} volumes, {made.num_refused} refused inputs, {made.num_outliers} outliers, ", end="")
    say(f"{made.num_pictures} volumes drawn; {shown_bytes(made.num_bytes)}, needs no network")
    for line in made.damaged:
        say(f"damaged: {line}")
    return DamagedError.exit_code if made.damaged else 0


class _Bars:
    """How far it is: a bar for each of two phases, one after the other."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._bars: dict[str, Bar] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def rows(self, done: int, total: int) -> None:
        self._at("rows", done, total)

    def pictures(self, done: int, total: int) -> None:
        self._at("pictures", done, total)

    def _at(self, phase: str, done: int, total: int) -> None:
        if phase not in self._bars:
            self._open.close()
            self._bars[phase] = self._open.enter_context(Bar(phase))
        self._bars[phase].at(done, total)
