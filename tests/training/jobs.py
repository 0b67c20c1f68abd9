"""Starts training jobs in processes of their own, through the launchers that users have."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from mim_scale.config import PretrainConfig
from mim_scale.config_file import dump_config

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = str(ROOT / "launch" / "pretrain.py")


def environment(**changes: str) -> dict[str, str]:
    """This process's variables without those that place it among ranks."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RAY_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    return {**kept, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", **changes}


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def python() -> list[str]:
    """One rank."""
    return [sys.executable]


def torchrun(world: int) -> list[str]:
    """Several ranks by torch's launcher."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]


def deepspeed(world: int) -> list[str]:
    """Several ranks by DeepSpeed's launcher."""
    launcher = str(Path(sys.executable).parent / "deepspeed")
    return [launcher, "--num_gpus", str(world), "--master_port", str(free_port())]


def write_config(config: PretrainConfig, folder: Path) -> Path:
    """The config as a file."""
    path = folder / "config.yaml"
    path.write_text(dump_config(config))
    return path


def run(command: list[str], timeout: float = 180, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command, cwd=ROOT, env=environment(**changes), capture_output=True, text=True, timeout=timeout, check=False
    )


def result_line(job: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What a checking program printed after RESULT."""
    lines = [line for line in job.stdout.splitlines() if "RESULT " in line]
    assert lines, f"exit {job.returncode}\n{job.stdout[-3000:]}\n{job.stderr[-3000:]}"
    found: dict[str, Any] = json.loads(lines[-1].split("RESULT ", 1)[1])
    return found


def errors_of(job: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines that tell a user what is wrong."""
    return [line for line in (job.stdout + job.stderr).splitlines() if line.startswith("error: ")]
