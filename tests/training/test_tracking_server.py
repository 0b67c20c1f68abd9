"""Against a real MLflow server: killed, away, slow and broken, it costs training nothing and misses nothing."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mim_scale import cli
from mim_scale.commit import sha256_file
from mim_scale.config_file import dump_config
from mim_scale.errors import ConfigError
from mim_scale.training import tracking_mlflow
from mim_scale.training.journal import Journal
from mim_scale.training.tracking_mlflow import MlflowTracker
from tests.models.small import changed, small_config
from tests.training.mlflow_server import Server, copy_database, proxy
from tests.transfer.test_export import make_run

PATIENCE_S = 120
DIRECT_CALL_S = 0.005
"""What a journal row may take with a healthy disk and no tracker at all, on a busy machine."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    made = Server(folder)
    copy_database(folder / "server.db")
    made.start()
    yield made
    made.kill()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setattr(tracking_mlflow, "POLL_S", 0.05)
    monkeypatch.setattr(tracking_mlflow, "LONGEST_WAIT_S", 0.5)


class Run:
    """A run folder whose training thread does what a real one does of tracking, with a clock."""

    def __init__(self, folder: Path, uri: str) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.journal = Journal(folder / "journal.jsonl")
        self.journal.write("start", 0, time=time.time(), fingerprint="f" * 64, store="/data/s", num_volumes=3)
        (folder / "config.yaml").write_text("seed: 3")
        self.slowest = self.spent = 0.0
        self.tracker = MlflowTracker(uri, folder.name, folder, self.journal.path)
        self._timed(lambda: self.tracker.start({"seed": 3}))

    def steps(self, first: int, last: int, pause_s: float = 0.0) -> None:
        for step in range(first, last + 1):
            row = {"loss": 1 / step, "position": 4 * step, "time": time.time()}
            self._timed(lambda step=step, row=row: self.journal.write("step", step, **row))
            time.sleep(pause_s)

    def close(self, status: str = "FINISHED") -> bool:
        self.tracker.close(status)
        self.journal.close()
        return self.tracker.delivered

    def _timed(self, action: Any) -> None:
        began = time.perf_counter()
        action()
        took = time.perf_counter() - began
        self.slowest, self.spent = max(self.slowest, took), self.spent + took


def runs(server: Server, folder: Path) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name(folder.name)
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def steps_of(server: Server, folder: Path) -> list[int]:
    """Every logged point of all the runs of a folder; told twice is listed twice."""
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    found = [client.get_metric_history(run.info.run_id, "loss") for run in runs(server, folder)]
    return sorted(point.step for points in found for point in points)


def wait_for_steps(server: Server, folder: Path, count: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while len(steps_of(server, folder)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_server_killed_in_mid_run(server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "killed"
    run = Run(folder, server.uri)
    run.steps(1, 40)
    wait_for_steps(server, folder, 40)
    server.kill()
    run.steps(41, 80, pause_s=0.02)
    assert run.tracker.failures > 0
    server.start()
    run.steps(81, 120)
    assert run.close()
    assert [found.info.status for found in runs(server, folder)] == ["FINISHED"]
    assert steps_of(server, folder) == list(range(1, 121))
    assert capfd.readouterr().err.count("does not take metrics") == 1


def test_server_away_for_a_whole_run(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a port where nobody listens; the next start finds the server and brings everything over, pictures too."""
    from mlflow import MlflowClient

    monkeypatch.setattr(tracking_mlflow, "CLOSE_S", 0.5)
    folder = tmp_path / "away"
    run = Run(folder, "http://127.0.0.1:9")
    run.steps(1, 30)
    (folder / "pictures").mkdir()
    (folder / "pictures" / "loss.png").write_bytes(b"png")
    assert not run.close()
    assert run.tracker.failures > 0
    run.tracker._thread.join(30)
    assert not run.tracker._thread.is_alive()
    monkeypatch.setattr(tracking_mlflow, "CLOSE_S", float(PATIENCE_S))
    assert Run(folder, server.uri).close()
    (found,) = runs(server, folder)
    assert found.info.status == "FINISHED"
    assert steps_of(server, folder) == list(range(1, 31))
    assert [d.dataset.digest for d in found.inputs.dataset_inputs] == ["f" * 36]
    listed = [entry.path for entry in MlflowClient(server.uri).list_artifacts(found.info.run_id, "pictures")]
    assert listed == ["pictures/loss.png"]


@pytest.mark.parametrize("trouble", ["slow", "broken"])
def test_trouble_costs_the_training_thread_nothing(
    server: Server, tmp_path: Path, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / trouble
    with proxy(server.port) as between:
        between.delay_s, between.is_broken = (1.0, False) if trouble == "slow" else (0.0, True)
        run = Run(folder, between.uri)
        run.steps(1, 200, pause_s=0.01)
        assert between.calls > 0  # the tracker was busy with it meanwhile
        assert len(steps_of(server, folder)) < 200
        print(f"{trouble}: slowest call {run.slowest * 1e3:.2f} ms, 201 calls {run.spent * 1e3:.1f} ms")
        assert run.spent < 201 * DIRECT_CALL_S * 100
        monkeypatch.setattr(tracking_mlflow, "CLOSE_S", float(PATIENCE_S))
        between.delay_s, between.is_broken = 0.0, False
        assert run.close()
    assert len(runs(server, folder)) == 1
    assert steps_of(server, folder) == list(range(1, 201))


def test_an_export_becomes_a_version_of_a_model(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    folder, export, client = make_run(tmp_path / "exporting"), tmp_path / "encoder", MlflowClient(server.uri)
    command = ["export", str(folder), str(export), "--register", "ct-encoder", "--alias", "candidate"]

    def track_by(uri: str | None) -> None:
        (folder / "config.yaml").write_text(dump_config(changed(small_config(), tracking={"mlflow": uri})))

    track_by(None)
    with pytest.raises(ConfigError, match=r"tracking.mlflow is null"):
        cli.run(command)
    track_by(server.uri)
    with pytest.raises(ConfigError, match=r"mlflow_run.json names no run of MLflow; start the run again"):
        cli.run(command)
    run = Run(folder, server.uri)
    run.steps(1, 3)
    assert run.close()
    track_by(server.uri)
    (folder / "mlflow_run.json").rename(folder / "kept")
    (folder / "mlflow_run.json").write_text("[5")
    with pytest.raises(ConfigError, match=r"mlflow_run.json names no run of MLflow"):
        cli.run(command)
    (folder / "kept").rename(folder / "mlflow_run.json")
    for version, change in (("1", 0.0), ("1", 0.0), ("2", 1.0)):
        if change:
            make_run(folder, steps=(6,))
        assert cli.run(command) == 0
        assert f"models:/ct-encoder/{version}, alias candidate" in capsys.readouterr().out
        found = client.get_model_version_by_alias("ct-encoder", "candidate")
        assert found.version == version
    (of_run,) = runs(server, folder)
    assert (found.run_id, of_run.info.status) == (of_run.info.run_id, "FINISHED")
    assert found.tags["sha256"] == sha256_file(export / "model.safetensors")
    assert (found.tags["step"], found.tags["fingerprint"]) == ("6", "ab" * 32)
    fetched = client.download_artifacts(of_run.info.run_id, "exports/encoder-step-6", str(tmp_path))
    assert sha256_file(Path(fetched) / "model.safetensors") == found.tags["sha256"]
    track_by("http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"127.0.0.1:9 does not register .*encoder .*the export stands") as caught:
        cli.run(command)
    assert "\n" not in str(caught.value)
    for name in ("a/b", "", "latest"):
        with pytest.raises(ConfigError, match=f"'{name}' is no name for a model"):
            cli.run([*command[:4], name])


@pytest.mark.soak
def test_server_killed_again_and_again(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    run = Run(folder, server.uri)
    for part in range(8):
        run.steps(500 * part + 1, 500 * part + 500, pause_s=0.002)
        server.kill()
        server.start()
    assert run.close()
    assert len(runs(server, folder)) == 1
    assert steps_of(server, folder) == list(range(1, 4001))
