"""Where this process stands among the ranks, read from whatever started it; no torch, so that it answers at once.

The deepspeed launcher and torchrun set RANK, WORLD_SIZE and LOCAL_RANK. srun sets SLURM_PROCID, SLURM_NTASKS and
SLURM_LOCALID, from which the rest is derived. A process that nobody started in company is rank 0 of 1.
"""

import fcntl
import os
import re
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from mim_scale.errors import ClusterError

INTERFACE = "GLOO_SOCKET_IFNAME"
"""What gloo reads; by itself it looks the machine's own name up, which may mean loopback, where nobody else answers."""
SIOCGIFADDR = 0x8915
FIRST_PORT = 20000
NUM_PORTS = 20000
RESERVED_STEPS = 0xFFFFFFF0
"""Slurm's numbers from here on are no steps of srun's: the batch shell, say."""


@dataclass(frozen=True)
class Placement:
    """The number of this process among all (`rank` of `world`) and on its machine, and where the ranks meet."""

    rank: int
    world: int
    local_rank: int
    address: str
    port: int


def read_placement(environment: Mapping[str, str]) -> Placement:
    """The placement that the environment's variables describe.

    Raises:
        ClusterError: a variable is missing beside others that were set, or is no number; or this is the shell of a
            batch job of several tasks, where the others do not run.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _checked(
            Placement(
                _number(environment, "RANK"),
                _number(environment, "WORLD_SIZE"),
                _number(environment, "LOCAL_RANK"),
                environment.get("MASTER_ADDR", "127.0.0.1"),
                _number(environment, "MASTER_PORT"),
            )
        )
    # srun sets SLURM_STEP_NUM_TASKS for its own step; SLURM_NTASKS alone is what older versions give.
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    if "SLURM_PROCID" in environment and tasks in environment:
        _refuse_batch_shell(environment)
        return _checked(
            Placement(
                _number(environment, "SLURM_PROCID"),
                _number(environment, tasks),
                _number(environment, "SLURM_LOCALID"),
                environment.get("MASTER_ADDR") or _first_host(environment),
                _slurm_port(environment),
            )
        )
    return Placement(0, 1, 0, "127.0.0.1", 0)


@contextmanager
def exported(placement: Placement) -> Iterator[None]:
    """Set the five variables that libraries read, so that all of them see the same placement; put back at the end.

    With company, gloo is told the network that leads to where the ranks meet, unless GLOO_SOCKET_IFNAME names one.
    """
    variables = {
        "RANK": str(placement.rank),
        "WORLD_SIZE": str(placement.world),
        "LOCAL_RANK": str(placement.local_rank),
        "MASTER_ADDR": placement.address,
        "MASTER_PORT": str(placement.port),
    }
    if placement.world > 1 and INTERFACE not in os.environ and (interface := interface_towards(placement.address)):
        variables[INTERFACE] = interface
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def interface_towards(address: str) -> str | None:
    """The network interface by which this machine reaches an address (IPv4); None where that cannot be told."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # A datagram socket that connects sends nothing; the system chooses where it would.
            probe.connect((address, 9))
        except OSError:
            return None
        own = socket.inet_aton(probe.getsockname()[0])
        # Addresses of loopback other than the first stand at no interface.
        if own[0] == 127:
            own = socket.inet_aton("127.0.0.1")
        for _, name in socket.if_nameindex():
            try:
                request = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue  # it has no address
            if request[20:24] == own:
                return name
    return None


def _refuse_batch_shell(environment: Mapping[str, str]) -> None:
    """sbatch gives its shell SLURM_PROCID 0 and the tasks of the whole job, but only srun makes a step of them."""
    if "SLURM_STEP_NUM_TASKS" in environment or _number(environment, "SLURM_NTASKS") == 1:
        return
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", ""))
    if not step.isdigit() or int(step) >= RESERVED_STEPS:
        raise ClusterError(
            f"this is the shell of a batch job of {environment['SLURM_NTASKS']} tasks, and no task of it: start the "
            "same command by srun"
        )


def _checked(placement: Placement) -> Placement:
    if not 0 <= placement.rank < placement.world:
        raise ClusterError(
            f"this process is rank {placement.rank} of {placement.world}, which cannot be: look at the launcher's "
            "settings"
        )
    return placement


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None or not text.isdigit():
        found = "not set" if text is None else f"{text!r}, not a number"
        raise ClusterError(f"{name} is {found}: start the ranks with deepspeed, torchrun or srun")
    return int(text)


def _slurm_port(environment: Mapping[str, str]) -> int:
    """A port that two jobs on one machine do not share: it follows from the job's number."""
    if "MASTER_PORT" in environment:
        return _number(environment, "MASTER_PORT")
    job = _number(environment, "SLURM_JOB_ID") if "SLURM_JOB_ID" in environment else 0
    return FIRST_PORT + job % NUM_PORTS


def _first_host(environment: Mapping[str, str]) -> str:
    """The first name of a Slurm host list such as `gpu[03-05,9],login1`."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    match = re.match(r"([^,\[]+)(?:\[([^,\]\-]+))?", nodes)
    if match is None:
        raise ClusterError(f"SLURM_STEP_NODELIST {nodes!r} names no host: set MASTER_ADDR to the first node's name")
    return match.group(1) + (match.group(2) or "")
