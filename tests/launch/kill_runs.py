"""Is a run that was killed at any instant the one that nothing met? `make soak`: SIGKILL at steps and inside saves.

A case is one small run that is killed again and again and taken up each time. After each kill every checkpoint must be
whole and hold, bit for bit, what the run that nothing met had at that step; at the end losses, weights, moments and the
order of samples must be that run's. Most cases fork a process that has torch imported already (one rank); the others go
through torchrun and DeepSpeed's launcher with two ranks. A case that fails says how to run it alone: the same choices,
but the instants are the clock's.
"""

import argparse
import collections
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mim_scale.config import PretrainConfig
from mim_scale.config_file import check_config, config_values
from mim_scale.errors import MimScaleError
from mim_scale.training.checkpoint import CheckpointFolder, read_checkpoint
from mim_scale.training.journal import read_journal
from tests.launch.starts import LIMIT_S, Forked, Launched, Start, finished
from tests.launch.told import History, Told, samples
from tests.synthetic import make_dataset
from tests.training.jobs import write_config
from tests.training.standin import small_config

STEPS, BATCH = 12, 2
KILLS_A_CASE = 8
OUTSIDE = "no save under way"
PARTS = ("step", "save", "launched-step", "launched-save")
Tensors = dict[str, torch.Tensor]


def main() -> int:
    """Count kills of each part until there are enough; a table, and 1 where anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the steps, saves, instants and victims")
    counts = ("60", "200", "4", "8")
    for part, count in zip(PARTS, counts, strict=True):
        parser.add_argument(f"--{part}", type=int, default=int(count), metavar="COUNT", help="kills of this part")
    parser.add_argument("--only", metavar="CASE", help="one case, as its failure names it: save-17")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="mim-scale-kills-") as folder:
        range_ = Range(Path(folder), options.seed)
        if options.only:
            part, _, number = options.only.rpartition("-")
            range_.case(part, int(number))
        else:
            wanted = {part: getattr(options, part.replace("-", "_")) for part in PARTS}
            for part in PARTS:
                number = 0
                while range_.enough(part, wanted, number):
                    range_.case(part, number)
                    number += 1
                if range_.tallies[part].kills < wanted[part]:
                    range_.failures.append(f"{part}: {range_.tallies[part].kills} kills, {wanted[part]} were wanted")
        print(range_.table())
        for line in range_.failures:
            print(line)
    return 1 if range_.failures else 0


@dataclass
class Tally:
    """What became of one part."""

    kills: int = 0
    elsewhere: int = 0
    """Kills that were aimed at a save and came when its checkpoint had its name already."""
    cases: int = 0
    most_again: int = 0
    """The most steps that one kill cost."""
    seen: collections.Counter[str] = field(default_factory=collections.Counter)


class Range:
    """The runs that nothing met, and the cases that are compared with them.

    Args:
        folder: For all of it.
        seed: Of every case's choices.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed, self.failures = folder, seed, list[str]()
        self.tallies = {part: Tally() for part in PARTS}
        self.compared = 0
        self._began = time.monotonic()
        self._saves_s, self._steps_s = {1: [0.02], 2: [0.05]}, {1: [0.2], 2: [0.3]}
        Forked.prepare()
        # In a process of its own: this one must stay without threads, since it forks.
        finished(Forked(lambda: int(make_dataset(folder / "store") is None), folder / "log_store"))
        self._straight: dict[int, dict[str, tuple[Tensors, Tensors]]] = {}

    def enough(self, part: str, wanted: dict[str, int], number: int) -> bool:
        """Whether a case is still to be made; tells how far all is."""
        done = {name: min(tally.kills, wanted[name]) for name, tally in self.tallies.items()}
        if number % 5 == 0 or part.startswith("launched"):
            spent = time.monotonic() - self._began
            left = spent / max(sum(done.values()), 1) * (sum(wanted.values()) - sum(done.values()))
            told = ", ".join(f"{name} {done[name]}/{wanted[name]}" for name in PARTS)
            print(f"kills: {told}; about {left:.0f} s left; {len(self.failures)} failures", flush=True)
        # A part whose cases never hit anything has a fault of its own.
        return done[part] < wanted[part] and number < 20 + wanted[part] and len(self.failures) < 5

    def case(self, part: str, number: int) -> None:
        """One run, killed and taken up until it is done."""
        folder = self.folder / f"{part}-{number}"
        folder.mkdir()
        try:
            self._case(part, number, folder)
        except (AssertionError, MimScaleError) as error:
            kept = Path(tempfile.mkdtemp(prefix=f"mim-scale-{part}-{number}-"))
            shutil.copytree(folder, kept, dirs_exist_ok=True, ignore=shutil.ignore_patterns("told"))
            again = f"python -m tests.launch.kill_runs --seed {self.seed} --only {part}-{number}"
            self.failures.append(f"FAILED {part}-{number}: {' '.join(str(error).split())}; kept in {kept}; {again}")
            print(self.failures[-1], flush=True)
        shutil.rmtree(folder)

    def _case(self, part: str, number: int, folder: Path) -> None:
        shots, tally = random.Random(f"{self.seed} {part} {number}"), self.tallies[part]
        world = 2 if part.startswith("launched") else 1
        config = self._config(folder / "run", world, every=1 if part.endswith("save") else shots.choice([1, 2, 3]))
        if world not in self._straight:
            self._straight[world] = self._straight_run(world)
        tally.cases += 1
        begun_at: dict[int, int] = {}
        step = 0
        for _ in range(KILLS_A_CASE):
            told = Told(folder)
            start = self._start(config, folder, world, shots, told)
            try:
                history, where = self._fire(part, start, told, shots)
            finally:
                start.end()
                told.close()
            begun_at.update(dict.fromkeys(history.pids, step))
            if where is None:
                assert start.code == 0, f"ended with {start.code}: {start.log.read_text()[-500:]}"
                break
            step, again = self._look(folder / "run", world, history)
            tally.most_again = max(tally.most_again, again)
            if part.endswith("save") and where == OUTSIDE:
                tally.elsewhere += 1
            else:
                tally.kills += 1
                tally.seen[where] += 1
        finished(self._start(config, folder, world, shots))
        self._compare(folder, world, begun_at, step)

    def _fire(self, part: str, start: Start, told: Told, shots: random.Random) -> tuple[History, str | None]:
        """Kill a start at an instant of a step or a save that is drawn; where in a save, None where it ended before."""
        history, number, share = History(), shots.randint(0, 3), shots.random()
        is_save, world = part.endswith("save"), 2 if part.startswith("launched") else 1
        paces = (self._saves_s if is_save else self._steps_s)[world]
        # However many were measured, as many numbers are drawn.
        pace = paces[int(shots.random() * len(paces))]
        where, deadline = None, time.monotonic() + LIMIT_S
        while start.is_alive():
            assert time.monotonic() < deadline, "it does not end"
            for event in told.read(0.05):
                history.add(event)
            reached = history.begun if is_save else history.steps
            if where is None and (len(reached) > number or (not is_save and number == 0 and history.pids)):
                time.sleep(share * pace)
                start.strike(history.pids, shots)
                # What lies in the pipe was done before.
                while events := told.read(0):
                    for event in events:
                        history.add(event)
                where = str(history.saving) if history.is_saving else OUTSIDE
        self._saves_s[world] += history.saves_s
        self._steps_s[world] += [b - a for a, b in zip(history.steps, history.steps[1:], strict=False)]
        return history, where

    def _look(self, run: Path, world: int, history: History) -> tuple[int, int]:
        """After a kill: (the step where it is taken up, steps that are made again); what is lost is an error."""
        folder = CheckpointFolder(run / "checkpoints", keep=2)
        for path in folder.folders():
            self._same_state(path, world)
            self.compared += 1
        newest = folder.newest(tell=_refuse)
        step = 0 if newest is None else newest.step
        assert step >= max(history.published, default=0), f"a published checkpoint is lost: {history.published}, {step}"
        rows = [row["step"] for row in read_journal(run / "journal.jsonl") if row["kind"] == "step"]
        assert step <= len(rows) == max(rows, default=0), f"the checkpoint is of step {step}, the journal has {rows}"
        return step, len(rows) - step

    def _same_state(self, path: Path, world: int) -> None:
        ours, theirs = read_checkpoint(path).load(), self._straight[world][path.name]
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.keys() == other.keys(), f"{path}: other tensors"
            for name in mine:
                assert torch.equal(mine[name], other[name]), f"{path}: {name} is not that of the run that nothing met"

    def _compare(self, folder: Path, world: int, begun_at: dict[int, int], last: int) -> None:
        """The end of a case: one row a step with the numbers of the other run, its state, its samples in its order."""
        run, straight = folder / "run", self.folder / f"straight_{world}"
        self._same_state(run / "checkpoints" / f"step_{STEPS:08d}", world)
        assert _told_of_steps(run) == _told_of_steps(straight / "run"), "the journal's rows differ"
        assert not list((run / "checkpoints").glob(".tmp-*")), "leftovers"
        volumes = dict(sample for taken in samples(straight / "order.jsonl").values() for sample in taken)
        for pid, taken in samples(folder / "order.jsonl").items():
            first, positions = begun_at.get(pid, last) * BATCH, [position for position, _ in taken]
            # Micro-batches of one sample; a rank takes BATCH / world neighbours of each step.
            rank = positions[0] % BATCH // (BATCH // world)
            own = [p for p in range(first, STEPS * BATCH) if p % BATCH // (BATCH // world) == rank]
            assert positions == own[: len(positions)], f"from step {first // BATCH} a process took {positions}"
            assert all(volumes[position] == key for position, key in taken), "other volumes"

    def _straight_run(self, world: int) -> dict[str, tuple[Tensors, Tensors]]:
        """A run that nothing meets: its state at every step."""
        folder = self.folder / f"straight_{world}"
        folder.mkdir()
        finished(self._start(self._config(folder / "run", world, every=1, keep=1000), folder, world, random.Random(0)))
        paths = sorted((folder / "run" / "checkpoints").iterdir())
        assert len(paths) == STEPS
        print(f"the run of {world} rank{'s' * (world > 1)} that nothing meets is made", flush=True)
        return {path.name: read_checkpoint(path).load() for path in paths}

    def _config(self, output: Path, world: int, every: int, keep: int = 2) -> PretrainConfig:
        engine = "plain" if world == 1 else "deepspeed"
        base = small_config(str(self.folder / "store"), str(output), steps=STEPS, batch=BATCH, engine=engine)
        changes = {"checkpoint": {"every": every, "keep": keep}, "held_out": {"every": 100, "samples": 1}}
        return check_config(PretrainConfig, {**config_values(base), **changes}, "kill_runs")

    def _start(
        self, config: PretrainConfig, folder: Path, world: int, shots: random.Random, told: Told | None = None
    ) -> Start:
        order = folder / "order.jsonl"
        if world == 1:
            return Forked.training(config, folder / "log", told and told.pipe, order)
        return Launched(write_config(config, folder), folder / "log", told and told.pipe, order, shots)

    def table(self) -> str:
        """What was killed and what was lost, as Markdown."""
        lines = ["| kills | through | inside a save | runs | most steps made again | lost |"]
        lines.append("|---|---|---|---|---|---|")
        for part, tally in self.tallies.items():
            through = "launchers, 2 ranks" if part.startswith("launched") else "a process, 1 rank"
            inside = tally.kills - tally.seen[OUTSIDE]
            aimed = f"{part.rpartition('-')[2]}: {tally.kills}" + f" (and {tally.elsewhere} late)" * bool(
                tally.elsewhere
            )
            lost = sum(f"FAILED {part}-" in line for line in self.failures)
            cells = [aimed, through, inside, tally.cases, tally.most_again, lost]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        seen = sum((self.tallies[part].seen for part in PARTS), collections.Counter[str]())
        lines += ["", "| where in a save | kills |", "|---|---|"]
        lines += [f"| {where} | {count} |" for where, count in seen.most_common() if where != OUTSIDE]
        lines += ["", f"{self.compared} checkpoints were found after kills; all were compared, bit for bit."]
        return "\n".join(lines)


def _told_of_steps(run: Path) -> dict[int, tuple[float, float, int]]:
    rows = [row for row in read_journal(run / "journal.jsonl") if row["kind"] == "step"]
    assert len(rows) == STEPS, f"{len(rows)} rows of {STEPS} steps"
    return {row["step"]: (row["loss"], row["grad_norm"], row["position"]) for row in rows}


def _refuse(line: str) -> None:
    raise AssertionError(line)


if __name__ == "__main__":
    sys.exit(main())
