"""How a run stands, read from its folder alone: from any shell, while it runs or after it."""

import json
import os
import re
import socket
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mim_scale.config import PretrainConfig
from mim_scale.config_file import load_config
from mim_scale.errors import ConfigError
from mim_scale.training.journal import read_journal
from mim_scale.training.progress import duration
from mim_scale.training.run_folder import CHECKPOINTS, CONFIG, JOURNAL, LOCK

RECENT = 50
"""Steps that a rate is taken of."""


@dataclass(frozen=True)
class Status:
    """What a run folder tells."""

    state: str
    """`running`, `finished`, or `not running`."""
    holder: str
    """Who has the folder: process and machine; empty for nobody."""
    step: int
    steps: int
    epoch: float
    loss: float | None
    held_out: dict[str, float]
    """The newest measurement; empty before the first."""
    held_out_step: int
    samples_per_second: float | None
    """Median of the last steps, likewise what follows."""
    data_wait: float | None
    """Share of a step's time."""
    left_s: float | None
    step_age_s: float | None
    """Since the last step's row."""
    checkpoint_step: int | None
    checkpoint_age_s: float | None
    starts: int
    """Processes that took the run up."""
    world: int | None
    again_from: int | None
    """The step where the run was taken up, while it makes steps again that have their rows; None otherwise."""
    again_age_s: float | None
    """Since it was taken up there."""
    left_out: int
    """Steps without an update."""
    slowest_rank: int | None
    """The rank that took longest over its own work in most of the last steps; None for a run on one rank."""
    slowest_times: float | None
    """How many times the middle of the ranks it took: the median of those steps."""


def read_status(folder: Path) -> Status:
    """The status of a run.

    Raises:
        ConfigError: the folder is no run's.
        CheckpointError: the journal is damaged.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder}: no run's folder: it has no {CONFIG}; give a run's `output`")
    config = load_config(PretrainConfig, folder / CONFIG)
    rows, now = read_journal(folder / JOURNAL), time.time()
    steps = [row for row in rows if row["kind"] == "step"]
    held = [row for row in rows if row["kind"] == "held_out"]
    starts = [row for row in rows if row["kind"] == "start"]
    recent = steps[-RECENT:]
    done = steps[-1]["step"] if steps else 0
    rate = statistics.median(row["samples_per_second"] for row in recent) if recent else None
    saved = _newest_checkpoint(folder / CHECKPOINTS)
    holder, is_alive = holder_of(folder / LOCK)
    is_finished = saved is not None and saved[0] >= config.train.steps
    return Status(
        state="finished" if is_finished else "running" if is_alive else "not running",
        holder=holder if is_alive else "",
        step=done,
        steps=config.train.steps,
        epoch=steps[-1]["epoch"] if steps else 0.0,
        loss=next((row["loss"] for row in reversed(steps) if row["loss"] is not None), None),
        held_out=held[-1]["held_out"] if held else {},
        held_out_step=held[-1]["step"] if held else -1,
        samples_per_second=rate,
        data_wait=statistics.median(row["data_wait"] for row in recent) if recent else None,
        left_s=(config.train.steps - done) * config.train.batch / rate if rate and not is_finished else None,
        step_age_s=now - steps[-1]["time"] if steps else None,
        checkpoint_step=saved[0] if saved else None,
        checkpoint_age_s=now - saved[1] if saved else None,
        starts=len(starts),
        world=starts[-1]["world"] if starts else None,
        **_made_again(rows),
        left_out=sum("left_out" in row for row in steps),
        **_slowest(recent if starts and starts[-1]["world"] > 1 else []),
    )


def told(folder: Path, status: Status) -> str:
    """The status as lines for people."""
    who = f" ({status.holder})" if status.holder else ""
    world = f", {status.world} rank{'s' * (status.world != 1)}" if status.world else ""
    lines = [f"{folder}: {status.state}{who}{world}; started {status.starts} time{'s' * (status.starts != 1)}"]
    line = f"step {status.step:,} of {status.steps:,} ({status.step / status.steps:.1%}), epoch {status.epoch:.2f}"
    if status.samples_per_second is not None and status.data_wait is not None:
        line += f"; {status.samples_per_second:.2f} samples/s, data wait {status.data_wait:.0%}"
    if status.left_s is not None:
        line += f"; {duration(status.left_s)} " + ("left" if status.state == "running" else "to go once it runs")
    if status.step_age_s is not None:
        line += f"; last step {duration(status.step_age_s)} ago"
    lines.append(line)
    if status.again_from is not None and status.again_age_s is not None:
        lines.append(
            f"taken up after step {status.again_from:,}, {duration(status.again_age_s)} ago: steps up to "
            f"{status.step:,} are made again, without rows"
        )
    if status.slowest_rank is not None and status.slowest_times is not None:
        lines.append(f"slowest: rank {status.slowest_rank}, {status.slowest_times:.2f} times the middle of the ranks")
    if status.loss is not None:
        line = f"loss {status.loss:.4f}"
        if "loss" in status.held_out:
            line += f"; held out {status.held_out['loss']:.4f} after step {status.held_out_step:,}"
        lines.append(line + (f"; {status.left_out} steps left out" if status.left_out else ""))
    if status.checkpoint_age_s is None:
        lines.append("no checkpoint yet")
    else:
        line = f"last checkpoint: step {status.checkpoint_step:,}, {duration(status.checkpoint_age_s)} ago"
        if status.state == "not running":
            line += "; the same command goes on from there, if `mim-scale checkpoint verify` finds it whole"
        lines.append(line)
    return "\n".join(lines)


def _made_again(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By the order of rows, as clocks jump."""
    last = next((row for row in reversed(rows) if row["kind"] in {"start", "step"}), None)
    done = max((row["step"] for row in rows if row["kind"] == "step"), default=0)
    if last is None or last["kind"] == "step" or last["step"] >= done:
        return {"again_from": None, "again_age_s": None}
    return {"again_from": last["step"], "again_age_s": time.time() - last["time"]}


def _slowest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    lags = [(row["slowest_rank"], row["slowest_times"]) for row in rows if "slowest_rank" in row]
    if not lags:
        return {"slowest_rank": None, "slowest_times": None}
    rank = statistics.mode(rank for rank, _ in lags)
    return {"slowest_rank": rank, "slowest_times": statistics.median(times for who, times in lags if who == rank)}


def _newest_checkpoint(folder: Path) -> tuple[int, float] | None:
    """(step, time) of the newest published one; whether it is whole is for `mim-scale checkpoint verify` to say."""
    found = []
    for entry in folder.iterdir() if folder.is_dir() else ():
        if match := re.fullmatch(r"step_(\d{8,})", entry.name):
            found.append((int(match[1]), entry.stat().st_mtime))
    return max(found, default=None)


def holder_of(path: Path) -> tuple[str, bool]:
    """(who, whether it seems alive): of another machine's process only the lock's text is known here."""
    try:
        entry: dict[str, Any] = json.loads(path.read_bytes())
        pid, host = int(entry["pid"]), str(entry["host"])
    except (ValueError, KeyError, TypeError, OSError):
        return "", False
    if host == socket.gethostname():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return "", False
        except PermissionError:
            pass
    return f"process {pid} on {host}", True
