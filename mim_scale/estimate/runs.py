"""Runs that were made, for `mim-scale estimate`: the pace that they show, and what is predicted for them beside it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mim_scale.errors import ConfigError
from mim_scale.estimate import projection
from mim_scale.estimate.asked import Asked
from mim_scale.estimate.pace import Calibration, RunTimes, pace_of_run, read_run
from mim_scale.estimate.same_work import POLICY, refuse_other_work
from mim_scale.estimate.scaling import Cluster, Pace, step_time

Say = Callable[[str], None]


def pace_of(run: RunTimes, asked: Asked, where: str, beware: Say) -> Calibration:
    """The pace of a run's ranks, with what of a step the link takes off it.

    Raises:
        ConfigError: the run did other work than is asked about, or its link is not known.
    """
    at = _cluster_of(run, asked, where, beware)
    is_on_cores, exchange_s = asked.device == "cpu", 0.0
    if run.world > 1:
        work = projection.work_of(run.config, asked.cost, asked.policy, run.world)
        exchange_s = step_time(Pace(1.0, 0.0, 0.0, is_on_cores=is_on_cores), work, at).exchange
    return pace_of_run(run, exchange_s, asked.device, at.cores, at.on_a_node, where)


def refuse_other_pace(found: RunTimes | Calibration, asked: Asked, where: str) -> None:
    """Raise ConfigError where what was measured is no pace of what is asked about."""
    refuse_other_work(where, {POLICY: found.policy} | (found.of or {}), asked.settings, is_whole=found.of is not None)
    if found.device not in (None, asked.device):
        raise ConfigError(
            f"{where}: was measured on {found.device}, and ranks are taken to compute on {asked.device} (--device, "
            "--link, or what is here): give --device, or measure there"
        )


def _cluster_of(run: RunTimes, asked: Asked, where: str, beware: Say) -> Cluster:
    """What the run ran on: nodes like those of the cluster."""
    refuse_other_pace(run, asked, where)
    if run.device is None:
        beware(f"{where}: its journal does not say what it computed on; taken to be {asked.device}")
    if run.policy == "auto":
        beware(f"{where}: its journal does not say what checkpointing auto chose; taken to be {asked.policy}")
    if run.hosts is None and run.world > 1:
        beware(f"{where}: its journal does not say on how many nodes it ran; taken to be one")
    hosts = run.hosts or 1
    if run.world % hosts:
        raise ConfigError(f"{where}: its {run.world} ranks were not spread evenly over {hosts} nodes: take another run")
    at = replace(asked.cluster, ranks=run.world, ranks_per_node=run.world // hosts)
    if (at.on_a_node > 1 and at.within is None) or (at.nodes > 1 and at.between is None):
        raise ConfigError(
            f"{where}: ran on {run.world} ranks on {hosts} node{'s' * (hosts > 1)}, whose exchanges cannot be told "
            "from their computing: give the --link they had, or a run on one rank"
        )
    return at


def tell_beside(
    asked: Asked, pace: Pace, folders: Sequence[Path], values: dict[str, Any], say: Say, beware: Say
) -> None:
    """Runs on nodes of the cluster, each with the prediction for its own batch and ranks.

    Raises:
        ConfigError: a run did other work than is asked about, or its link is not known.
    """
    if not folders:
        return
    rows = []
    values["beside"] = []
    for folder in folders:
        run = read_run(folder)
        at = _cluster_of(run, asked, f"--beside {folder}", beware)
        work = projection.work_of(run.config, asked.cost, asked.policy, run.world)
        predicted = step_time(pace, work, at).training
        off, batch = predicted / run.step_s - 1, run.config.train.batch
        values["beside"].append(
            {"run": str(folder), "ranks": run.world, "measured_s": run.step_s, "predicted_s": predicted}
        )
        rows.append(f"{run.world:>7}{batch:>7}{run.step_s:>12.4f}{predicted:>13.4f}{off:>+8.1%}   {folder}")
    say("beside runs that were made, steps without saves and held-out measurements:")
    say(f"{'ranks':>7}{'batch':>7}{'measured s':>12}{'predicted s':>13}{'off':>8}   run")
    for row in rows:
        say(row)
