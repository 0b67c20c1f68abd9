"""What a user finds in MLflow after a real run: where its data, code, pictures and checkpoints are, how busy it was."""

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from mim_scale.commit import sha256_file
from mim_scale.config import PretrainConfig
from mim_scale.config_file import check_config, config_values
from mim_scale.training import tracking_system
from mim_scale.training.journal import read_journal
from mim_scale.training.loop import pretrain
from mim_scale.training.tracking_git import git_state
from mim_scale.training.tracking_mlflow import MlflowTracker
from mim_scale.training.tracking_system import system_rows
from tests.synthetic import make_dataset
from tests.training.mlflow_server import copy_database
from tests.training.standin import small_config


def tracked(store: Path, output: Path, uri: str = "auto") -> PretrainConfig:
    values = config_values(small_config(str(store), str(output), engine="plain"))
    return check_config(PretrainConfig, {**values, "tracking": {"mlflow": uri}}, "test")


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


def test_a_real_run(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    store, output = tmp_path / "store", tmp_path / "run"
    make_dataset(store)
    assert pretrain(tracked(store, output)) == 0
    start, *_ = read_journal(output / "journal.jsonl")
    client = MlflowClient(tracking_uri=f"sqlite:///{output / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'mim-scale'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    (dataset,) = [found.dataset for found in run.inputs.dataset_inputs]
    assert start["fingerprint"].startswith(dataset.digest)
    assert json.loads(dataset.source) == {"uri": str(store)}
    assert json.loads(dataset.profile)["num_volumes"] == len(list(store.glob("volumes/*"))) > 0
    assert {"version.torch", "version.deepspeed", "version.mim-scale", "process"} < run.data.tags.keys()
    assert run.data.tags.get("mlflow.source.git.commit") == git_state().get("commit")
    drawn = sorted(path.name for path in (output / "pictures").iterdir())
    sent = client.list_artifacts(run.info.run_id, "pictures")
    assert [Path(entry.path).name for entry in sent] == drawn != []
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "checkpoints.json")).read_text())
    kept = sorted((output / "checkpoints").glob("step_*"))
    assert [(row["path"], row["sha256"]) for row in table] == [
        (str(path), sha256_file(path / "run.json")) for path in kept
    ]


def test_commit_of_a_checkout_and_none_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "mine" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    ask = git_state.__wrapped__
    assert ask(package) == {}  # no checkout
    git(tmp_path / "mine", "init", "-q")
    assert ask(package) == {}  # in a checkout, but not of it
    git(tmp_path / "mine", "add", ".")
    git(tmp_path / "mine", "commit", "-qm", "first")
    clean = ask(package)
    assert len(clean["commit"]) == 40
    assert clean["is_dirty"] is False
    (package / "notes.txt").write_text("not tracked")
    assert ask(package) == clean
    (package / "__init__.py").write_text("x = 1")
    assert ask(package) == {**clean, "is_dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask(package) == {}  # no git


def wait_for_rows(path: Path, count: int) -> list[dict[str, Any]]:
    deadline = time.monotonic() + 60
    while len(rows := read_journal(path)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return rows


def test_a_node_tells_how_busy_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_system, "EVERY_S", 0.05)
    monkeypatch.setattr(tracking_system.socket, "gethostname", lambda: "node 1.cluster")
    config = tracked(tmp_path, tmp_path / "run")
    path = tmp_path / "run" / "system" / "node_1.cluster.jsonl"
    (tmp_path / "run").mkdir()
    for _ in range(2):
        with system_rows(config, is_written_here=True):
            wait_for_rows(path, len(read_journal(path)) + 2)
    rows = read_journal(path)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))  # a restart goes on counting
    usage = shutil.disk_usage(tmp_path)
    told = rows[-1]["system"]
    assert 0 <= told["node_1.cluster/cpu_percent"] <= 100
    assert 0 < told["node_1.cluster/memory_percent"] <= 100
    assert 0 < told["node_1.cluster/disk_free_mb"] * 1e6 <= usage.total
    assert all(value >= 0 for value in told.values())


def test_only_one_process_of_a_node_and_only_for_a_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_system, "EVERY_S", 0.01)
    with (
        system_rows(tracked(tmp_path, tmp_path / "run"), is_written_here=False),
        system_rows(small_config(str(tmp_path), str(tmp_path / "run")), is_written_here=True),
    ):
        time.sleep(0.3)
    assert not (tmp_path / "run").exists()


def test_rows_that_cannot_be_written_are_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking_system, "EVERY_S", 0.01)
    (tmp_path / "system").write_text("in the way")
    with system_rows(tracked(tmp_path, tmp_path), is_written_here=True):
        time.sleep(0.3)
    assert capfd.readouterr().err.count("no more system metrics") == 1


def test_two_nodes_in_one_run(tmp_path: Path) -> None:
    """Each step of each node once, across a restart of the tracker."""
    from mlflow import MlflowClient

    copy_database(tmp_path / "mlflow.db")
    for count in (3, 5):
        for host in ("a", "b"):
            (tmp_path / "system").mkdir(exist_ok=True)
            rows = [
                {"kind": "system", "step": n, "time": 1e9 + n, "host": host, "system": {f"{host}/cpu_percent": n}}
                for n in range(1, count + 1)
            ]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / "system" / f"{host}.jsonl").write_text(lines + '{"kind": "sys')
        tracker = MlflowTracker("auto", "mim-scale", tmp_path, tmp_path / "journal.jsonl")
        tracker.start({})
        tracker.close("FINISHED")
        assert tracker.delivered
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs(["1"])
    for host in ("a", "b"):
        points = client.get_metric_history(run.info.run_id, f"system/{host}/cpu_percent")
        assert sorted(point.step for point in points) == [1, 2, 3, 4, 5]
