"""`mim-scale doctor`: faults that a user meets, made for real where a machine allows it, and what is said of them."""

import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from mim_scale.cli import run
from mim_scale.commit import TEMPORARY
from mim_scale.config_file import config_values
from mim_scale.doctor import machine as doctor_machine
from mim_scale.doctor import run as doctor_run
from mim_scale.doctor.finding import Finding, run_check
from mim_scale.doctor.report import Report
from mim_scale.errors import ConfigError
from mim_scale.store.dataset import Dataset
from mim_scale.training import host, memory
from mim_scale.training.checkpoint import CheckpointFolder
from mim_scale.training.run_folder import LOCK
from tests.doctor.findings import everything_below, levels
from tests.synthetic import make_dataset
from tests.training.checkpoints import FACTS, save_state, state
from tests.training.jobs import environment, write_config
from tests.training.standin import small_config


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "store"
    make_dataset(path)
    return path


@pytest.fixture
def config(store: Path, tmp_path: Path) -> Path:
    return write_config(small_config(str(store), str(tmp_path / "run")), tmp_path)


def examined(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, list[Finding]]]:
    """The exit code, and findings by their check."""
    code = run(["doctor", *arguments, "--json"])
    values = json.loads(capsys.readouterr().out)
    assert values["exit"] == code
    found: dict[str, list[Finding]] = {}
    for entry in values["findings"]:
        assert entry.pop("host")
        found.setdefault(entry["check"], []).append(Finding(**entry))
    return code, found


def test_with_nothing_but_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The machine alone is looked at; whatever this one lacks, no check breaks, and nothing is left."""
    monkeypatch.chdir(tmp_path)
    _, found = examined(capsys)
    assert {"versions", "devices", "cores", "memory", "/dev/shm", "open files", "processes", "disk"} <= found.keys()
    assert {"disk speed", "renames", "locks", "ray"} <= found.keys()
    assert not [one for ones in found.values() for one in ones if "the check itself failed" in one.found]
    assert not [one for ones in found.values() for one in ones if one.level in {"warning", "error"} and not one.remedy]
    assert everything_below(tmp_path) == set()
    with pytest.raises(ConfigError, match="give --config FILE"):
        run(["doctor", "train.steps=3"])


def test_a_run_that_can_start(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = everything_below(config.parent)
    _, found = examined(capsys, "--config", str(config))
    mine = ("model", "store", "disk of output", "disk speed", "room in memory", "batch", "run folder", "mlflow")
    assert {name: levels(found[name]) for name in mine} == {name: ["ok"] for name in mine}
    assert "checkpoints and the one being written take" in found["disk of output"][0].found
    assert everything_below(config.parent) == before


def test_the_table_for_people(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A config that is wrong is a finding among the others, with its remedy below it."""
    assert run(["doctor", "--config", str(config), "train.stepz=1"]) == 2
    lines = capsys.readouterr().out.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("error"))
    assert "train.stepz" in lines[place]
    assert lines[place + 1].strip() == "-> did you mean train.steps?"
    assert [line for line in lines if line.startswith("ok") and "disk speed" in line]
    assert lines[-1].endswith("a run cannot work")


def test_all_that_cannot_work_is_told_at_once(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults = {
        "store": ("error", "data.store=nowhere", "nowhere: no such store"),
        "batch": ("error", "train.deepspeed={bf16: {enabled: true}}", "train.deepspeed.bf16"),
        "writing": ("error", "output=/proc/run", "/proc: cannot be written"),
        "mlflow": ("warning", "tracking.mlflow=http://127.0.0.1:1", "does not answer"),
        "workers": ("warning", "data.workers=999", "999 workers"),
    }
    code, found = examined(capsys, "--config", str(config), *(override for _, override, _ in faults.values()))
    assert code == 2
    for check, (level, _, words) in faults.items():
        (one,) = found[check]
        assert (one.level, words in one.found, one.remedy != "") == (level, True, True), one


def test_the_worst_finding_is_the_exit_code(store: Path, tmp_path: Path) -> None:
    settings = small_config(str(store), str(tmp_path))
    short = settings.model_copy(update={"data": settings.data.model_copy(update={"held_out_subjects": 99})})
    (found,) = run_check("store", lambda: doctor_run.store(short, doctor_run.Facts()))
    assert (found.level, "nothing is left to train on" in found.found) == ("error", True)
    host_and = [("here", Finding("note", "a", "b")), ("here", Finding("warning", "a", "b"))]
    assert [Report(1, host_and[:count], []).exit_code for count in (0, 1, 2)] == [0, 0, 1]
    assert Report(1, [*host_and, ("here", found)], []).exit_code == 2


def test_an_output_that_is_a_file(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = examined(capsys, "--config", str(config), f"output={config}/run")
    assert (code, levels(found["writing"]), levels(found["disk of output"])) == (2, ["error"], ["error"])
    assert found["writing"][0].found == f"{config} is no folder"


def test_a_lock_is_looked_at_and_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that starts at that instant must get it; of one on another machine only its own word is known."""
    taken: list[Any] = []
    monkeypatch.setattr(fcntl, "flock", lambda *arguments: taken.append(arguments))
    settings = small_config(output=str(tmp_path))
    for word, found in (
        ({"pid": 1, "host": "elsewhere"}, "process 1 on elsewhere may be alive in it"),
        ({"pid": 2**22 + 1, "host": os.uname().nodename}, "no checkpoint yet"),
    ):
        (tmp_path / LOCK).write_text(json.dumps(word))
        assert found in next(iter(doctor_run.run_folder(settings, doctor_run.Facts()))).found
    assert taken == []


def test_checkpoints_that_go_while_they_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        for name in ("a", "b"):
            (folder / name).write_bytes(bytes(100))
    real = os.walk

    def walk(folder: Path) -> Iterator[Any]:
        for inside, folders, names in real(folder):
            os.remove(Path(inside) / "a")
            yield inside, folders, names

    monkeypatch.setattr(os, "walk", walk)
    facts = doctor_run.Facts(parameters=10**6)
    found = list(doctor_run.disks(small_config(output=str(tmp_path)), facts))
    assert "checkpoints and the one being written take" in found[0].found
    assert [path.name for path in tmp_path.glob("checkpoints/*/*")] == ["b", "b"]
    shutil.rmtree(folder)
    assert doctor_run._size(folder) == 0


@pytest.mark.parametrize(("parameters", "level"), [(10**6, "ok"), (10**14, "error")])
def test_memory_for_weights_and_saves(parameters: int, level: str) -> None:
    facts = doctor_run.Facts(parameters=parameters)
    found = [one for one in doctor_run.memory(small_config(), facts, 2, 2) if one.check == "room in memory"]
    assert levels(found) == [level]


def test_memory_at_a_stage_that_is_chosen_by_it() -> None:
    """`auto` shares out as much as it must: it is judged by the least that it can come to."""

    def held(stage: int | str) -> str:
        settings = small_config(engine="deepspeed", zero_stage=stage)
        found = doctor_run.memory(settings, doctor_run.Facts(parameters=10**9), 8, 1)
        return next(one.found for one in found if one.check == "room in memory")

    assert held("auto").split(";")[0] == held(3).split(";")[0] != held(1).split(";")[0]


def test_a_batch_that_ranks_do_not_divide() -> None:
    found = run_check("batch", lambda: doctor_run.batch(small_config(batch=4, micro_batch=1), 3))
    assert levels(found) == ["error"]
    assert "not a multiple of 3 ranks" in found[0].found
    assert found[0].remedy.startswith("take a batch")


def test_a_run_folder_of_another_dataset_and_one_with_a_run_in_it(
    store: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = small_config(str(store), str(tmp_path / "run"))
    facts = {**FACTS, "config": config_values(settings)}
    output = tmp_path / "run"
    folder = CheckpointFolder(output / "checkpoints", keep=2)
    save_state(folder, 2, *state(2), {**facts, "fingerprint": Dataset.open(store).fingerprint})
    with open(output / LOCK, "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _, found = examined(capsys, "--config", str(config))
    assert levels(found["run folder"]) == ["note", "ok"]
    assert "goes on from step 2" in found["run folder"][1].found
    save_state(folder, 3, *state(3), facts)
    damaged = output / "checkpoints" / "step_00000003" / "run.json"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    _, found = examined(capsys, "--config", str(config))
    assert levels(found["run folder"]) == ["warning", "ok"]
    assert "goes on from step 2" in found["run folder"][1].found
    save_state(folder, 4, *state(4), {**facts, "fingerprint": "another"})
    code, found = examined(capsys, "--config", str(config))
    assert (code, levels(found["run folder"])) == (2, ["error"])
    assert "was trained on the dataset another" in found["run folder"][0].found


def test_a_check_that_breaks_or_does_not_end_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks() -> Iterator[Finding]:
        yield Finding("ok", "cores", "so far")
        raise ValueError("no such\nfigure")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor_machine, "cores", breaks)
    code, found = examined(capsys)
    assert code >= 1
    assert levels(found["cores"]) == ["ok", "warning"]
    assert found["cores"][1].found == "the check itself failed: ValueError: no such figure"
    never = threading.Event()
    hung = run_check("disk", lambda: filter(None, iter(never.wait, True)), limit_s=0.05)
    never.set()
    assert (levels(hung), hung[0].found) == (["error"], "no answer within 0.05 s")


def test_versions_that_are_missing_or_outside_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor_machine.installed
    other = {"deepspeed": "0.21.0", "ray": None, "numpy": "2.1.0"}
    monkeypatch.setattr(doctor_machine, "installed", lambda name: other.get(name, real(name)))
    found = run_check("versions", doctor_machine.versions)
    assert levels(found) == ["error", "warning", "note", "note"]
    assert "not installed: ray" in found[0].found
    assert "deepspeed 0.21.0" in found[1].found
    assert "numpy 2.1.0 (tested: " in found[2].found


def test_a_library_that_cannot_be_imported(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where stores alone are built: each check that needs it says so, the others are made."""
    monkeypatch.setitem(sys.modules, "torch", None)
    code, found = examined(capsys, "--config", str(config))
    assert (code, levels(found["devices"])) == (2, ["error"])
    assert "torch cannot be imported" in found["devices"][0].found
    assert {"store", "disk speed", "disk of output", "mlflow"} <= found.keys()


def test_a_gpu_that_torch_was_not_built_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "driver" / "nvidia" / "gpus" / "0000:01:00.0").mkdir(parents=True)
    monkeypatch.setattr(host, "PROC", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = run_check("devices", doctor_machine.devices)
    assert levels(found) == ["warning"]
    assert "1 GPU(s)" in found[0].found
    assert "built without CUDA" in found[0].found


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_a_cgroup(tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tightest of a group and those above it counts, in either version."""
    top = tmp_path / "fs" / "cgroup"
    names = {
        1: {"memory/a/memory.limit_in_bytes": 2**30, "memory/a/b/memory.limit_in_bytes": 2**63 - 4096}
        | {"cpu/a/b/cpu.cfs_quota_us": 50000, "cpu/a/b/cpu.cfs_period_us": 100000, "cpu/cpu.cfs_quota_us": -1}
        | {"memory/a/memory.usage_in_bytes": 2**29 + 4096, "memory/a/memory.stat": "total_inactive_file 4096"}
        | {"memory/a/b/memory.usage_in_bytes": 9, "memory/a/b/memory.stat": "total_inactive_file 0"}
        | {"pids/a/pids.max": 300, "pids/a/pids.current": 200},
        2: {"a/memory.max": 2**30, "a/b/memory.max": "max", "a/b/cpu.max": "50000 100000", "a/cpu.max": "max 100000"}
        | {"a/memory.current": 2**29 + 4096, "a/memory.stat": "anon 9\ninactive_file 4096"}
        | {"a/b/memory.current": 9, "a/b/memory.stat": "inactive_file 0"}
        | {"a/pids.max": 300, "a/pids.current": 200},
    }[version]
    for name, value in names.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(f"{value}\n")
    (tmp_path / "self").mkdir()
    lines = {1: "4:memory:/a/b\n3:cpu,cpuacct:/a/b\n2:pids:/a/b\n0::/\n", 2: "0::/a/b\n"}[version]
    if version == 1:
        (top / "cpu").rename(top / "cpu,cpuacct")
    (tmp_path / "self" / "cgroup").write_text(lines)
    monkeypatch.setattr(host, "PROC", tmp_path)
    monkeypatch.setattr(host, "SYS", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**40, total=2**41))
    assert host.memory_limit() == 2**30
    # Pages that files are cached in are given back.
    assert host.free_memory() == (2**29, 2**30)
    assert memory.free_bytes(torch.device("cpu")) == 2**29
    assert host.usable_cores() == 1
    assert ["the cgroup allows 1.0 GiB" in one.found for one in doctor_machine.memory()] == [True]
    processes = [one for one in doctor_machine.limits() if one.check == "processes"]
    assert levels(processes) == ["warning"]
    assert "100 more" in processes[0].found


def test_few_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        found = [one for one in doctor_machine.limits() if one.check == "open files"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert levels(found) == ["warning"]
    assert "512 may be open" in found[0].found
    assert "ulimit -n" in found[0].remedy


def test_ended_in_the_middle_nothing_is_left(tmp_path: Path) -> None:
    """SIGTERM while a check, in its thread, has its files open."""
    hold = "import time\ndef hold(*_):\n    print('open', flush=True); time.sleep(60); yield"
    patched = "from mim_scale.doctor import disk as doctor_disk, machine as doctor_machine\ndoctor_disk._speed = hold"
    patched += "\ndoctor_machine.devices = lambda *_: []"
    code = f"{hold}\n{patched}\nfrom mim_scale.cli import main\nmain()"
    command = [sys.executable, "-c", code, "doctor"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "open\n"
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(TEMPORARY)]
        job.terminate()
        assert job.wait() == 128 + 15
    assert everything_below(tmp_path) == set()
