"""Twenty losses of runs whose ranks and workers change in mid-epoch: `make soak`. All pairs of worlds 1 to 4.

Each run is stopped by SIGTERM at a step that is drawn and taken up by another number of ranks, under torchrun. Beside
it stands a run of one rank that nothing met: losses, and the weights after the last step, to 1e-5 relative.
tests/training/test_worlds.py has the samples of worlds 1 to 8, bit for bit.
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.launch.runs import LIMIT_S, arguments, losses, until
from tests.synthetic import make_dataset
from tests.training.checkpoints import state_of
from tests.training.jobs import ROOT, environment, torchrun, write_config
from tests.training.standin import small_config

STEPS, BATCH = 20, 12
TOLERANCE = 1e-5


def main() -> int:
    """Every pair, one after another; a table, and 1 where a number is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the steps and the numbers of workers")
    parser.add_argument("--count", type=int, default=12, help="how many of the 12 pairs")
    parser.add_argument("--only", metavar="PAIR", help="one pair, for example 2-3")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    pairs = [pair for pair in itertools.permutations(range(1, 5), 2) if options.only in (None, f"{pair[0]}-{pair[1]}")]
    rows, began = [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mim-scale-worlds-") as name:
        folder = Path(name)
        # One is held out; no step before the last ends where an epoch of 17 does.
        make_dataset(folder / "store", [(40, 40, 40)] * 18)
        settings = {"steps": STEPS, "batch": BATCH, "engine": "plain"}
        config = write_config(small_config(str(folder / "store"), str(folder / "run"), **settings), folder)
        assert start(config, folder / "straight", Place(1, 1)).wait(LIMIT_S) == 0
        pairs = pairs[: options.count]
        for number, (before, then) in enumerate(pairs, start=1):
            rows.append(change(config, folder, random.Random(f"{options.seed} {before} {then}"), before, then))
            left = (time.monotonic() - began) / number * (len(pairs) - number)
            print(f"{number} of {len(pairs)}: {rows[-1]}; about {left:.0f} s left", flush=True)
    print("| ranks, workers | then | changed after step | steps | largest difference of a loss | of the weights | |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(row.line())
    return 0 if all(row.is_equal for row in rows) else 1


@dataclass(frozen=True)
class Place:
    """Where a run runs."""

    world: int
    workers: int

    def __str__(self) -> str:
        return f"{self.world}, {self.workers}"


@dataclass(frozen=True)
class Row:
    """What became of one change; differences are relative to the run that nothing met."""

    before: Place
    then: Place
    after: int
    steps: int
    loss: float
    weights: float

    @property
    def is_equal(self) -> bool:
        """Whether all 20 steps were made, on both sides of the change, and their numbers are within the tolerance."""
        return self.steps == STEPS and 0 < self.after < STEPS and max(self.loss, self.weights) <= TOLERANCE

    def line(self) -> str:
        """As a row of a table."""
        told = "" if self.is_equal else "NOT EQUAL"
        cells = [self.before, self.then, self.after, self.steps, f"{self.loss:.1e}", f"{self.weights:.1e}", told]
        return "| " + " | ".join(map(str, cells)) + " |"


def change(config: Path, folder: Path, shots: random.Random, before: int, then: int) -> Row:
    """One run on `before` ranks, stopped at a step that is drawn, and on `then` ranks to its end."""
    places = Place(before, shots.randint(0, 8)), Place(then, shots.randint(0, 8))
    output, stop_after = folder / f"run_{before}_{then}", shots.randint(1, STEPS - 6)
    job = start(config, output, places[0])
    until(lambda: len(losses(output)) >= stop_after, lambda: job.poll() is None)
    os.kill(json.loads((output / "run.lock").read_text())["pid"], signal.SIGTERM)
    job.wait(LIMIT_S)
    after = len(losses(output))
    assert start(config, output, places[1]).wait(LIMIT_S) == 0
    found, expected = losses(output), losses(folder / "straight")
    apart = max(abs(found[step] / expected[step] - 1) for step in found)
    return Row(*places, after, len(found), apart, weights_apart(output, folder / "straight"))


def start(config: Path, output: Path, place: Place) -> subprocess.Popen[bytes]:
    """The run on so many ranks, each with so many workers."""
    few = ["plan.levels.1.views=1", "plan.levels.2.views=1"]
    settings = [f"data.workers={place.workers}", "checkpoint.every=100", *few]
    with open(output.with_name(f"{output.name}.log"), "ab") as log:
        return subprocess.Popen(
            [*torchrun(place.world), *arguments(config, output), *settings],
            cwd=ROOT,
            env=environment(PYTHONPATH=str(ROOT)),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def weights_apart(output: Path, other: Path) -> float:
    """The norm of the difference beside the norm, but for attention's biases: keys' have no gradient but rounding."""
    sides = [state_of(path, STEPS)[0] for path in (output, other)]
    ours, theirs = (
        torch.cat([value.flatten() for name, value in side.items() if not name.endswith("qkv.bias")]) for side in sides
    )
    return float((ours - theirs).norm() / theirs.norm())


if __name__ == "__main__":
    sys.exit(main())
