"""`mim-scale doctor`: what is typed in, what is shown. Heavy imports wait."""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mim_scale.errors import ConfigError

if TYPE_CHECKING:
    from mim_scale.config import PretrainConfig
    from mim_scale.doctor.finding import Finding
    from mim_scale.doctor.report import Report

WAIT_S = 300.0
"""How long the other ranks may take to come."""
LONGEST_S = 86400.0
RANKS_PER_CORE = 4
"""More than so many say nothing of a run, and may leave the machine without memory."""


def add_doctor(verbs: Any) -> None:
    """Add the verb."""
    verb = verbs.add_parser(
        "doctor",
        help="what would go wrong with a run here, and what to do about it",
        description=(
            "Looks at libraries, devices, limits and disks, and with a config at its store, run folder and servers. "
            "Started by torchrun, srun or deepspeed, or with --ranks, it also measures the ranks' all-reduce. "
            "Exit 0: all well; 1: something will hurt; 2: a run cannot work. Nothing is left on disk."
        ),
    )
    verb.add_argument("--config", type=Path, help="the run that is to be; without it the machine alone is looked at")
    verb.add_argument("overrides", nargs="*", metavar="key=value")
    verb.add_argument("--ranks", type=int, metavar="N", help="start N ranks on this machine and measure between them")
    verb.add_argument(
        "--wait", type=float, default=WAIT_S, metavar="S", help="seconds for other ranks to come (default: %(default)s)"
    )
    verb.add_argument("--json", action="store_true", help="for scripts")
    verb.set_defaults(verb=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    if options.config is None and options.overrides:
        raise ConfigError(f"{options.overrides[0]}: there is no config to replace a setting of; give --config FILE")
    if not 0 < options.wait <= LONGEST_S:
        raise ConfigError(f"--wait {options.wait:g}: give seconds above 0, up to a day ({LONGEST_S:g})")
    # So that what is written for a moment goes before the process does.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return _examine(options) if options.ranks is None else _start_ranks(options)
    finally:
        signal.signal(signal.SIGTERM, before)


def _examine(options: argparse.Namespace) -> int:
    from mim_scale.doctor.finding import failure
    from mim_scale.doctor.report import examine
    from mim_scale.training.placement import Placement, read_placement

    before, placement = [], Placement(0, 1, 0, "127.0.0.1", 0)
    try:
        placement = read_placement(os.environ)
    except Exception as error:
        before.append(failure("ranks", error))
    config, complaint = _config_of(options)
    if complaint is not None and placement.local_rank == 0:
        before.append(complaint)
    report = examine(config, before, placement, options.wait)
    if placement.rank == 0:
        print(json.dumps(as_values(report)) if options.json else told(report), flush=True)
    elif report.exit_code == 2 and not report.exchanges:
        # Not met: rank 0 tells nothing of this one.
        for host, finding in report.findings:
            if finding.level == "error":
                print(f"error: rank {placement.rank} on {host}: {finding.found}; {finding.remedy}", file=sys.stderr)
    return report.exit_code


def _config_of(options: argparse.Namespace) -> "tuple[PretrainConfig | None, Finding | None]":
    from mim_scale.config import PretrainConfig
    from mim_scale.config_file import load_config
    from mim_scale.doctor.finding import failure

    if options.config is None:
        return None, None
    try:
        return load_config(PretrainConfig, options.config, options.overrides), None
    except Exception as error:
        return None, failure("config", error)


def as_values(report: "Report") -> dict[str, Any]:
    """For scripts."""
    from dataclasses import asdict

    return {
        "exit": report.exit_code,
        "ranks": report.world,
        "findings": [{"host": host, **asdict(finding)} for host, finding in report.findings],
        "all_reduce": [asdict(one) for one in report.exchanges],
    }


def told(report: "Report") -> str:
    """For people: a line a finding, its remedy below it."""
    machines: dict[Finding, list[str]] = {}
    for host, finding in report.findings:
        machines.setdefault(finding, []).append(host)
    hosts = {host for host, _ in report.findings if host != "all ranks"}
    wide = max((len(finding.check) for finding in machines), default=0)
    lines = []
    for finding, where in machines.items():
        some = f" [{', '.join(dict.fromkeys(where))}]" if len(hosts) > 1 and set(where) != hosts else ""
        lines.append(
            f"{finding.level:<8}{finding.check:<{wide}}  {finding.found}{some if where != ['all ranks'] else ''}"
        )
        if finding.remedy and finding.level != "ok":
            lines.append(f"{'':<8}{'':<{wide}}  -> {finding.remedy}")
    if report.exchanges:
        lines += ["", f"{'all-reduce':<12}{'bytes':>14}{'ms':>12}{'GB/s':>10}"]
        lines += [
            f"{one.device:<12}{one.bytes:>14,}{one.seconds * 1e3:>12,.3f}{one.gb_per_s:>10,.3f}"
            for one in report.exchanges
        ]
    counts = {level: sum(finding.level == level for finding in machines) for level in ("error", "warning", "note")}
    counted = ", ".join(f"{count} {level}{'s' * (count > 1)}" for level, count in counts.items() if count)
    verdict = ("a run can start", "a run can start, but will suffer", "a run cannot work")[report.exit_code]
    return "\n".join([*lines, "", f"{counted or 'all well'}: {verdict}"])


def _start_ranks(options: argparse.Namespace) -> int:
    """The same command once for each rank, on this machine; the code is rank 0's."""
    import socket

    from mim_scale.training.host import usable_cores

    if options.ranks < 1:
        raise ConfigError(f"--ranks is {options.ranks}, expected 1 or more")
    if options.ranks > (most := RANKS_PER_CORE * usable_cores()):
        raise ConfigError(f"--ranks {options.ranks} is more than {most}, four for each core; take fewer")
    if "RANK" in os.environ:
        raise ConfigError("--ranks starts ranks by itself: leave it out under a launcher, or start without one")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = [] if options.config is None else ["--config", str(options.config)]
    more = ["--json"] if options.json else []
    command = [sys.executable, "-m", "mim_scale.cli", "doctor", *config, *options.overrides, *more]
    placed = {"WORLD_SIZE": options.ranks, "LOCAL_WORLD_SIZE": options.ranks, "MASTER_PORT": port}
    shared = {name: str(value) for name, value in placed.items()} | {"MASTER_ADDR": "127.0.0.1"}
    jobs: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(options.ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            jobs.append(subprocess.Popen([*command, "--wait", str(options.wait)], env={**os.environ, **shared, **own}))
        codes = [job.wait() for job in jobs]
    finally:
        for job in jobs:
            if job.poll() is None:
                job.terminate()
        for job in jobs:
            job.wait()
    return codes[0] if codes[0] >= 0 else 2
