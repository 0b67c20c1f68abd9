"""The same program under every launcher: only the variables that they set differ."""

import os

import pytest

from mim_scale.errors import ClusterError
from mim_scale.training.placement import Placement, exported, interface_towards, read_placement

LAUNCHED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1234567"}
SLURM = {**BATCH, "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}


def test_alone() -> None:
    assert read_placement({"HOME": "/"}) == Placement(0, 1, 0, "127.0.0.1", 0)


def test_under_deepspeed_and_torchrun() -> None:
    assert read_placement(LAUNCHED) == Placement(3, 4, 1, "node0", 29500)


def test_launchers_win_over_the_job_they_run_in() -> None:
    assert read_placement({**SLURM, **LAUNCHED}).rank == 3


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[03-05,9],login1", "gpu03"),
        ("gpu[7,9-12]", "gpu7"),
        ("alpha,beta", "alpha"),
        ("rack2-n1.cluster", "rack2-n1.cluster"),
    ],
)
def test_under_srun(nodes: str, first: str) -> None:
    placement = read_placement({**SLURM, "SLURM_STEP_NODELIST": nodes})
    assert placement == Placement(5, 8, 1, first, 20000 + 1234567 % 20000)


def test_srun_step_smaller_than_its_job() -> None:
    assert read_placement({**SLURM, "SLURM_STEP_NUM_TASKS": "6"}).world == 6


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": "4294967291"}, {"SLURM_STEPID": "-5"}])
def test_the_shell_of_a_batch_job(step: dict[str, str]) -> None:
    """The others would never come; a job of one task has none."""
    with pytest.raises(ClusterError, match="shell of a batch job of 8 tasks, and no task of it"):
        read_placement({**BATCH, **step})
    assert read_placement({**BATCH, **step, "SLURM_NTASKS": "1"}).world == 1
    assert read_placement({**BATCH, **step, **LAUNCHED}).world == 4
    assert read_placement({**BATCH, "SLURM_STEPID": "3"}).world == 8


def test_srun_keeps_what_the_user_set() -> None:
    placement = read_placement({**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert (placement.address, placement.port) == ("10.0.0.1", 4000)


@pytest.mark.parametrize(
    "broken",
    [
        {**LAUNCHED, "RANK": "4"},
        {**LAUNCHED, "RANK": "one"},
        {name: value for name, value in LAUNCHED.items() if name != "MASTER_PORT"},
        {name: value for name, value in SLURM.items() if name != "SLURM_LOCALID"},
    ],
)
def test_half_a_placement_is_one_line(broken: dict[str, str]) -> None:
    with pytest.raises(ClusterError) as caught:
        read_placement(broken)
    assert "\n" not in str(caught.value)


def test_exported_variables_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "old")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with exported(Placement(1, 2, 0, "host", 77)):
        assert (os.environ["RANK"], os.environ["MASTER_PORT"]) == ("1", "77")
    assert os.environ["RANK"] == "old"
    assert "MASTER_PORT" not in os.environ


def test_gloo_is_told_the_network_that_leads_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine's own name may stand for loopback; in tests/launch/test_two_nodes.py it means nothing at all."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert {interface_towards(address) for address in ("127.0.0.1", "localhost", "127.0.0.3")} == {"lo"}
    assert interface_towards("no-such-host.invalid") is None
    with exported(Placement(1, 2, 0, "127.0.0.1", 77)):
        assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    with exported(Placement(0, 1, 0, "127.0.0.1", 77)):
        assert "GLOO_SOCKET_IFNAME" not in os.environ
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    with exported(Placement(1, 2, 0, "127.0.0.1", 77)):
        assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
