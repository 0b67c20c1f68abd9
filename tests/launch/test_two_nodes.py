"""The same launch on two nodes: the losses of one node, one word when a node dies, and a restart that goes on."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.launch.nodes import Node, two_nodes
from tests.launch.runs import LIMIT_S, SUPERVISE, arguments, assert_same_end, losses, small_run, until
from tests.training.jobs import free_port, run, torchrun

pytestmark = [pytest.mark.dist, pytest.mark.launcher, pytest.mark.soak]

Nodes = tuple[Node, Node]
Command = list[str]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with two_nodes() as found:
        yield found


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("run"), steps=24)


@pytest.fixture(scope="module")
def one_node(config: Path) -> dict[int, Path]:
    """Runs of 2 and 4 ranks on one node, by their number."""
    found = {}
    for world in (2, 4):
        found[world] = config.parent / f"one_node_{world}"
        assert run([*torchrun(world), *arguments(config, found[world])]).returncode == 0
    return found


def under_deepspeed(nodes: Nodes, number: int, ranks: int, port: int, folder: Path) -> Command:
    hosts = folder / "hosts"
    hosts.write_text("".join(f"{node.address} slots={ranks}\n" for node in nodes))
    launcher = str(Path(sys.executable).parent / "deepspeed")
    there = ["--hostfile", str(hosts), "--no_ssh", "--node_rank", str(number)]
    return [launcher, *there, "--master_addr", nodes[0].address, "--master_port", str(port)]


def under_torchrun(nodes: Nodes, number: int, ranks: int, port: int, folder: Path) -> Command:
    there = ["--nnodes", "2", "--node_rank", str(number), "--nproc_per_node", str(ranks)]
    meeting = ["--master_addr", nodes[0].address, "--master_port", str(port)]
    return [sys.executable, "-m", "torch.distributed.run", *there, *meeting]


LAUNCHERS = [under_deepspeed, under_torchrun]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_nodes_give_the_losses_of_one(
    nodes: Nodes, config: Path, one_node: dict[int, Path], tmp_path: Path, launcher: type[Command], ranks: int
) -> None:
    port = free_port()
    jobs = [
        node.start(
            [*launcher(nodes, number, ranks, port, tmp_path), *arguments(config, tmp_path / "run")],
            tmp_path / f"log_{number}",
        )
        for number, node in enumerate(nodes)
    ]
    codes = [job.wait(timeout=LIMIT_S) for job in jobs]
    assert codes == [0, 0], told(tmp_path)
    assert_same_end(tmp_path / "run", one_node[2 * ranks])


def srun(node: Node, rank: int, port: int, command: Command, folder: Path, head: Node) -> subprocess.Popen[bytes]:
    """What srun sets for the one task of a node."""
    there = {
        "SLURM_PROCID": str(rank),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": "0",
        "SLURM_JOB_ID": str(port - 20000),
        # Slurm names nodes; these can be looked up by address alone.
        "SLURM_STEP_NODELIST": head.address,
    }
    return node.start(command, folder / f"log_{rank}", **there)


def test_the_environment_of_srun_places_ranks(
    nodes: Nodes, config: Path, one_node: dict[int, Path], tmp_path: Path
) -> None:
    command = [sys.executable, *arguments(config, tmp_path / "run")]
    jobs = [srun(node, rank, 23456, command, tmp_path, nodes[0]) for rank, node in enumerate(nodes)]
    assert [job.wait(timeout=LIMIT_S) for job in jobs] == [0, 0], told(tmp_path)
    assert_same_end(tmp_path / "run", one_node[2])


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("dies", [0, 1])
def test_a_node_that_dies_comes_back_and_the_run_goes_on(
    nodes: Nodes, config: Path, one_node: dict[int, Path], tmp_path: Path, launcher: type[Command], dies: int
) -> None:
    """All that runs on a node is killed at once, as when its power goes; then it is started again, as at a boot."""
    port, output = free_port(), tmp_path / "run"
    commands = [
        [*SUPERVISE, "--", *launcher(nodes, number, 1, port, tmp_path), *arguments(config, output)]
        for number in range(2)
    ]
    jobs = [
        node.start(command, tmp_path / f"log_{number}")
        for number, (node, command) in enumerate(zip(nodes, commands, strict=True))
    ]
    until(lambda: len(losses(output)) >= 4, lambda: all(job.poll() is None for job in jobs))
    for process in [psutil.Process(jobs[dies].pid), *psutil.Process(jobs[dies].pid).children(recursive=True)]:
        process.send_signal(signal.SIGKILL)
    jobs[dies].wait()
    other = tmp_path / f"log_{1 - dies}"
    until(
        lambda: "supervisor: all ranks ended in order (75" in other.read_text(), lambda: jobs[1 - dies].poll() is None
    )
    assert "lost another rank" in other.read_text()
    made = len(losses(output))
    jobs[dies] = nodes[dies].start(commands[dies], tmp_path / f"log_{dies}")
    assert [job.wait(timeout=LIMIT_S) for job in jobs] == [0, 0], told(tmp_path)
    assert made < 24, "it died too late to mean anything"
    assert_same_end(output, one_node[2])


def told(folder: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("log_*")))
