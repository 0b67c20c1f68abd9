"""An hour of real CT under fire: `make soak`. Something is killed every few minutes, and the ranks change once.

Needs the example data (`mim-scale example-data`). The run is the demo's, under the supervisor, on two ranks and from
two thirds of the time on one. Killed are ranks, the launcher and the supervisor; ranks are stopped, and the supervisor
is asked to end. When the time is over the run is stopped. Beside it run, untouched, as far as it came: two ranks from
the first step, and one rank from the change on. The run must be, bit for bit, the first of these up to the change and
the second from there on; and after the change the losses of the first to 1e-5 relative for 20 steps, its weights at
the next checkpoint too.
"""

import argparse
import contextlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from data_pipeline.example_data import default_cache
from mim_scale.training.journal import read_journal
from tests.launch.runs import SUPERVISE, gone, ranks
from tests.training.checkpoints import Tensors, state_of
from tests.training.jobs import PRETRAIN, ROOT, environment, torchrun

EVERY = 20
"""Steps between checkpoints; the losses after the change are compared over as many."""
TOLERANCE = 1e-5
GAPS_S = (60.0, 240.0)
STEPS = 100_000
"""Of the config: more than an hour holds."""
LIMIT_S = 600
Rows = dict[int, dict[str, Any]]
SHOTS = ("SIGKILL to a rank", "SIGKILL to the launcher", "SIGTERM to the supervisor", "SIGKILL to the supervisor")
SHOT_OF_TWO = "SIGSTOP to a rank"


def main() -> int:
    """Fire until the time is over, stop the run, compare; two tables, and 1 where the run is another one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--minutes", type=float, default=60, help="how long something is killed")
    parser.add_argument("--folder", type=Path, help="for all of it; kept")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mim-scale-soak-")))
        folder.mkdir(parents=True, exist_ok=True)
        soak = Soak(folder, random.Random(options.seed))
        soak.build_store()
        straight = stack.enter_context(ended(soak.start("straight", 2, keep=10**6)))
        branch = stack.enter_context(ended(soak.fire(options.minutes * 60)))
        for name, job in (("straight", straight), ("branch", branch)):
            print(f"waiting for {name}", flush=True)
            soak.wait_for(name, job)
        print(soak.shots_table())
        print(soak.compared_table())
        return 0 if soak.is_equal else 1


@contextlib.contextmanager
def ended(job: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A job; what is alive of it at the end is ended."""
    try:
        yield job
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(job.pid).children(recursive=True):
                process.kill()
        job.kill()
        job.wait()


@dataclass
class Shot:
    """One thing that was killed."""

    minute: float
    step: int
    what: str
    again_s: float | None = None
    """Until the first step that had not been made before."""


@dataclass
class Soak:
    """The run under fire and those beside it, below one folder."""

    folder: Path
    draw: random.Random
    shots: list[Shot] = field(default_factory=list)
    change: int = 0
    """Steps made on two ranks."""
    steps: int = 0
    """Steps made in all, once the time is over."""
    is_equal: bool = True
    _world: int = 2
    _began: float = 0.0
    _hit: float = 0.0
    _said: float = 0.0

    def build_store(self) -> None:
        """The example data at 2 mm, as the demo has it."""
        program = "from mim_scale.cli import main; main()"
        words = ["data", "build", "--spacing", "2", str(default_cache()), str(self.folder / "store")]
        subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    def start(self, name: str, world: int, keep: int = 3, supervisor: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        """The demo's run, so many ranks, in a folder of this name."""
        settings = {
            "output": self.folder / name,
            "data.store": self.folder / "store",
            "train.steps": STEPS,
            "checkpoint.every": EVERY,
            "checkpoint.keep": keep,
        }
        words = [f"{key}={value}" for key, value in settings.items()]
        with open(self.folder / f"{name}.log", "ab") as log:
            return subprocess.Popen(
                [*supervisor, *torchrun(world), PRETRAIN, "--config", str(ROOT / "configs" / "demo.yaml"), *words],
                cwd=ROOT,
                env=environment(PYTHONPATH=str(ROOT), MLFLOW_DISABLE_TELEMETRY="true"),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def fire(self, seconds: float) -> subprocess.Popen[bytes]:
        """The run under fire, until it is stopped; returns the run of one rank, begun where the ranks changed."""
        self._began, branch = time.monotonic(), None
        change_at, end_at = self._began + seconds * 2 / 3, self._began + seconds
        next_shot = self._began + self.draw.uniform(*GAPS_S)
        job = self._start_again()
        try:
            while True:
                time.sleep(0.2)
                code, step, now = job.poll(), self._look(seconds), time.monotonic()
                if code is not None:
                    assert code in (75, -signal.SIGKILL), f"the supervisor ended with {code}: see {self.folder}/run.log"
                    is_saved = (self.folder / "run" / "checkpoints" / f"step_{step:08d}").is_dir()
                    if now > end_at and branch is not None and is_saved:
                        self.steps = step
                        return branch
                    if now > change_at and branch is None and is_saved:
                        branch = self._change_ranks(step)
                    job = self._start_again()
                elif self._goes_on(step) and ((now > change_at and branch is None) or now > end_at):
                    job.terminate()
                    job.wait(LIMIT_S)
                elif self._goes_on(step) and now > next_shot:
                    self._shoot(job, step)
                    next_shot = time.monotonic() + self.draw.uniform(*GAPS_S)
        finally:
            job.kill()

    def wait_for(self, name: str, job: subprocess.Popen[bytes]) -> None:
        """An untouched run, until it came as far as the one under fire."""
        while len(rows_of(self.folder / name)) < self.steps:
            assert job.poll() is None, f"{name} ended with {job.returncode}: see {self.folder}/{name}.log"
            time.sleep(5)
        job.terminate()
        job.wait(LIMIT_S)

    def _start_again(self) -> subprocess.Popen[bytes]:
        return self.start("run", self._world, supervisor=(*SUPERVISE, "--"))

    def _change_ranks(self, step: int) -> subprocess.Popen[bytes]:
        """From now on one rank; beside it the same, untouched."""
        self.change, self._world = step, 1
        for copy in ("at_change", "branch"):
            shutil.copytree(self.folder / "run", self.folder / copy, ignore=shutil.ignore_patterns("mlflow.db*"))
        print(f"after step {step}: one rank from here on", flush=True)
        return self.start("branch", 1, keep=10**6)

    def _shoot(self, job: subprocess.Popen[bytes], step: int) -> None:
        what = self.draw.choice([*SHOTS, SHOT_OF_TWO] if self._world == 2 else SHOTS)
        family = psutil.Process(job.pid).children(recursive=True)
        # Below the supervisor a keeper, below that the launcher.
        launcher = psutil.Process(job.pid).children()[0].children()[0]
        victim = {"a rank": self.draw.choice(ranks(job.pid)), "the launcher": launcher}.get(what.partition(" to ")[2])
        (victim or job).send_signal(getattr(signal, what.partition(" ")[0]))
        self._hit = time.monotonic()
        self.shots.append(Shot((self._hit - self._began) / 60, step, what))
        print(f"after step {step}: {what}", flush=True)
        if what == "SIGKILL to the supervisor":
            job.wait()
            assert gone(family, within_s=10), "something outlived the supervisor"

    def _goes_on(self, step: int) -> bool:
        """Whether steps are made, after the last shot too."""
        return self.shots[-1].again_s is not None if self.shots else step > 0

    def _look(self, seconds: float) -> int:
        """The last step; what it says of the last shot; now and then a line."""
        rows = rows_of(self.folder / "run")
        step = len(rows)
        if self.shots and not self._goes_on(step) and step > self.shots[-1].step + 1 and self._is_new(rows):
            self.shots[-1].again_s = time.monotonic() - self._hit
        if time.monotonic() - self._said > 60:
            self._said = time.monotonic()
            spent = self._said - self._began
            told = f"step {step}, {len(self.shots)} shots; untouched: step {len(rows_of(self.folder / 'straight'))}"
            print(f"{spent / 60:.0f} of {seconds / 60:.0f} min: {told}", flush=True)
        return step

    def _is_new(self, rows: Rows) -> bool:
        """Whether the last step was made after the run was taken up again."""
        starts = [row["time"] for row in read_journal(self.folder / "run" / "journal.jsonl") if row["kind"] == "start"]
        since = time.time() - (time.monotonic() - self._hit)
        return starts[-1] > since and rows[max(rows)]["time"] > starts[-1]

    def shots_table(self) -> str:
        """What was killed when, as Markdown."""
        lines = ["| minute | step | what | training again after, s |", "|---|---|---|---|"]
        lines += [
            f"| {s.minute:.1f} | {s.step} | {s.what} | {'-' if s.again_s is None else format(s.again_s, '.0f')} |"
            for s in self.shots
        ]
        return "\n".join(lines)

    def compared_table(self) -> str:
        """The run beside those that nothing met, as Markdown; `is_equal` is then known."""
        run, straight, branch = (rows_of(self.folder / name) for name in ("run", "straight", "branch"))
        before, then = range(1, self.change + 1), range(self.change + 1, self.steps + 1)
        seen = self.change // EVERY * EVERY
        near = min(seen + EVERY, self.steps)
        checks: list[tuple[str, str, bool]] = []

        def check(what: str, found: str, is_met: bool) -> None:
            checks.append((what, found, is_met))

        steps = [row["step"] for row in read_journal(self.folder / "run" / "journal.jsonl") if row["kind"] == "step"]
        check("rows of steps", f"{len(steps)}, one a step", steps == list(range(1, self.steps + 1)))
        told = f"steps 1 to {self.change}"
        check(f"losses and gradient norms beside two ranks, {told}", "bit-equal", same(run, straight, before))
        is_same = equal(state_of(self.folder / "at_change", seen), state_of(self.folder / "straight", seen))
        check(f"weights and moments beside two ranks, step {seen}", "bit-equal", is_same)
        told = f"steps {self.change + 1} to {self.steps}"
        check(f"losses and gradient norms beside one rank, {told}", "bit-equal", same(run, branch, then))
        last = self.steps // EVERY * EVERY
        is_same = equal(state_of(self.folder / "run", last), state_of(self.folder / "branch", last))
        check(f"weights and moments beside one rank, step {last}", "bit-equal", is_same)
        apart = losses_apart(run, straight, then[:EVERY])
        check(f"losses of {EVERY} steps after the change beside two ranks", f"{apart:.1e}", apart <= TOLERANCE)
        apart = self._weights_apart("branch", near)
        check(f"weights {near - self.change} steps after the change", f"{apart:.1e}", apart <= TOLERANCE)
        apart = losses_apart(run, straight, then)
        check("losses to the end beside two ranks, largest (no limit)", f"{apart:.1e}", True)
        check(f"weights, step {last} (no limit)", f"{self._weights_apart('run', last):.1e}", True)
        self.is_equal = all(is_met for *_, is_met in checks)
        lines = ["| what | found | |", "|---|---|---|"]
        return "\n".join(lines + [f"| {what} | {found} | {'met' if ok else 'NOT MET'} |" for what, found, ok in checks])

    def _weights_apart(self, name: str, step: int) -> float:
        """The norm of the difference beside the norm; keys' biases have no gradient but rounding."""
        sides = [state_of(self.folder / run, step)[0] for run in (name, "straight")]
        ours, theirs = (
            torch.cat([value.flatten() for key, value in side.items() if not key.endswith("qkv.bias")])
            for side in sides
        )
        return float((ours - theirs).norm() / theirs.norm())


def rows_of(run: Path) -> Rows:
    """The row of each step."""
    return {row["step"]: row for row in read_journal(run / "journal.jsonl") if row["kind"] == "step"}


def same(run: Rows, other: Rows, steps: range) -> bool:
    """Whether losses, their parts and gradient norms are the same to the last bit."""
    return all(run[step][name] == other[step][name] for step in steps for name in ("loss", "parts", "grad_norm"))


def losses_apart(run: Rows, other: Rows, steps: range) -> float:
    """The largest relative difference."""
    return max((abs(run[step]["loss"] / other[step]["loss"] - 1) for step in steps), default=0.0)


def equal(ours: tuple[Tensors, Tensors], theirs: tuple[Tensors, Tensors]) -> bool:
    """Whether weights and moments are the same to the last bit."""
    return all(
        mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
        for mine, other in zip(ours, theirs, strict=True)
    )


if __name__ == "__main__":
    sys.exit(main())
