"""`mim-scale doctor` with company: what lies between ranks, measured for real."""

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mim_scale.cli import run as run_verb
from mim_scale.doctor import ranks as doctor_ranks
from mim_scale.doctor import report
from mim_scale.doctor.commands import told
from mim_scale.doctor.finding import Finding
from mim_scale.doctor.ranks import Exchange, alike, skew
from mim_scale.doctor.report import Report, ranks_here
from mim_scale.doctor.run import Facts
from mim_scale.errors import ConfigError
from mim_scale.training import ranks as training_ranks
from mim_scale.training.placement import Placement
from mim_scale.training.ranks import Ranks
from tests.launch.nodes import two_nodes, why_not
from tests.synthetic import make_dataset
from tests.training.jobs import deepspeed, environment, free_port, run, torchrun, write_config
from tests.training.standin import small_config

DOCTOR = ["-m", "mim_scale.cli", "doctor"]


def values_of(job: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    lines = [line for line in job.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1, f"exit {job.returncode}\n{job.stdout[-3000:]}\n{job.stderr[-3000:]}"
    found: dict[str, Any] = json.loads(lines[0])
    return found


def assert_measured(values: dict[str, Any]) -> None:
    levels = {entry["check"]: entry["level"] for entry in values["findings"]}
    together = ("all-reduce", "clocks", "same everywhere", "shared output", "network")
    assert {name: levels[name] for name in together} == dict.fromkeys(together, "ok")
    assert values["ranks"] == 2
    sizes = [(one["bytes"], one["is_right"]) for one in values["all_reduce"] if one["device"] == "cpu"]
    assert sizes[:2] == [(4, True), (65536, True)]
    assert all(one["is_right"] and one["seconds"] > 0 for one in values["all_reduce"])


@pytest.mark.dist
def test_two_ranks_on_this_machine(tmp_path: Path) -> None:
    """Without a config: what lies between the ranks."""
    folder = tmp_path / "here"
    folder.mkdir()
    command = [sys.executable, *DOCTOR, "--ranks", "2", "--json"]
    job = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    values = values_of(job)
    assert job.returncode == values["exit"]
    assert_measured(values)
    assert list(folder.iterdir()) == []


@pytest.mark.dist
@pytest.mark.soak
@pytest.mark.launcher
def test_two_ranks_under_launchers(tmp_path: Path) -> None:
    """As the guide has them: with a config, and with one whose batch two ranks do not divide."""
    make_dataset(tmp_path / "store")
    config = write_config(small_config(str(tmp_path / "store"), str(tmp_path / "run")), tmp_path)
    for launcher in (torchrun(2), [*deepspeed(2), "--no_local_rank", "--module"]):
        started = [*launcher, *(DOCTOR if "torch" in " ".join(launcher) else DOCTOR[1:])]
        job = run([*started, "--config", str(config), "--json"])
        values = values_of(job)
        assert_measured(values)
        assert (job.returncode, values["exit"]) in {(0, 0), (1, 1)}
    assert not (tmp_path / "run").exists()
    odd = run([*torchrun(2), *DOCTOR, "--config", str(config), "train.batch=3", "train.micro_batch=1", "--json"])
    found = {entry["check"]: entry for entry in values_of(odd)["findings"]}
    assert found["batch"]["level"] == "error"
    assert odd.returncode != 0


@pytest.mark.dist
@pytest.mark.soak
def test_a_rank_that_does_not_come(tmp_path: Path) -> None:
    """The others say so, after what they found by themselves."""
    placed = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    job = run([sys.executable, *DOCTOR, "--wait", "3", "--json"], MASTER_PORT=str(free_port()), **placed)
    values = values_of(job)
    last = values["findings"][-1]
    assert (job.returncode, last["check"], last["level"]) == (2, "ranks", "error")
    assert "did not meet the others" in last["found"]
    assert "Traceback" not in job.stderr
    assert {"versions", "disk speed"} <= {entry["check"] for entry in values["findings"]}


DIFFERS = 'mount -t tmpfs tmpfs "$1" && mount --bind "$2" "$3" && shift 3 && ulimit -n 300 && exec "$@"'
"""A node whose shared disk is its own, with another store in the place of the one, and few files."""


@pytest.mark.dist
@pytest.mark.soak
def test_two_nodes_alike_and_one_that_differs(tmp_path: Path) -> None:
    """Nodes with networks and host names of their own; what differs is told with the node that it is on."""
    if reason := why_not():
        pytest.skip(reason)
    shared, store, other = tmp_path / "shared", tmp_path / "store", tmp_path / "other"
    shared.mkdir()
    make_dataset(store)
    make_dataset(other, seed=5)
    config = write_config(small_config(str(store), str(shared / "run")), tmp_path)
    reports = []
    with two_nodes() as nodes:
        for wrapped in ([], ["unshare", "-m", "sh", "-c", DIFFERS, "sh", str(shared), str(other), str(store)]):
            command = [sys.executable, *DOCTOR, "--config", str(config), "--json"]
            placed = {"WORLD_SIZE": "2", "MASTER_ADDR": nodes[0].address, "MASTER_PORT": str(free_port())}
            placed |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            log = tmp_path / f"log_{len(reports)}"
            jobs = [
                nodes[0].start(command, log, RANK="0", **placed),
                nodes[1].start([*wrapped, *command], tmp_path / "log_of_second", RANK="1", **placed),
            ]
            codes = [job.wait(timeout=180) for job in jobs]
            lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
            assert len(lines) == 1, log.read_text() + (tmp_path / "log_of_second").read_text()
            reports.append(json.loads(lines[0]))
            assert codes == [reports[-1]["exit"]] * 2
        names = [node.name for node in nodes]
    alike_ones, differing = ({(one["host"], one["check"]): one for one in values["findings"]} for values in reports)
    for found in (alike_ones, differing):
        assert "2 ranks on 2 machine(s)" in found["all ranks", "all-reduce"]["found"]
        assert not [name for name in names if "gloo uses mim" not in found[name, "network"]["found"]]
    assert [alike_ones["all ranks", check]["level"] for check in ("same everywhere", "shared output")] == ["ok", "ok"]
    assert reports[0]["exit"] < 2
    assert differing["all ranks", "same everywhere"]["found"].startswith("other datasets: ")
    assert differing["all ranks", "shared output"]["found"].startswith(f"not seen from {names[1]}")
    assert [differing[name, "open files"]["level"] for name in names] == [
        alike_ones[names[0], "open files"]["level"],
        "warning",
    ]
    assert reports[1]["exit"] == 2
    assert not (shared / "run").exists()


DIES = """
import os
from mim_scale.doctor import ranks as doctor_ranks
from mim_scale.doctor import report
doctor_ranks.clocks = lambda ranks: os._exit(9)
from mim_scale.cli import main
main()
"""


@pytest.mark.dist
@pytest.mark.soak
def test_a_rank_that_dies_while_it_is_measured() -> None:
    placed = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    code = ["-c", DIES, "doctor"]
    with subprocess.Popen([sys.executable, *code], env=environment(RANK="1", LOCAL_RANK="1", **placed)) as other:
        job = run([sys.executable, *DOCTOR, "--json"], RANK="0", LOCAL_RANK="0", **placed)
        assert other.wait(timeout=60) == 9
    last = values_of(job)["findings"][-1]
    assert (job.returncode, last["check"], last["level"]) == (2, "ranks", "error")
    assert "rank 0 lost another rank" in last["found"]
    assert "Traceback" not in job.stderr


def test_ranks_inside_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="leave it out under a launcher"):
        run_verb(["doctor", "--ranks", "2"])
    monkeypatch.delenv("RANK")
    for ranks, line in (("0", "expected 1 or more"), ("100000", "four for each core")):
        with pytest.raises(ConfigError, match=line):
            run_verb(["doctor", "--ranks", ranks])
    for wait in ("0", "nan", "inf", "1e12"):
        with pytest.raises(ConfigError, match="give seconds above 0, up to a day"):
            run_verb(["doctor", "--ranks", "2", "--wait", wait])


def test_ranks_of_a_machine() -> None:
    assert ranks_here({"LOCAL_WORLD_SIZE": "4"}, 8) == 4
    assert ranks_here({"LOCAL_SIZE": "2"}, 8) == 2
    assert ranks_here({"SLURM_STEP_TASKS_PER_NODE": "8(x4)"}, 32) == 8
    assert ranks_here({"SLURM_NTASKS_PER_NODE": "8"}, 1) == 1
    assert ranks_here({}, 3) == 3


def test_a_wrong_sum_and_a_slow_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that adds wrongly cannot be had here: what its table would say is judged."""
    ranks = Ranks(0, 1, 0, torch.device("cpu"))
    monkeypatch.setattr(doctor_ranks, "measure", lambda *_: [Exchange("cpu", 4, 0.1, 0.01, True)])
    assert [one.level for one in doctor_ranks.exchanges(ranks, 1000, False)[1]] == ["ok"]
    monkeypatch.setattr(Ranks, "gather_objects", lambda self, value: [value, "another"])
    assert [one.level for one in doctor_ranks.exchanges(ranks, 1000, False)[1]] == ["warning"]
    monkeypatch.setattr(doctor_ranks, "measure", lambda *_: [Exchange("cpu", 4, 0.1, 1.0, False)])
    (found,) = doctor_ranks.exchanges(ranks, 1000, False)[1]
    assert (found.level, found.found) == ("error", "wrong sums: 4 bytes on cpu")


def test_clocks_and_machines_that_differ() -> None:
    assert skew(0.3, 0.01).level == "ok"
    assert skew(5.0, 4.5).level == "ok"  # so far apart only as the reading took
    assert (skew(5.0, 0.1).level, skew(5.0, 0.1).found) == ("warning", "5.0 s apart")
    one = Facts({"torch": "2.11.0", "numpy": "2.4"}, "a" * 64)
    other = Facts({"torch": "2.9.0", "numpy": "2.4"}, "b" * 64)
    assert [finding.level for finding in alike([("n1", one), ("n2", one)])] == ["ok"]
    found = alike([("n1", one), ("n2", other)])
    assert [finding.level for finding in found] == ["error", "error"]
    assert found[0].found == "torch: 2.11.0 on n1; 2.9.0 on n2"
    assert found[1].found == f"other datasets: {'a' * 16} on n1, {'b' * 16} on n2"


def test_ranks_that_share_a_gpu_or_have_none() -> None:
    assert doctor_ranks.devices([("n1", None), ("n1", None)]) == []
    assert doctor_ranks.devices([("n1", "GPU-a"), ("n1", "GPU-b"), ("n2", "GPU-a")]) == []
    (found,) = doctor_ranks.devices([("n1", "GPU-a"), ("n2", "GPU-c"), ("n2", "GPU-c")])
    assert (found.level, found.found) == ("error", "several ranks share a GPU on n2, which NCCL refuses")
    (found,) = doctor_ranks.devices([("n1", "GPU-a"), ("n2", None)])
    assert (found.level, found.found) == ("error", "ranks compute on cores on n2, but on GPUs on n1")


class _Two(Ranks):
    """Rank 0 on a GPU, and another that answers as it does but for the device."""

    other: str | None = None

    def gather(self, values: Sequence[float]) -> NDArray[np.float64]:
        return np.array([values, values], np.float64)

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, (value[0], self.other) if value[-1] == "GPU-a" else value]

    def broadcast(self, value: Any) -> Any:
        return value


@pytest.mark.parametrize(
    ("other", "measured", "said"),
    [("GPU-b", ["cpu", "cuda"], []), ("GPU-a", ["cpu"], ["several ranks share"]), (None, ["cpu"], ["on cores on"])],
)
def test_nccl_is_not_tried_where_it_cannot_work(
    other: str | None, measured: list[str], said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU is needed: what each rank would measure is noted."""
    ranks = _Two(0, 2, 0, torch.device("cuda", 0))
    tried: list[str] = []

    def measure(ranks: Ranks, device: torch.device) -> list[Exchange]:
        tried.append(device.type)
        return [Exchange(device.type, 4, 0.1, 1.0 + len(tried), True)]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_Two, "other", other)
    monkeypatch.setattr(report, "_look_at_machine", lambda *_: [])
    monkeypatch.setattr(training_ranks, "joined", lambda *_: nullcontext(ranks))
    monkeypatch.setattr(doctor_ranks, "device_of", lambda _: "GPU-a")
    monkeypatch.setattr(doctor_ranks, "measure", measure)
    found = report.examine(None, [], Placement(0, 2, 0, "127.0.0.1", 0), 1.0)
    assert (tried, [one.device for one in found.exchanges]) == (measured, measured)
    errors = [one.found for _, one in found.findings if one.level == "error"]
    assert [words in text for words, text in zip(said, errors, strict=True)] == [True] * len(said)
    (exchange,) = [one.found for _, one in found.findings if one.check == "all-reduce"]
    assert ("NCCL" if len(measured) == 2 else "gloo") in exchange


def test_findings_of_several_machines_are_told_once() -> None:
    same, own = Finding("ok", "versions", "all"), Finding("warning", "open files", "64", "ulimit -n 65536")
    findings = [("n1", same), ("n2", same), ("n2", own), ("all ranks", Finding("ok", "clocks", "fine"))]
    lines = told(Report(2, findings, [Exchange("cpu", 4, 0.001, 0.0, True)])).splitlines()
    assert lines[:4] == [
        "ok      versions    all",
        "warning open files  64 [n2]",
        "                    -> ulimit -n 65536",
        "ok      clocks      fine",
    ]
    assert lines[-1] == "1 warning: a run can start, but will suffer"
