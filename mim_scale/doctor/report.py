"""`mim-scale doctor`: all checks, on one machine or on those of all ranks, as one report.

The first rank of each machine looks at that machine; rank 0 also at the config, and at servers that only it speaks to;
all of them measure what lies between them. No finding keeps a later check from being made.
"""

import os
import platform
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from mim_scale.config import PretrainConfig
from mim_scale.config_file import digest_config
from mim_scale.doctor import disk as doctor_disk
from mim_scale.doctor import machine as doctor_machine
from mim_scale.doctor import run as doctor_run
from mim_scale.doctor import services as doctor_services
from mim_scale.doctor.finding import EXIT, Check, Finding, failure, run_check
from mim_scale.doctor.run import Facts
from mim_scale.training.placement import Placement

if TYPE_CHECKING:
    from mim_scale.doctor.ranks import Exchange

RAY_LIMIT_S = doctor_services.JOIN_S + 10


@dataclass(frozen=True)
class Report:
    """Findings, each with the machine that it was made on, and the table of all-reduces where ranks have met."""

    world: int
    findings: "list[tuple[str, Finding]]"
    exchanges: "list[Exchange]"

    @property
    def exit_code(self) -> int:
        """0 all well, 1 something will hurt, 2 a run cannot work."""
        return max((EXIT[finding.level] for _, finding in self.findings), default=0)


def examine(config: PretrainConfig | None, before: list[Finding], placement: Placement, wait_s: float) -> Report:
    """Make every check that this rank has a part in; with company, meet the others.

    Args:
        config: Of the run that is to be; None for the machine alone.
        before: Findings that were made already.
        placement: Of this rank.
        wait_s: How long the others may take to come, and to answer.

    Returns:
        The same report on all ranks; where they did not meet, each has its own.
    """
    host, facts = socket.gethostname(), Facts()
    findings = [(host, finding) for finding in before]
    here = ranks_here(os.environ, placement.world)
    if placement.local_rank == 0:
        findings += [(host, one) for one in _look_at_machine(config, facts, placement, here)]
    if placement.world == 1:
        return Report(1, findings, [])
    try:
        return _together(config, facts, findings, placement, wait_s)
    except Exception as error:
        return Report(placement.world, [*findings, (host, failure("ranks", error))], [])


def ranks_here(environment: Mapping[str, str], world: int) -> int:
    """How many ranks this machine has, as torchrun, deepspeed or srun say it; all of them where none does."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        if number := re.match(r"[1-9]\d*", environment.get(name, "") if world > 1 else ""):
            return min(int(number[0]), world)
    return world


def _look_at_machine(config: PretrainConfig | None, facts: Facts, placement: Placement, here: int) -> list[Finding]:
    uses_ray = config is not None and config.data.transport == "ray"
    facts.versions = {name: doctor_machine.installed(name) for name in ("mim-scale", *doctor_machine.TOLD)}
    facts.versions["python"] = platform.python_version()
    facts.versions["config"] = digest_config(config)[:16] if config is not None else None
    precision = config.train.precision if config is not None else None
    checks: list[tuple[str, Check]] = [
        ("versions", doctor_machine.versions),
        ("devices", lambda: doctor_machine.devices(precision)),
        ("cores", doctor_machine.cores),
        ("memory", doctor_machine.memory),
        ("/dev/shm", lambda: doctor_machine.shared_memory(uses_ray or doctor_machine.visible_gpus() > 0)),
        ("limits", lambda: doctor_machine.limits(uses_ray)),
    ]
    found = [finding for name, check in checks for finding in run_check(name, check)]
    if config is None:
        found += run_check("disk", lambda: doctor_disk.room("disk", Path()))
        # No run is to be here: that nothing can be written is no error.
        for one in run_check("writing", lambda: doctor_disk.writing(Path())):
            found.append(replace(one, level="note") if one.level == "error" else one)
    else:
        found += _look_at_run(config, facts, placement, here)
    ray = run_check("ray", lambda: doctor_services.ray_settings(os.environ, uses_ray), RAY_LIMIT_S)
    return [*found, *ray]


def _look_at_run(config: PretrainConfig, facts: Facts, placement: Placement, here: int) -> list[Finding]:
    output = Path(config.output)
    checks: list[tuple[str, Check]] = [
        ("model", lambda: doctor_run.model(config, facts)),
        ("store", lambda: doctor_run.store(config, facts)),
        ("disk of output", lambda: doctor_run.disks(config, facts)),
        ("writing", lambda: doctor_disk.writing(output, facts.save_bytes)),
        ("room in memory", lambda: doctor_run.memory(config, facts, placement.world, here)),
        ("workers", lambda: doctor_run.threads(config, here)),
    ]
    if placement.rank == 0:
        tracking = config.tracking
        checks += [
            ("batch", lambda: doctor_run.batch(config, placement.world)),
            ("run folder", lambda: doctor_run.run_folder(config, facts)),
            ("mlflow", lambda: doctor_services.mlflow(tracking.mlflow, tracking.experiment, output)),
        ]
    return [finding for name, check in checks for finding in run_check(name, check)]


def _together(
    config: PretrainConfig | None,
    facts: Facts,
    findings: "list[tuple[str, Finding]]",
    placement: Placement,
    wait_s: float,
) -> Report:
    from mim_scale.doctor import ranks as doctor_ranks
    from mim_scale.training.ranks import joined

    host = socket.gethostname()
    with joined(placement, timedelta(seconds=wait_s)) as ranks:
        told = ranks.gather_objects((host, placement.local_rank == 0, facts, findings))
        machines = [(name, one) for name, is_first, one, _ in told if is_first]
        used = ranks.gather_objects((host, doctor_ranks.device_of(ranks)))
        # Before NCCL would wait for ranks without a GPU, or end for two on one.
        refused = doctor_ranks.devices(used)
        on_gpus = not refused and all(gpu is not None for _, gpu in used)
        table, met = doctor_ranks.exchanges(ranks, machines[0][1].parameters, on_gpus)
        met += [*refused, doctor_ranks.clocks(ranks), *doctor_ranks.alike(machines)]
        met += doctor_ranks.shared_folder(ranks, Path(config.output) if config is not None else Path())
        networks = ranks.gather_objects((host, placement.local_rank == 0, doctor_ranks.network(len(machines))))
    everywhere = [entry for *_, own in told for entry in own]
    everywhere += [(name, finding) for name, is_first, finding in networks if is_first]
    return Report(placement.world, everywhere + [("all ranks", finding) for finding in met], table)
