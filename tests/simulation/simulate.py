"""Simulates a run on a cluster that fails, seed by seed: the real loop, saves, journal and tracker on a virtual clock.

    python -m tests.simulation.simulate                   10,000 seeds, on every core
    python -m tests.simulation.simulate --first 4711 --count 1 --tell        one of them again, with what happened

What must hold: every position is applied once, in the order of a run that nothing happens to; every checkpoint that has
its name is whole and bit-equal to that run's state; a run is taken up at the newest one, two intervals back at most
(a save that was being written is lost); the journal has one row a step, MLflow too once it is back.

Not simulated: the watch over ranks (a verdict after 17 s stands for it), gloo, DeepSpeed, threads of the stream,
measuring on held-out samples, pictures, settings that are `auto`.
"""

import argparse
import contextlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mim_scale.config import PretrainConfig
from mim_scale.config_file import check_config, config_values
from mim_scale.errors import EXIT_REQUEUE, CheckpointError, DamagedCheckpointError
from mim_scale.training.checkpoint import CheckpointFolder, read_checkpoint
from mim_scale.training.journal import read_journal
from tests.simulation.cluster import KILLED, Launch
from tests.simulation.faults import FAULTS, befall
from tests.simulation.patches import ids, let_go, patched
from tests.simulation.shared_disk import SharedDisk
from tests.simulation.stand_ins import MlflowServer, Truth, uninterrupted
from tests.simulation.virtual import Here, World
from tests.training.standin import small_config

LAUNCHES_WITH_FAULTS = 6
MOST_LAUNCHES = 12
MAIN_SEEDS = 10_000
MEMORY = "/dev/shm"


class BrokenError(AssertionError):
    """What must hold does not."""


class Simulation:
    """A run from its first launch to its end, all decided by a seed."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.folder = seed, folder
        self.world = Here.world = World(seed)
        Here.simulation = self
        self.ids, random = ids(seed), self.world.random
        self.log: list[str] = []
        self.happened: Counter[str] = Counter()
        self.mlflow = MlflowServer()
        self.executed, self.newest_published, self.ever_published = 0, 0, set[int]()
        self.rotten: dict[str, tuple[Path, bytes]] = {}
        self.keeps_locks, self.forgotten_locks, self.is_locked = False, list[int](), False
        self.intruders: list[Launch] = []
        self.disk: Any = None
        self.power = ""
        self._excuses: set[str] = set()
        batch = random.choice([4, 8, 12])
        self.steps = random.randint(4, 14)
        self.config = self._config(batch)
        bad = {position for position in range(self.steps * batch) if random.random() < 0.01}
        self.truth: Truth = uninterrupted(self.config, frozenset(bad))
        self.disk_s = random.choice([0.0, 0.01, 0.3])
        """How long an operation of the disk takes: saves last from no time to several steps."""
        self.engine = (frozenset(bad), random.random() < 0.3)

    def _config(self, batch: int) -> PretrainConfig:
        random = self.world.random
        config = config_values(_BASE)
        config["output"] = str(self.folder / "run")
        config["train"] |= {"steps": self.steps, "batch": batch}
        config["checkpoint"] = {"every": random.randint(1, 5), "keep": random.randint(2, 3)}
        config["checkpoint"]["background"] = random.random() < 0.7
        config["guards"]["skips_in_a_row"] = self.steps
        config["tracking"]["mlflow"] = random.choice([None, "http://mlflow", "http://mlflow"])
        return check_config(PretrainConfig, config, "simulation")

    def run(self) -> None:
        """Launch until the run is done, then once more, with all well.

        Raises:
            BrokenError: with the seed.
        """
        try:
            for number in range(MOST_LAUNCHES):
                if self._launch(number < LAUNCHES_WITH_FAULTS, number):
                    break
            else:
                raise BrokenError(f"not done after {MOST_LAUNCHES} launches")
            self._launch(False, MOST_LAUNCHES)
            self._check_end()
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            raise BrokenError(
                f"seed {self.seed}: {told}; again: python -m tests.simulation.simulate --first {self.seed} --count 1 "
                "--tell"
            ) from error
        finally:
            self.world.end()
            let_go(self.forgotten_locks)

    def say(self, text: str) -> None:
        """Keep a line of what happened."""
        self.log.append(f"{self.world.now:9.2f} s, turn {self.world.turns}: {text}")

    def excuse(self, fault: str) -> None:
        """A fault befell: a launch may end by an error, or pass over a checkpoint, because of it."""
        self._excuses.add(fault)

    def keep_locks(self) -> None:
        """The file server keeps the locks of this launch for a while after its death."""
        self.keeps_locks = True

    def let_go_of_locks(self) -> None:
        """The kernel, or the file server at last, gives the locks of dead processes back."""
        let_go(self.forgotten_locks)

    def published(self, step: int) -> None:
        """A save told that it is done."""
        self.newest_published = max(self.newest_published, step)
        self.ever_published.add(step)
        self.rotten.pop(f"step_{step:08d}", None)

    def begins_at(self, step: int) -> None:
        """A launch took the run up."""
        self.say(f"taken up at step {step}; {self.executed} were made, {self.newest_published} saved")
        if self._excuses & {"stale", "error"}:
            return
        whole = [one for one in self.ever_published if f"step_{one:08d}" not in self.rotten]
        if step < max(whole, default=0):
            raise BrokenError(f"taken up at step {step} although {max(whole)} was saved")
        if self.rotten:
            return
        every = self.config.checkpoint.every
        most = 2 * every if self.config.checkpoint.background else every
        if self.executed - step > most:
            raise BrokenError(f"{self.executed - step} steps lost, saved every {every}")

    def _launch(self, with_faults: bool, number: int) -> bool:
        """One launch, from start to end; returns whether the run is done."""
        random, world = self.world.random, self.world
        self.mlflow.ails.clear()
        # The lock of a dead machine, if it is still kept, is why the next launch is refused.
        self._excuses = {"lock kept"} if self.forgotten_locks else set()
        self.power, self.intruders, self.keeps_locks = "power stays", [], False
        launch = self._new_launch(with_faults)
        self.say(f"launch {number}: {launch.size} ranks, blind {sorted(launch.blind)}")
        os.makedirs(self.folder / "run", exist_ok=True)
        self.disk = SharedDisk(self.folder / "run")
        with self.disk:
            launch.start()
            if with_faults:
                for _ in range(random.choice([0, 1, 1, 2, 3])):
                    fault = random.choice(FAULTS)
                    turns = int(random.expovariate(1 / random.choice([20, 100, 500])))
                    world.after_turns(turns, lambda fault=fault: befall(fault, self, launch))
            world.run(lambda: launch.is_over and all(second.is_over for second in self.intruders))
            world.end()
        self.disk.leave(self.power)
        self.disk.close()
        self.say(f"ended with {launch.codes}")
        self._check_codes(launch)
        self._check_checkpoints()
        if not self.keeps_locks:
            self.let_go_of_locks()
        if with_faults and random.random() < 0.15:
            self._rot()
        return set(launch.codes.values()) == {0}

    def _new_launch(self, with_faults: bool) -> Launch:
        random, batch = self.world.random, self.config.train.batch
        micro = random.choice([1, 2])
        size = random.choice([world for world in (1, 1, 2, 2, 3, 4) if batch % (world * micro) == 0])
        train = self.config.train.model_copy(update={"micro_batch": micro})
        config = self.config.model_copy(update={"train": train})
        some = [rank for rank in range(1, size) if random.random() < 0.2]
        slow = {rank for rank in range(size) if random.random() < 0.1 * with_faults}
        return Launch(config, size, frozenset(some), frozenset(slow), random.random() < 0.5)

    def _rot(self) -> None:
        """A bit of the newest checkpoint flips, where an older one is whole."""
        folders = CheckpointFolder(self.folder / "run" / "checkpoints", 2).folders()
        whole = [folder for folder in folders if folder.name not in self.rotten]
        if len(whole) < 2:
            return
        path = self.world.random.choice(sorted(path for path in whole[0].iterdir() if path.stat().st_size))
        data = bytearray(path.read_bytes())
        data[self.world.random.randrange(len(data))] ^= 1 << self.world.random.randrange(8)
        path.write_bytes(data)
        self.rotten[whole[0].name] = path, bytes(data)
        self.happened["bit rot"] += 1
        self.say(f"a bit of {path.relative_to(self.folder)} flipped")

    def _check_codes(self, launch: Launch) -> None:
        codes = set(launch.codes.values()) - {0, EXIT_REQUEUE, KILLED}
        told = {CheckpointError.exit_code}, {DamagedCheckpointError.exit_code}
        if codes and (not self._excuses or codes not in told):
            raise BrokenError(f"ended with {launch.codes}, and no fault excuses it")

    def _check_checkpoints(self) -> None:
        folder = CheckpointFolder(self.folder / "run" / "checkpoints", 2)
        whole = 0
        for path in folder.folders():
            try:
                found = read_checkpoint(path)
            except CheckpointError as error:
                if path.name not in self.rotten:
                    raise BrokenError(f"not whole: {error}") from None
                continue
            if path.name in self.rotten:
                file, data = self.rotten.pop(path.name)
                if file.is_file() and file.read_bytes() == data:
                    raise BrokenError(f"{path.name}: a flipped bit was not found")
                # Saved anew, by a launch that was killed before it could tell.
            whole += 1
            weights, expected = found.load()[0], self.truth.states[found.step]
            for name, value in expected.items():
                if not torch.equal(weights[name], value):
                    raise BrokenError(f"{path.name}: {name} is not what {found.step} steps make of it")
        fewest = min(self.config.checkpoint.keep, len(self.ever_published)) - len(self.rotten)
        if whole < fewest:
            raise BrokenError(f"{whole} checkpoints are whole, {fewest} should be")

    def _check_end(self) -> None:
        newest = CheckpointFolder(self.folder / "run" / "checkpoints", 2).newest(self.say)
        if newest is None or newest.step != self.steps:
            raise BrokenError(f"done, but the last checkpoint is {newest}")
        rows = [row for row in read_journal(self.folder / "run" / "journal.jsonl") if row["kind"] == "step"]
        if [row["step"] for row in rows] != list(range(1, self.steps + 1)):
            raise BrokenError(f"journal has steps {[row['step'] for row in rows]}")
        for row, loss in zip(rows, self.truth.losses, strict=True):
            if (row["loss"] is None) != (loss is None) or abs((row["loss"] or 0) - (loss or 0)) > 1e-12:
                raise BrokenError(f"journal has loss {row['loss']} at step {row['step']}, not {loss}")
        if self.config.tracking.mlflow is None:
            return
        if len(self.mlflow.runs) != 1:
            raise BrokenError(f"MLflow has {len(self.mlflow.runs)} runs")
        (run,) = self.mlflow.runs.values()
        steps = [step for name, step, _ in run["points"] if name == "position"]
        if steps != list(range(1, self.steps + 1)) or run["status"] != "FINISHED":
            raise BrokenError(f"MLflow has steps {steps}, status {run['status']}")
        files = {Path(name).name for name in run["files"]}
        if files != {"config.yaml", "checkpoints.json", "dataset"}:
            raise BrokenError(f"MLflow has files {files}")


_BASE = small_config(engine="plain", activation_checkpointing="none")


def simulate(seed: int, folder: Path) -> Simulation:
    """One seed, in an empty folder that is deleted then; only inside `patched`.

    Raises:
        BrokenError: with the seed.
    """
    path = folder / f"seed_{seed}"
    simulation = Simulation(seed, path)
    try:
        simulation.run()
    finally:
        shutil.rmtree(path, ignore_errors=True)
    return simulation


@contextlib.contextmanager
def in_memory() -> Iterator[Path]:
    """A folder in memory, where the system has such."""
    with tempfile.TemporaryDirectory(dir=MEMORY if Path(MEMORY).is_dir() else None) as folder:
        yield Path(folder)


def simulate_some(seeds: range) -> tuple[int, Counter[str], list[str]]:
    """(how many, how often each fault befell, what failed)."""
    torch.set_num_threads(1)
    happened: Counter[str] = Counter()
    failed = []
    with in_memory() as folder, patched():
        for seed in seeds:
            try:
                happened += simulate(seed, folder).happened
            except BrokenError as error:
                failed.append(str(error))
    return len(seeds), happened, failed


def main() -> int:
    """Simulate; prints a table of what befell, and the seeds that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=MAIN_SEEDS)
    parser.add_argument("--tell", action="store_true", help="print what happens, for one seed")
    options = parser.parse_args()
    if options.tell:
        with in_memory() as folder, patched():
            try:
                simulate(options.first, folder)
            except BrokenError as error:
                print("\n".join(Here.simulation.log))
                raise SystemExit(str(error)) from None
            print("\n".join(Here.simulation.log))
        return 0
    seeds, size, began = range(options.first, options.first + options.count), 50, time.monotonic()
    parts = [range(start, min(start + size, seeds.stop)) for start in range(seeds.start, seeds.stop, size)]
    happened: Counter[str] = Counter()
    done, failed = 0, list[str]()
    with multiprocessing.get_context("spawn").Pool() as pool:
        for count, some, broken in pool.imap_unordered(simulate_some, parts):
            done, happened, failed = done + count, happened + some, failed + broken
            left = (time.monotonic() - began) / done * (len(seeds) - done)
            print(f"\r{done} of {len(seeds)} seeds, {len(failed)} failed, {left:.0f} s left ", end="", file=sys.stderr)
    print(f"{len(seeds)} seeds from {seeds.start}: {len(failed)} failed")
    for fault, times in happened.most_common():
        print(f"| {fault} | {times} |")
    print("\n".join(failed[:20]))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
