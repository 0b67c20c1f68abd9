"""Weak scaling on this machine's cores, measured beside predicted: `python -m benchmarks.scaling STORE FOLDER`.

One call is one round: the pace of one rank, the link of two, then training on 1, 2 and 4 ranks, each with its share of
a batch that grows with them. The table is over all rounds that the folder holds; each prediction is from its own round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from mim_scale.config import PretrainConfig
from mim_scale.config_file import load_config
from mim_scale.estimate.link import read_links
from mim_scale.estimate.pace import Calibration, read_calibration, read_run
from mim_scale.estimate.projection import work_of
from mim_scale.estimate.scaling import Cluster, StepTime, step_time
from mim_scale.methods.cost import cost_of
from mim_scale.training.host import usable_cores

ROOT = Path(__file__).parents[1]
WORLDS = (1, 2, 4)
STEPS = 50
PACE_STEPS = 40


def main() -> None:
    """Make a round, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("folder", type=Path, help="where rounds are kept")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.yaml")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run (default: %(default)s)")
    parser.add_argument("--pace-steps", type=int, default=PACE_STEPS, help="of one rank (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="no new round")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    if not options.table:
        number = len(rounds_of(options.folder)) + 1
        make_round(options.folder / f"round-{number}", options)
    print_table(options.folder, load_config(PretrainConfig, options.config, options.overrides))


def rounds_of(folder: Path) -> list[Path]:
    """The rounds that were made to their end."""
    return sorted(entry.parent for entry in folder.glob("round-*/done"))


def make_round(folder: Path, options: argparse.Namespace) -> None:
    """One of everything, one after another; what an interrupted call has made is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    config = load_config(PretrainConfig, options.config, options.overrides)
    share = config.train.batch
    common = [f"data.store={options.store}", "tracking={mlflow: null}", f"train.steps={options.steps}"]
    common += [f"optimizer.warmup_steps={min(5, options.steps - 1)}", f"held_out.every={options.steps}"]
    common += [f"checkpoint.every={options.steps}", *options.overrides]
    link = folder / "link.json"
    if not link.exists():
        run([*torchrun(2), "launch/measure_link.py", "--out", str(link)])
    command = [sys.executable, "-m", "mim_scale.cli", "estimate", "--config", str(options.config)]
    command += ["--run-steps", str(options.pace_steps), "--link", str(link), "--json", *common]
    # Its batch must be one that two ranks can share; what is measured is a micro-batch.
    if not (folder / "pace.json").exists():
        (folder / "pace.json").write_text(run([*command, f"train.batch={2 * share}"]))
    for world in WORLDS:
        launcher = [sys.executable] if world == 1 else torchrun(world)
        output = [f"output={folder / str(world)}", f"train.batch={share * world}"]
        run([*launcher, "launch/pretrain.py", "--config", str(options.config), *common, *output])
    (folder / "done").touch()


def torchrun(world: int) -> list[str]:
    """The launcher that needs nothing but torch."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]


def run(command: list[str]) -> str:
    """What a command printed; its own errors end this program."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def print_table(folder: Path, config: PretrainConfig) -> None:
    """Medians over the rounds, smallest and largest in brackets."""
    rounds = rounds_of(folder)
    policy = config.train.activation_checkpointing
    cost = cost_of(config, policy)
    measured: dict[int, list[float]] = {world: [] for world in WORLDS}
    predicted: dict[int, list[StepTime]] = {world: [] for world in WORLDS}
    for one in rounds:
        found, links = read_calibration(one / "pace.json"), read_links(one / "link.json")
        print(f"{one.name}: {told(found)}, link {json.loads((one / 'link.json').read_text())['within']}")
        assert links.within is not None
        for world in WORLDS:
            times = read_run(one / str(world))
            cluster = Cluster(world, world, usable_cores(), links.within.link, None)
            measured[world].append(times.step_s)
            predicted[world].append(step_time(found.pace, work_of(times.config, cost, policy, world), cluster))
    print(f"{cost.parameters:,} parameters, {len(rounds)} rounds, {usable_cores()} cores")
    print(
        "| ranks | step measured, s | predicted, s | off by | efficiency measured | predicted | exchange predicted, s |"
    )
    print("|---|---|---|---|---|---|---|")
    for world in WORLDS:
        steps = [step.training for step in predicted[world]]
        off = [p / m - 1 for p, m in zip(steps, measured[world], strict=True)]
        own = [a / b for a, b in zip(measured[1], measured[world], strict=True)]
        said = [a.training / b.training for a, b in zip(predicted[1], predicted[world], strict=True)]
        exchange = statistics.median(step.exchange for step in predicted[world])
        cells = [range_of(measured[world], ".3f"), range_of(steps, ".3f"), range_of(off, "+.0%")]
        cells += [range_of(own, ".0%"), range_of(said, ".0%"), f"{exchange:.4f}"]
        print(f"| {world} | {' | '.join(cells)} |")


def told(found: Calibration) -> str:
    """A pace in numbers."""
    pace = found.pace
    return (
        f"micro-batch {pace.micro_batch_s:.4f} s (spread {pace.spread_s:.4f}), update {pace.update_s:.4f}, reading "
        f"{pace.read_core_s:.4f} core s, crowding {pace.crowding:.1%}"
    )


def range_of(values: list[float], form: str) -> str:
    """Median and range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
