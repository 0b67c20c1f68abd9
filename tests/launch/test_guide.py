"""The commands of the guide: each can be read as it stands, and says how it was run or that it was not."""

import re

import pytest

from mim_scale.cli import _parser
from tests.launch.launches import ROOT, check_launch, split, without_supervisor

PAGE = ROOT / "docs" / "guide" / "from-one-workstation-to-eight-nodes.md"
RUN = {
    "deepspeed --num_gpus": "tests/training/test_launcher.py",
    "deepspeed --hostfile": "tests/launch/test_two_nodes.py",
    "torchrun --nproc_per_node": "tests/launch/test_supervised_run.py",
    "mim-scale estimate": "tests/estimate/test_estimate.py",
    "mim-scale doctor": "tests/doctor/test_doctor.py, test_ranks.py",
    "torchrun --nnodes": "tests/launch/test_two_nodes.py",
    "srun ": "tests/launch/test_two_nodes.py has what srun sets",
    "sbatch ": "tests/launch/test_batch_scripts.py, with stand-ins of Slurm's commands",
    "kubectl apply": "needs a cluster; tests/launch/test_manifests.py reads the file",
    "docker build": "needs an engine; tests/launch/test_images.py reads the file",
}
"""How a command begins, and where it is run or looked at."""


def commands() -> list[str]:
    blocks = re.findall(r"^```\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_there_are_commands_of_every_kind() -> None:
    told = [" ".join(without_supervisor(split(command))) for command in commands()]
    assert [begin for begin in RUN if not any(command.startswith(begin) for command in told)] == []


@pytest.mark.parametrize("command", commands())
def test_a_command_can_be_read_as_it_stands(command: str) -> None:
    words = without_supervisor(split(command))
    assert " ".join(words).startswith(tuple(RUN))
    if words[0] == "kubectl":
        assert words[1:3] == ["apply", "-f"]
        assert (ROOT / words[3]).is_file()
    elif words[0] == "docker":
        assert f" AS {words[words.index('--target') + 1]}\n" in (ROOT / "Dockerfile").read_text()
    elif "doctor" in words:
        _parser().parse_args(words[words.index("doctor") :])
    elif words[0] == "mim-scale":
        _parser().parse_args(words[1:])
    elif "launch/measure_link.py" in words:
        assert (ROOT / "launch" / "measure_link.py").is_file()
        assert words[-2] == "--out"
    else:
        check_launch(words)
