"""MLflow as a view of the run folder; the one home of mlflow.

A thread reads the journal and the nodes' rows under `system/` and sends whole rows in batches; pictures, the config and
a table of the checkpoints follow as they change. All that waits to be sent lies on disk, so memory stays bounded and
nothing is lost however long MLflow is away. The run's id is kept in `mlflow_run.json`: a restarted training goes on in
the same run, from the last step that MLflow has. Failures are counted and told once; they never reach the training.

The run is RUNNING from the start of a process to its orderly end. One whose process was killed stays so until the next
start, or until its supervisor gives it up (`tracking_end.py`): the tag `process` names whom to look for.
"""

import contextlib
import json
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mim_scale.commit import TEMPORARY, sha256_file, sync_folder, temporary_beside, write_file
from mim_scale.training.run_folder import CHECKPOINTS, CONFIG, PICTURES, SYSTEM
from mim_scale.training.tracking import Status, Tail, metrics_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

RUN_FILE = "mlflow_run.json"
RUN_KEY = "mim_scale.run_key"
POLL_S = 1.0
LONGEST_WAIT_S = 60.0
CLOSE_S = 60.0
"""How long the end of a run may wait for MLflow to take the last rows."""
SILENT_S = 3.0
"""How much of that passes without a word."""
MAX_METRICS = 1000
"""What MLflow accepts in one call."""
MAX_DIGEST = 36
"""What MLflow keeps of a dataset's digest."""
ENDING_WAIT_S = 4.0
SQLITE = b"SQLite format 3\0"
CHECKPOINT_TABLE = "checkpoints.json"
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
"""MLflow's own settings, where the user has set none: the journal is patient, so a call need not be."""
MARKS = {"step": "position", "held_out": "held_out/loss", "system": "system/{host}/cpu_percent"}
"""Kinds of rows that are sent, each with a metric of every such row that tells which steps MLflow already has."""


class MlflowTracker:
    """Follows the journal into one MLflow run."""

    def __init__(self, uri: str, experiment: str, output: Path, journal: Path) -> None:
        self._database = (output / "mlflow.db").resolve() if uri == "auto" else None
        self._uri = uri if self._database is None else f"sqlite:///{self._database}"
        self._artifacts = (output / "mlruns").resolve().as_uri() if uri == "auto" else None
        self._experiment = experiment
        self._run_file = output / RUN_FILE
        self._journal = journal
        self._output = output
        self._ending = threading.Event()
        self._wake = threading.Event()
        self._status: Status = "FAILED"
        self._thread: threading.Thread | None = None
        self._tails: dict[Path, Tail] = {}
        self._seen: dict[str, int] = {}
        self._sent: dict[Path, int] = {}
        self._files_due = 0.0
        self._newest_start: dict[str, Any] | None = None
        self._client: MlflowClient | None = None
        self._run_id = ""
        self._told: set[str] = set()
        self.failures = 0
        self.delivered = False

    def start(self, params: dict[str, Any]) -> None:
        """Begin to follow the run folder; returns at once."""
        self._params = params
        self._thread = threading.Thread(target=self._follow, name="mim-mlflow", daemon=True)
        self._thread.start()

    def close(self, status: Status) -> None:
        """Send the rest, tell the run's status, and wait for both at most CLOSE_S seconds."""
        if self._thread is None:
            return
        self._status = status
        self._ending.set()
        self._wake.set()
        self._thread.join(min(SILENT_S, CLOSE_S))
        if self._thread.is_alive():
            _say(f"waiting for MLflow at {self._uri} to take the last rows, {CLOSE_S:.0f} s at most")
            self._thread.join(CLOSE_S - min(SILENT_S, CLOSE_S))
        if not self.delivered:
            _say(
                "the last rows did not reach MLflow; the journal has them, and they go up when the run is started "
                "again while MLflow takes them"
            )

    def _follow(self) -> None:
        deadline, in_a_row = float("inf"), 0
        while True:
            ending = self._ending.is_set()
            if ending and deadline == float("inf"):
                deadline = time.monotonic() + CLOSE_S
            if self._guarded(self._deliver, "metrics"):
                self._deliver_files(ending)
                if ending and self._guarded(self._end, "the run's status"):
                    self.delivered = True
                    return
                in_a_row = 0
            else:
                in_a_row += 1
            longest = ENDING_WAIT_S if ending else LONGEST_WAIT_S
            wait = min(longest, POLL_S * 2 ** min(in_a_row, 6))
            if ending and time.monotonic() + wait > deadline:
                return
            self._wake.wait(wait)
            self._wake.clear()

    def _guarded(self, action: Callable[[], None], what: str) -> bool:
        """Whether the action went through; MLflow raises whatever its store, its transport or its server raise."""
        try:
            action()
        except Exception as error:
            self.failures += 1
            # A call may have gone through and only its answer been lost: ask again what MLflow has before sending more.
            self._client = None
            if what not in self._told:
                self._told.add(what)
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                _say(f"MLflow at {self._uri} does not take {what} ({reason}); training goes on and they are sent later")
            return False
        return True

    def _deliver(self) -> None:
        if self._client is None:
            self._connect()
        for metrics in self._batches():
            self._sender.log_batch(self._run_id, metrics=metrics)
        if self._newest_start is not None:
            self._describe(self._newest_start)
            self._newest_start = None

    def _deliver_files(self, ending: bool) -> None:
        """Send files; a place for artifacts that does not take them must not keep the rows waiting."""
        client = self._client
        if ending or time.monotonic() >= self._files_due:
            if not self._guarded(self._send_files, "files"):
                self._files_due = time.monotonic() + LONGEST_WAIT_S
            self._client = client

    def _send_files(self) -> None:
        for folder, pattern in ((None, CONFIG), (PICTURES, f"{PICTURES}/*.png")):
            for path in sorted(self._output.glob(pattern)):
                if not path.name.startswith(TEMPORARY) and (changed := _changed(path)) != self._sent.get(path):
                    self._sender.log_artifact(self._run_id, str(path), folder)
                    self._sent[path] = changed
        records = sorted((self._output / CHECKPOINTS).glob("step_*/run.json"))
        newest = max(map(_changed, records), default=0)
        table = self._output / CHECKPOINTS
        if newest > self._sent.get(table, 0):
            self._sender.log_text(self._run_id, _checkpoint_table(records), CHECKPOINT_TABLE)
            self._sent[table] = newest

    def _end(self) -> None:
        self._sender.set_terminated(self._run_id, self._status)

    @property
    def _sender(self) -> "MlflowClient":
        if self._client is None:
            raise ConnectionError("not connected")
        return self._client

    @property
    def uri(self) -> str:
        """Where MLflow is."""
        return self._uri

    def _connect(self) -> None:
        client = self.new_client()
        self._run_id = self._find_or_make_run(client)
        self._tails, self._seen = {}, {}
        self._client = client

    def new_client(self) -> "MlflowClient":
        """A client of the tracking server, or of the run's own database, which is made where it is missing."""
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        from mlflow import MlflowClient

        # Again: somebody may have imported it before. We tell what fails, in one line, without MLflow's tracebacks.
        logging.getLogger("mlflow").setLevel(logging.CRITICAL)
        if self._database is not None:
            _put_damaged_aside(self._database)
            if not self._database.exists():
                _make_database(self._database)
        return MlflowClient(tracking_uri=self._uri)

    def _find_or_make_run(self, client: "MlflowClient") -> str:
        """The run of this folder; its key is on disk before MLflow is asked, so no kill makes a second run."""
        known: dict[str, Any] = {"key": uuid.uuid4().hex, "run_id": None}
        if self._run_file.is_file():
            known = json.loads(self._run_file.read_bytes())
        if known["run_id"] is not None and not _has_run(client, known["run_id"]):
            _say(f"MLflow at {self._uri} has lost this run; it gets a new one, with all that the journal holds")
            known["run_id"] = None
        if known["run_id"] is None:
            write_file(self._run_file, json.dumps(known).encode())
            run_id = self._search(client, known["key"]) or self._make(client, known["key"])
            self._name_settings(client, run_id)
            known["run_id"] = run_id
            write_file(self._run_file, json.dumps(known).encode())
        run_id = str(known["run_id"])
        client.update_run(run_id, status="RUNNING")
        return run_id

    def known_run(self, client: "MlflowClient") -> str | None:
        """The id of the run that this folder has begun, None where there is none: a kill may have kept its id."""
        if not self._run_file.is_file():
            return None
        known = json.loads(self._run_file.read_bytes())
        return known["run_id"] or self._search(client, str(known["key"]))

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

    def _describe(self, start: dict[str, Any]) -> None:
        """What a `start` row tells of the run, as tags, and its dataset as an input; again is the same."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, RunTag

        tags = {name: start.get(name) for name in ("fingerprint", "config_digest", "world", "process")}
        tags |= {f"version.{name}": version for name, version in start.get("versions", {}).items()}
        commit, is_dirty = start.get("commit"), start.get("is_dirty")
        tags |= {"mlflow.source.git.commit": commit, "mlflow.source.git.dirty": commit and str(is_dirty).lower()}
        self._sender.log_batch(self._run_id, tags=[RunTag(key, str(v)) for key, v in tags.items() if v is not None])
        if "store" not in start:
            return  # written before rows told it
        dataset = Dataset(
            name=Path(start["store"]).name,
            digest=start["fingerprint"][:MAX_DIGEST],
            source_type="local",
            source=json.dumps({"uri": start["store"]}),
            profile=json.dumps({"num_volumes": start["num_volumes"], "fingerprint": start["fingerprint"]}),
        )
        context = [InputTag("mlflow.data.context", "pretraining")]
        self._sender.log_inputs(self._run_id, datasets=[DatasetInput(dataset, context)])

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
        """Whole rows after the last ones read, of the kinds and steps that MLflow lacks."""
        for path in (self._journal, *sorted((self._output / SYSTEM).glob("*.jsonl"))):
            for row in self._tails.setdefault(path, Tail(path)).rows():
                if row["kind"] == "start":
                    self._newest_start = row
                elif row["kind"] in MARKS:
                    mark = MARKS[row["kind"]].format(host=row.get("host"))
                    if row["step"] > self._last_step(mark):
                        self._seen[mark] = row["step"]
                        yield row

    def _last_step(self, mark: str) -> int:
        """The last step that MLflow has of a metric; -1 for none."""
        if mark not in self._seen:
            points = self._sender.get_metric_history(self._run_id, mark)
            self._seen[mark] = max((point.step for point in points), default=-1)
        return self._seen[mark]


def _changed(path: Path) -> int:
    """When a file was last written, in ns; 0 for one that was deleted meanwhile."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _checkpoint_table(records: list[Path]) -> str:
    """Where the checkpoints lie and the hashes of their records, which hold those of all files; never the weights."""
    table = []
    for record in records:
        # One that training deleted meanwhile is left out.
        with contextlib.suppress(FileNotFoundError):
            step = int(record.parent.name.rpartition("_")[2])
            table.append({"step": step, "path": str(record.parent.resolve()), "sha256": sha256_file(record)})
    return json.dumps(table, indent=1)


def _has_run(client: "MlflowClient", run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True


def _put_damaged_aside(database: Path) -> None:
    """A file that is no database would never take a row again; the journal fills a new one."""
    with contextlib.suppress(FileNotFoundError):
        with open(database, "rb") as file:
            head = file.read(len(SQLITE))
        if head and head != SQLITE:
            aside = database.with_name(f"{database.name}.damaged-{int(time.time())}")
            os.replace(database, aside)
            _say(
                f"{database} was no database any more and is {aside.name} now; a new one gets all that the journal has"
            )


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
