"""MLflow as a view of the journal; the one home of mlflow.

A thread reads the journal and sends whole rows in batches, so what waits to be sent lies on disk and memory stays
bounded however long MLflow is away. The run's id is kept in `mlflow_run.json`: a restarted training goes on in the same
run, from the last step that MLflow has. Failures are counted and told once; they never reach the training.
"""

import json
import logging
import os
import queue
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mim_scale.commit import sync_folder, temporary_beside, write_file
from mim_scale.training.tracking import Status, metrics_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

RUN_FILE = "mlflow_run.json"
RUN_KEY = "mim_scale.run_key"
POLL_S = 1.0
LONGEST_WAIT_S = 60.0
CLOSE_S = 60.0
"""How long the end of a run may wait for MLflow to take the last rows."""
MAX_METRICS = 1000
"""What MLflow accepts in one call."""
MAX_FILES = 256
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
"""MLflow's own settings, where the user has set none: the journal is patient, so a call need not be."""
KINDS = {"step": "position", "held_out": "held_out/loss"}
"""Kinds of journal rows that are sent, each with a metric that tells which steps MLflow already has."""


class MlflowTracker:
    """Follows the journal into one MLflow run."""

    def __init__(self, uri: str, experiment: str, output: Path, journal: Path) -> None:
        self._database = (output / "mlflow.db").resolve() if uri == "auto" else None
        self._uri = uri if self._database is None else f"sqlite:///{self._database}"
        self._artifacts = (output / "mlruns").resolve().as_uri() if uri == "auto" else None
        self._experiment = experiment
        self._run_file = output / RUN_FILE
        self._journal = journal
        self._files: queue.Queue[tuple[Path, str | None]] = queue.Queue(MAX_FILES)
        self._ending = threading.Event()
        self._wake = threading.Event()
        self._status: Status = "FAILED"
        self._thread: threading.Thread | None = None
        self._offset = 0
        self._seen = dict.fromkeys(KINDS, -1)
        self._client: MlflowClient | None = None
        self._run_id = ""
        self.failures = 0
        self.delivered = False

    def start(self, params: dict[str, Any], tags: dict[str, str]) -> None:
        """Begin to follow the journal; returns at once."""
        self._params, self._tags = params, tags
        self._thread = threading.Thread(target=self._follow, name="mim-mlflow", daemon=True)
        self._thread.start()

    def image(self, path: Path) -> None:
        """Send a picture after the rows before it."""
        self._put(path, "pictures")

    def artifact(self, path: Path) -> None:
        """Send a file after the rows before it."""
        self._put(path, None)

    def close(self, status: Status) -> None:
        """Send the rest, tell the run's status, and wait for both at most CLOSE_S seconds."""
        if self._thread is None:
            return
        self._status = status
        self._ending.set()
        self._wake.set()
        self._thread.join(CLOSE_S)
        if not self.delivered:
            _say(
                "the last rows did not reach MLflow; the journal has them, and they go up when the run is started again"
            )

    def _put(self, path: Path, folder: str | None) -> None:
        try:
            self._files.put_nowait((path, folder))
        except queue.Full:
            _say(f"{path.name} is not sent: {MAX_FILES} files wait already")
        self._wake.set()

    def _follow(self) -> None:
        deadline = float("inf")
        while True:
            ending = self._ending.is_set()
            if ending and deadline == float("inf"):
                deadline = time.monotonic() + CLOSE_S
            if self._guarded(self._deliver):
                if ending and self._guarded(self._end):
                    self.delivered = True
                    return
                wait = POLL_S
            else:
                wait = min(LONGEST_WAIT_S, POLL_S * 2 ** min(self.failures, 6))
            if ending and time.monotonic() + wait > deadline:
                return
            self._wake.wait(wait)
            self._wake.clear()

    def _guarded(self, action: Callable[[], None]) -> bool:
        """Whether the action went through; MLflow raises whatever its store, its transport or its server raise."""
        try:
            action()
        except Exception as error:
            self.failures += 1
            # A call may have gone through and only its answer been lost: ask again what MLflow has before sending more.
            self._client = None
            if self.failures == 1:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                _say(
                    f"MLflow at {self._uri} does not take metrics ({reason}); training goes on and they are sent later"
                )
            return False
        return True

    def _deliver(self) -> None:
        if self._client is None:
            self._connect()
        for metrics in self._batches():
            self._sender.log_batch(self._run_id, metrics=metrics)
        while not self._files.empty():
            path, folder = self._files.queue[0]
            if path.is_file():
                self._sender.log_artifact(self._run_id, str(path), folder)
            self._files.get_nowait()

    def _end(self) -> None:
        self._sender.set_terminated(self._run_id, self._status)

    @property
    def _sender(self) -> "MlflowClient":
        if self._client is None:
            raise ConnectionError("not connected")
        return self._client

    def _connect(self) -> None:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.ERROR)  # again: somebody may have imported it before
        if self._database is not None and not self._database.exists():
            _make_database(self._database)
        client = MlflowClient(tracking_uri=self._uri)
        self._run_id = self._find_or_make_run(client)
        for kind, metric in KINDS.items():
            self._seen[kind] = max((m.step for m in client.get_metric_history(self._run_id, metric)), default=-1)
        self._offset = 0
        self._client = client

    def _find_or_make_run(self, client: "MlflowClient") -> str:
        """The run of this folder; its key is on disk before MLflow is asked, so no kill makes a second run."""
        known: dict[str, Any] = {"key": uuid.uuid4().hex, "run_id": None}
        if self._run_file.is_file():
            known = json.loads(self._run_file.read_bytes())
        if known["run_id"] is None:
            write_file(self._run_file, json.dumps(known).encode())
            run_id = self._search(client, known["key"]) or self._make(client, known["key"])
            self._name_settings(client, run_id)
            known["run_id"] = run_id
            write_file(self._run_file, json.dumps(known).encode())
        run_id = str(known["run_id"])
        client.update_run(run_id, status="RUNNING")
        for name, value in self._tags.items():
            client.set_tag(run_id, name, value)
        return run_id

    def _search(self, client: "MlflowClient", key: str) -> str | None:
        found = client.search_runs([self._experiment_id(client)], f"tags.`{RUN_KEY}` = '{key}'")
        return found[0].info.run_id if found else None

    def _make(self, client: "MlflowClient", key: str) -> str:
        run = client.create_run(self._experiment_id(client), run_name=self._run_file.parent.name, tags={RUN_KEY: key})
        return str(run.info.run_id)

    def _experiment_id(self, client: "MlflowClient") -> str:
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is not None:
            return str(experiment.experiment_id)
        return str(client.create_experiment(self._experiment, artifact_location=self._artifacts))

    def _name_settings(self, client: "MlflowClient", run_id: str) -> None:
        from mlflow.entities import Param

        params = [Param(name, str(value)[:6000]) for name, value in self._params.items()]
        for start in range(0, len(params), 100):
            client.log_batch(run_id, params=params[start : start + 100])

    def _batches(self) -> Iterator[list["Metric"]]:
        """Metrics of whole rows that MLflow does not have yet, as many as one call takes."""
        from mlflow.entities import Metric

        waiting: list[Metric] = []
        for row in self._new_rows():
            when = int(row.get("time", time.time()) * 1000)
            metrics = [Metric(name, value, when, int(row["step"])) for name, value in metrics_of(row).items()]
            if len(waiting) + len(metrics) > MAX_METRICS:
                yield waiting
                waiting = []
            waiting += metrics
        if waiting:
            yield waiting

    def _new_rows(self) -> Iterator[dict[str, Any]]:
        """Whole journal rows after the last one read, of the kinds and steps that MLflow lacks."""
        if not self._journal.is_file():
            return
        with open(self._journal, "rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                row = json.loads(line)
                self._offset += len(line)
                if row["kind"] in KINDS and row["step"] > self._seen[row["kind"]]:
                    self._seen[row["kind"]] = row["step"]
                    yield row


def _make_database(path: Path) -> None:
    """Prepare MLflow's tables beside and rename: cut off in the middle, MLflow never opens them again."""
    from mlflow import MlflowClient

    temporary = temporary_beside(path)
    temporary.unlink(missing_ok=True)
    MlflowClient(tracking_uri=f"sqlite:///{temporary}").search_experiments()
    os.replace(temporary, path)
    sync_folder(path.parent)


def _say(text: str) -> None:
    print(f"tracking: {text}", file=sys.stderr, flush=True)
