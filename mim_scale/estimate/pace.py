"""The pace of one rank, for the scaling model: from steps that are made now, or from a run's journal."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from mim_scale.config import Checkpointing, PretrainConfig
from mim_scale.config_file import dump_config, load_config
from mim_scale.errors import ConfigError, HostError, MimScaleError
from mim_scale.estimate.files import EstimateFile, read_file
from mim_scale.estimate.same_work import work_settings
from mim_scale.estimate.scaling import Pace
from mim_scale.training.host import usable_cores
from mim_scale.training.journal import read_journal
from mim_scale.training.memory import with_stage
from mim_scale.training.run_folder import CONFIG, JOURNAL

FEWEST = 5
"""Steps below which a spread says nothing."""
NEWEST = 200
"""Steps of a journal that are looked at."""
FIRST = 3
"""Steps after each start that are not: they wait for the first data and for pages."""
_READY, _RESULT = "READY", "RESULT "


@dataclass(frozen=True)
class Calibration:
    """A pace, and what it was measured on."""

    pace: Pace
    source: str
    """For people."""
    device: str
    cores: int
    steps: int
    policy: Checkpointing
    """`auto` where it is not known what that chose."""
    peak_bytes: int
    """0 where it is not known."""
    of: dict[str, Any] | None = None
    """What decides the pace: `work_settings`; None in files that were written before it was kept."""


@dataclass(frozen=True)
class RunTimes:
    """What a journal tells of a run's newest start."""

    config: PretrainConfig
    """With the ZeRO stage that was chosen."""
    policy: Checkpointing
    """As chosen; `auto` where the journal does not tell, likewise None in what follows."""
    device: str | None
    """cpu or cuda."""
    hosts: int | None
    """Nodes that its ranks were on."""
    world: int
    step_s: float
    """Median, without saves and held-out measurements; likewise what follows."""
    step_spread_s: float
    wait_s: float
    """Of data, or of the rank that got its data last."""
    stall_s: float
    write_s: float
    held_out_s: float
    steps: int
    row_bytes: float
    """Of a step's row."""

    @property
    def of(self) -> dict[str, Any] | None:
        """What decides the pace."""
        return work_settings(self.config, self.policy)


def measure_pace(config: PretrainConfig, policy: Checkpointing, steps: int, copies: int = 1) -> Calibration:
    """Make `steps` steps of one micro-batch in a process of their own, and again in several at once.

    Args:
        policy: In the place of the config's, which may be `auto`.
        copies: Processes side by side, which exchange nothing; 1 leaves that out, and then ranks are taken not to
            slow each other down as long as each has a core.

    Raises:
        MimScaleError: what a process met.
    """
    # A rank alone; one micro-batch a step, as accumulation only repeats it.
    alone = config.train.model_copy(update={"batch": config.train.micro_batch, "activation_checkpointing": policy})
    config = config.model_copy(update={"train": alone})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump_config(config))
        (first,) = _timed(path, steps, 1)
        several = _timed(path, steps, copies) if copies > 1 else []
    cores, own = usable_cores(), statistics.median(first["micro_batch_s"])
    crowding = 0.0
    if several:
        # Beyond the cores, processes take turns besides.
        beside = statistics.median(seconds for one in several for seconds in one["micro_batch_s"])
        turns, busy = max(1.0, copies / cores), min(copies, cores) - 1
        crowding = max(0.0, beside / turns / own - 1) / busy if busy else 0.0
    pace = Pace(
        micro_batch_s=own,
        spread_s=spread(first["micro_batch_s"]),
        update_s=statistics.median(first["update_s"]),
        read_s=first["read_s"],
        read_core_s=first["read_core_s"],
        is_on_cores=first["device"] == "cpu",
        crowding=crowding,
        copy_s=first["copy_s"],
        held_out_s=first["held_out_s"] if config.data.held_out_subjects else 0.0,
    )
    of = f"of {config.data.pack or config.data.store}" if first["is_of_store"] else "of noise, so without reading"
    source = f"{steps} steps {of}" + (f", then {copies} processes side by side" if several else "")
    work = work_settings(config, policy)
    return Calibration(pace, source, first["device"], cores, steps, policy, first["peak_bytes"], work)


def spread(values: Sequence[float]) -> float:
    """A standard deviation that a few odd values do not move: half of what lies between the 16th and 84th percent."""
    if len(values) < 2:
        return 0.0
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return (cuts[83] - cuts[15]) / 2


def _timed(path: Path, steps: int, copies: int) -> list[dict[str, Any]]:
    """What `copies` processes found that made their steps at the same time."""
    jobs: list[_Job] = []
    with contextlib.ExitStack() as ending:
        for copy in range(copies):
            jobs.append(_Job(path, steps, _environment(copy, copies)))
            ending.callback(jobs[-1].end)
        for job in jobs:
            job.line(_READY)
        for job in jobs:
            job.go()
        return [json.loads(job.line(_RESULT)) for job in jobs]


class _Job:
    """A process that times steps."""

    def __init__(self, path: Path, steps: int, environment: dict[str, str]) -> None:
        # Not a pipe, which would stop the process when full.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by `end`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mim_scale.estimate.timed_steps", str(path), str(steps)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )

    def go(self) -> None:
        """Give the word."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def line(self, start: str) -> str:
        """The rest of the first line that begins so; raises what the process ended with where none does."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(start):
                return line[len(start) :]
        code = self._process.wait()
        self._errors.seek(0)
        told = self._errors.read().strip().splitlines()
        errors = [line.removeprefix("error: ") for line in told if line.startswith("error: ")]
        if errors:
            error = MimScaleError(errors[-1])
            error.exit_code = code
            raise error
        raise HostError(f"the measuring process ended with {code}: {told[-1] if told else 'it said nothing'}")

    def end(self) -> None:
        """Leave nothing of it."""
        self._process.kill()
        self._process.wait()
        for file in (self._errors, self._process.stdin, self._process.stdout):
            assert file is not None
            with contextlib.suppress(OSError):
                file.close()


def _environment(copy: int, copies: int) -> dict[str, str]:
    """No launcher's ranks; one thread, as a rank has; on a machine of several GPUs, each copy its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    kept.setdefault("OMP_NUM_THREADS", "1")
    if copies > 1 and "CUDA_VISIBLE_DEVICES" not in kept:
        kept["CUDA_VISIBLE_DEVICES"] = str(copy)
    return kept


def read_run(folder: Path) -> RunTimes:
    """The times in a run's journal, since its newest start.

    Raises:
        ConfigError: the folder is no run's, or has too few steps since then.
        CheckpointError: the journal is damaged.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder}: no run's folder: it has no {CONFIG}; give a run's `output`")
    config = load_config(PretrainConfig, folder / CONFIG)
    where = str(folder / JOURNAL)
    rows = read_journal(folder / JOURNAL)
    starts = [number for number, row in enumerate(rows) if row["kind"] == "start"]
    newest = rows[starts[-1] :] if starts else []
    steps = [row for row in newest if row["kind"] == "step"][FIRST:][-NEWEST:]
    if len(steps) < FEWEST:
        raise ConfigError(
            f"{folder}: {len(steps)} steps can be used since its newest start (the first {FIRST} are not), and "
            f"{FEWEST} are needed: let it run on, or measure with --run-steps"
        )
    seconds = [config.train.batch / number_of(row, "samples_per_second", where, least=1e-9) for row in steps]
    waits = [number_of(row, "data_wait", where, most=1.0) * second for row, second in zip(steps, seconds, strict=True)]
    saves, start = [row for row in newest if row["kind"] == "save"], newest[0]
    world = int(number_of(start, "world", where, least=1, most=10**6))
    if config.train.zero_stage == "auto" and "zero_stage" in start:
        config = with_stage(config, int(number_of(start, "zero_stage", where, most=3)))
    return RunTimes(
        config,
        one_of(start, "activation_checkpointing", get_args(Checkpointing), where)
        or config.train.activation_checkpointing,
        one_of(start, "device", ("cpu", "cuda"), where),
        int(number_of(start, "hosts", where, least=1, most=world)) if "hosts" in start else None,
        world,
        statistics.median(seconds),
        spread(seconds),
        statistics.median(waits),
        _median([number_of(row, "stall_s", where) for row in saves]),
        _median([number_of(row, "write_s", where) for row in saves]),
        _median(_held_out_seconds(newest, where)),
        len(steps),
        statistics.fmean(len(json.dumps(row)) + 1 for row in steps),
    )


def number_of(row: dict[str, Any], name: str, where: str, least: float = 0.0, most: float = 1e12) -> float:
    """A number of a journal's row.

    Raises:
        ConfigError: it is missing, no number, or none that can be; the line names the row.
    """
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise _odd(row, name, f"a number from {least:g} to {most:g}", where)
    return value


def one_of(row: dict[str, Any], name: str, known: Sequence[Any], where: str) -> Any:
    """A word of a journal's row, None where it has none; raises ConfigError where it is another."""
    if name not in row:
        return None
    if row[name] not in known:
        raise _odd(row, name, " or ".join(known), where)
    return row[name]


def _odd(row: dict[str, Any], name: str, expected: str, where: str) -> ConfigError:
    found = f"{name} {json.dumps(row[name]):.40}" if name in row else f"no {name}"
    return ConfigError(
        f"{where}: the {row['kind']} row of step {row['step']} has {found}, expected {expected}: measure with "
        "--run-steps, or take another run"
    )


def _held_out_seconds(rows: Sequence[dict[str, Any]], where: str) -> list[float]:
    """From the row of the step before to that of the measurement; without those between which a clock was set back."""
    measured = {row["step"]: number_of(row, "time", where) for row in rows if row["kind"] == "held_out"}
    steps = [row for row in rows if row["kind"] == "step" and row["step"] in measured]
    seconds = [measured[row["step"]] - number_of(row, "time", where) for row in steps]
    return [second for second in seconds if second >= 0]


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


def pace_of_run(run: RunTimes, exchange_s: float, device: str, cores: int, on_a_node: int, where: str) -> Calibration:
    """The pace of a run's ranks.

    Args:
        exchange_s: What of a step goes to exchanges, by the model; 0 for a run on one rank.
        device: What its ranks compute on.
        cores: Of its node.
        on_a_node: Ranks of a node.
        where: It lies, for people.
    """
    train = run.config.train
    micro_batches = train.batch // (train.micro_batch * run.world)
    computing = run.step_s - run.wait_s - exchange_s
    if computing <= 0:
        raise ConfigError(
            f"{where}: its steps take {run.step_s:.3f} s, of which {run.wait_s:.3f} s are waits and by the link "
            f"{exchange_s:.3f} s are exchanges: that link is not the run's"
        )
    is_on_cores = device == "cpu"
    turns = max(1.0, on_a_node / cores) if is_on_cores else 1.0
    pace = Pace(
        micro_batch_s=computing / micro_batches / turns,
        spread_s=run.step_spread_s / micro_batches**0.5 / turns,
        # It is in the time of the micro-batches: a journal does not tell them apart.
        update_s=0.0,
        read_s=0.0,
        is_on_cores=is_on_cores,
        copy_s=run.stall_s * run.world,
        write_s=run.write_s * run.world,
        held_out_s=run.held_out_s * run.world,
    )
    source = f"{run.steps} steps of {where.removeprefix('--from ')} on {run.world} rank{'s' * (run.world > 1)}"
    return Calibration(pace, source, device, cores, run.steps, run.policy, 0, run.of)


def as_values(found: Calibration) -> dict[str, Any]:
    """For scripts, and for `--from FILE`."""
    return asdict(found)


def read_calibration(path: Path) -> Calibration:
    """What `mim-scale estimate --run-steps --json` printed.

    Raises:
        ConfigError: the file is another one.
    """
    wanted = "neither a run's folder nor what `mim-scale estimate --run-steps --json` prints"
    values = read_file(EstimateFile, path, "--from", wanted).calibration.model_dump()
    return Calibration(**values | {"pace": Pace(**values["pace"])})
