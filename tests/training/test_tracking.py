"""MLflow shows what the journal holds: every step once, in one run, whatever was killed; it never stops training."""

import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mim_scale.commit import sha256_file
from mim_scale.config import TrackingConfig
from mim_scale.training import tracking_mlflow
from mim_scale.training.journal import Journal
from mim_scale.training.tracking import NoTracker, open_tracker
from mim_scale.training.tracking_mlflow import MlflowTracker
from tests.training.jobs import ROOT, environment, run
from tests.training.mlflow_server import copy_database

PARAMS = {"seed": 3, "plan.levels.0.cells": [2, 2, 2]}
FINGERPRINT = "f" * 64
START = {
    "fingerprint": FINGERPRINT,
    "config_digest": "c" * 64,
    "world": 1,
    "store": "/data/store",
    "num_volumes": 7,
    "process": "1 on here",
    "versions": {"torch": "2.8"},
}

FOLLOW_AND_DIE = """
import os, sys, time
from pathlib import Path
from mim_scale.training.journal import Journal
from mim_scale.training.tracking_mlflow import MlflowTracker
folder = Path(sys.argv[1])
journal = Journal(folder / "journal.jsonl")
tracker = MlflowTracker("auto", "mim-scale", folder, journal.path)
journal.write("start", 0, fingerprint="f" * 64)
for step in range(1, 4):
    journal.write("step", step, loss=float(step), position=step, time=time.time())
tracker.start({"seed": 3, "plan.levels.0.cells": [2, 2, 2]})
while tracker._client is None or (tracker._run_id, 3) not in [
    (tracker._run_id, point.step) for point in tracker._client.get_metric_history(tracker._run_id, "position")
]:
    time.sleep(0.05)
print("sent", flush=True)
time.sleep(60)
"""


@pytest.fixture
def output(tmp_path: Path) -> Path:
    copy_database(tmp_path / "mlflow.db")
    return tmp_path


def history(output: Path, metric: str = "loss") -> list[tuple[int, float]]:
    """(step, value) of every logged point, in all runs of this folder together."""
    client = client_of(output)
    points = [point for run in runs(output) for point in client.get_metric_history(run.info.run_id, metric)]
    return sorted((point.step, point.value) for point in points)


def client_of(output: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{output / 'mlflow.db'}")


def runs(output: Path) -> list[Any]:
    """The runs that this folder's trackers made."""
    return list(client_of(output).search_runs(["1"]))


def follow(output: Path, first: int, last: int, status: str = "FINISHED", **metrics: float) -> MlflowTracker:
    journal = Journal(output / "journal.jsonl")
    tracker = MlflowTracker("auto", "mim-scale", output, journal.path)
    journal.write("start", first - 1, **START)
    tracker.start(PARAMS)
    for step in range(first, last + 1):
        journal.write(
            "step", step, loss=float(step), position=step, parts={"level_1": 0.5}, time=time.time(), **metrics
        )
        if step % 2 == 0:
            journal.write("held_out", step, held_out={"loss": 2.0, "trivial_1": 3.0}, time=time.time())
    tracker.close(status)
    journal.close()
    return tracker


def test_one_run_across_restarts_without_gap_or_repeat(output: Path) -> None:
    assert follow(output, 1, 5, "KILLED").delivered
    assert runs(output)[0].info.status == "KILLED"
    assert follow(output, 4, 9, "FAILED").delivered  # steps 4 and 5 are computed again after a lost checkpoint
    assert runs(output)[0].info.status == "FAILED"
    assert follow(output, 10, 12).delivered
    assert len(runs(output)) == 1
    run = runs(output)[0]
    assert run.info.status == "FINISHED"
    assert history(output) == [(step, float(step)) for step in range(1, 13)]
    assert [step for step, _ in history(output, "held_out/loss")] == [2, 4, 6, 8, 10, 12]
    assert run.data.params == {name: str(value) for name, value in PARAMS.items()}
    assert run.data.metrics["parts/level_1"] == 0.5
    assert run.data.metrics["held_out/trivial_1"] == 3.0


def test_more_rows_than_one_call_takes(output: Path) -> None:
    follow(output, 1, 450, grad_norm=1.0, data_wait=0.0)
    assert history(output) == [(step, float(step)) for step in range(1, 451)]


def test_killed_while_it_follows(output: Path) -> None:
    job = subprocess.Popen(
        [sys.executable, "-c", FOLLOW_AND_DIE, str(output)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None
    assert job.stdout.readline() == "sent\n"
    job.kill()
    job.wait()
    job.stdout.close()
    assert runs(output)[0].info.status == "RUNNING"  # nobody said otherwise
    follow(output, 4, 6)
    assert len(runs(output)) == 1
    assert [step for step, _ in history(output)] == [1, 2, 3, 4, 5, 6]


def test_killed_between_making_the_run_and_writing_its_id_down(output: Path) -> None:
    follow(output, 1, 3)
    path = output / "mlflow_run.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps({**known, "run_id": None}))
    follow(output, 4, 6)
    assert len(runs(output)) == 1
    assert [step for step, _ in history(output)] == [1, 2, 3, 4, 5, 6]
    assert json.loads(path.read_text()) == known


def test_killed_while_the_database_is_made(tmp_path: Path) -> None:
    """MLflow cannot open a database whose preparation was cut off, so none may ever stand there half made."""
    job = subprocess.Popen([sys.executable, "-c", FOLLOW_AND_DIE, str(tmp_path)], cwd=ROOT, env=environment())
    while not any(path.stat().st_size > 100_000 for path in tmp_path.glob(".tmp-*mlflow.db")):
        assert job.poll() is None
        time.sleep(0.005)
    job.kill()
    job.wait()
    assert not (tmp_path / "mlflow.db").exists()
    follow(tmp_path, 4, 5)
    assert [step for step, _ in history(tmp_path)] == [1, 2, 3, 4, 5]


def test_what_lies_in_the_folder_is_beside_the_run(output: Path) -> None:
    """Pictures, config and a table of checkpoints, also where an earlier process drew them; never a tensor."""
    (output / "pictures").mkdir()
    (output / "pictures" / "level_1.png").write_bytes(b"png")
    (output / "pictures" / ".tmp-1-loss.png").write_bytes(b"half")
    (output / "config.yaml").write_text("seed: 3")
    for step in (2, 4):
        folder = output / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "weights.safetensors").write_bytes(b"tensors")
        (folder / "run.json").write_text(f'{{"step": {step}}}')
    assert follow(output, 1, 2).delivered
    client, run = client_of(output), runs(output)[0]
    found = [entry.path for entry in client.list_artifacts(run.info.run_id)]
    assert found == ["checkpoints.json", "config.yaml", "pictures"]
    assert [entry.path for entry in client.list_artifacts(run.info.run_id, "pictures")] == ["pictures/level_1.png"]
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "checkpoints.json")).read_text())
    assert [row["step"] for row in table] == [2, 4]
    record = output / "checkpoints" / "step_00000004" / "run.json"
    assert table[1] == {"step": 4, "path": str(record.parent), "sha256": sha256_file(record)}


def test_a_place_for_files_that_takes_none_costs_only_them(
    output: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    def refuse(self: Any, *arguments: Any, **options: Any) -> None:
        raise PermissionError("/mnt/artifacts")

    monkeypatch.setattr(MlflowClient, "log_artifact", refuse)
    (output / "config.yaml").write_text("seed: 3")
    assert follow(output, 1, 4).delivered
    assert [step for step, _ in history(output)] == [1, 2, 3, 4]
    assert runs(output)[0].info.status == "FINISHED"
    assert capfd.readouterr().err.count("does not take files (PermissionError: /mnt/artifacts)") == 1


def test_dataset_and_origin_come_from_the_newest_start(output: Path) -> None:
    follow(output, 1, 2)
    follow(output, 3, 4)
    run = runs(output)[0]
    (dataset,) = [found.dataset for found in run.inputs.dataset_inputs]
    assert (dataset.name, dataset.digest) == ("store", FINGERPRINT[:36])
    assert json.loads(dataset.source) == {"uri": "/data/store"}
    assert json.loads(dataset.profile) == {"num_volumes": 7, "fingerprint": FINGERPRINT}
    assert run.data.tags["version.torch"] == "2.8"
    assert run.data.tags["process"] == "1 on here"
    assert "mlflow.source.git.commit" not in run.data.tags
    journal = Journal(output / "journal.jsonl")
    journal.write("start", 4, **{**START, "process": "2 on there"}, commit="abc", is_dirty=True)
    journal.close()
    tracker = MlflowTracker("auto", "mim-scale", output, output / "journal.jsonl")
    tracker.start(PARAMS)
    tracker.close("FINISHED")
    tags = runs(output)[0].data.tags
    assert (tags["mlflow.source.git.commit"], tags["mlflow.source.git.dirty"]) == ("abc", "true")
    assert tags["process"] == "2 on there"


def test_a_store_that_fails_is_told_once_and_caught_up(
    output: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The answer to a call that went through is lost, too: rows must not be sent twice."""
    from mlflow import MlflowClient

    monkeypatch.setattr(tracking_mlflow, "POLL_S", 0.01)
    log_batch, calls = MlflowClient.log_batch, []

    def failing(self: Any, *arguments: Any, **options: Any) -> Any:
        if "metrics" not in options:
            return log_batch(self, *arguments, **options)
        calls.append(options)
        if len(calls) == 1:
            raise ConnectionError("database is locked")
        result = log_batch(self, *arguments, **options)
        if len(calls) == 2:
            raise ConnectionError("answer lost")
        return result

    monkeypatch.setattr(MlflowClient, "log_batch", failing)
    journal = Journal(output / "journal.jsonl")
    tracker = MlflowTracker("auto", "mim-scale", output, journal.path)
    tracker.start(PARAMS)
    journal.write("start", 0, **START)
    for step in range(1, 13):
        journal.write("step", step, loss=float(step), position=step, time=time.time())
        time.sleep(0.02)
    tracker.close("FINISHED")
    assert tracker.delivered
    assert tracker.failures == 2
    assert [step for step, _ in history(output)] == list(range(1, 13))
    assert capfd.readouterr().err.count("does not take metrics") == 1


@pytest.mark.parametrize("damage", ["gone", "no database"])
def test_a_lost_database_is_filled_again(output: Path, damage: str) -> None:
    journal = Journal(output / "journal.jsonl")
    journal.write("start", 0, **START)
    for step in range(1, 4):
        journal.write("step", step, loss=float(step), position=step, time=time.time())
    journal.close()
    # In processes of their own: MLflow keeps open what it has once opened.
    program = (
        "import sys; from pathlib import Path; from mim_scale.training.tracking_mlflow import MlflowTracker as T; "
    )
    program += "run = Path(sys.argv[1]); t = T('auto', 'mim-scale', run, run / 'journal.jsonl'); t.start({}); "
    program += "t.close('FINISHED'); sys.exit(not t.delivered)"
    for turn in range(2):
        done = run([sys.executable, "-c", program, str(output)])
        assert done.returncode == 0, done.stderr
        assert ("has lost this run" in done.stderr) == (turn == 1)
        with contextlib.closing(sqlite3.connect(output / "mlflow.db")) as database:
            steps = database.execute("SELECT step FROM metrics WHERE key = 'position' ORDER BY step").fetchall()
            assert steps == [(1,), (2,), (3,)]
        (output / "mlflow.db").unlink()
        if damage == "no database":
            (output / "mlflow.db").write_bytes(b"something else" * 300)
    assert len(list(output.glob("mlflow.db.damaged-*"))) == (damage == "no database")


def test_mlflow_away_for_the_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking_mlflow, "CLOSE_S", 0.5)
    monkeypatch.setattr(tracking_mlflow, "POLL_S", 0.01)
    journal = Journal(tmp_path / "journal.jsonl")
    tracker = MlflowTracker("http://127.0.0.1:9", "mim-scale", tmp_path, journal.path)
    tracker.start(PARAMS)
    began = time.monotonic()
    for step in range(1, 4):
        journal.write("step", step, loss=float(step))
    tracker.close("FINISHED")
    journal.close()
    assert time.monotonic() - began < 20
    assert not tracker.delivered
    assert "they go up when the run is started again" in capfd.readouterr().err
    # Started again where MLflow can be reached, elsewhere: the first tracker's thread may still be trying.
    again = tmp_path / "again"
    again.mkdir()
    copy_database(again / "mlflow.db")
    shutil.copy(tmp_path / "journal.jsonl", again)
    monkeypatch.undo()
    monkeypatch.setattr(tracking_mlflow, "CLOSE_S", 300.0)  # a busy machine may need longer than a run would wait
    follow(again, 4, 5)
    assert [step for step, _ in history(again)] == [1, 2, 3, 4, 5]


def test_none_is_none(tmp_path: Path) -> None:
    tracker = open_tracker(TrackingConfig(mlflow=None), tmp_path, tmp_path / "journal.jsonl")
    assert isinstance(tracker, NoTracker)
    tracker.start({})
    tracker.close("FINISHED")
    assert list(tmp_path.iterdir()) == []
