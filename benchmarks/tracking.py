"""What following a run by MLflow costs a step: `python -m benchmarks.tracking STORE`.

Nobody follows, or its own database, a server, one that is away, a slow one, a database that another program has locked.
Two measures: the median step beside that of the run without MLflow just before it, and the processor time of the
tracker's thread over the run. Before them what a plain program would wait: one `log_batch` a step, in the step.
"""

import argparse
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric

from mim_scale.config import PretrainConfig
from mim_scale.config_file import load_config
from mim_scale.training import tracking_mlflow
from mim_scale.training.journal import read_journal
from mim_scale.training.loop import pretrain
from mim_scale.training.tracking_mlflow import MlflowTracker
from tests.training.mlflow_server import Server, copy_database, proxy

SLOW_S = 1.0
"""What every call to the slow server takes longer."""
AWAY = "http://127.0.0.1:9"
CLOSE_S = 5.0
"""How long a run waits at its end for an MLflow that does not answer; not a part of what is measured."""
METRICS = 14
"""As many as the row of a step has."""


def main() -> None:
    """Print medians of a step's seconds, what each way adds to a run without MLflow, and the thread's own time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--batch", type=int, default=8, help="samples a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    tracking_mlflow.CLOSE_S = CLOSE_S
    threads = ThreadTime()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        server = Server(root)
        copy_database(root / "server.db")
        copy_database(root / "locked.db")
        server.start()
        own = plain_call(f"sqlite:///{root}/locked.db")
        print(f"a plain log_batch: own database {own}, server {plain_call(server.uri)}")
        locked = sqlite3.connect(root / "locked.db")
        locked.execute("BEGIN EXCLUSIVE")
        try:
            with proxy(server.port) as slow:
                slow.delay_s = SLOW_S
                ways = {"none": None, "auto": "auto", "server": server.uri, "away": AWAY, "slow": slow.uri}
                ways["locked"] = f"sqlite:///{root}/locked.db"
                measured: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
                for number in range(options.runs):
                    for way, uri in ways.items():
                        config = _config(options, root / f"{way}_{number}", uri)
                        measured[way].append((_step_s(config), *threads.taken()))
        finally:
            locked.close()
            server.kill()
    _print_table(measured, options.steps)


class ThreadTime:
    """The processor time of the tracker's thread: once, to find or make the run, and for all that follows."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(("_connect", "_deliver"), 0.0)
        for name in self._seconds:
            setattr(MlflowTracker, name, self._timed(name, getattr(MlflowTracker, name)))

    def _timed(self, name: str, method: Callable[[MlflowTracker], None]) -> Callable[[MlflowTracker], None]:
        def timed(tracker: MlflowTracker) -> None:
            began = time.thread_time()
            try:
                method(tracker)
            finally:
                self._seconds[name] += time.thread_time() - began

        return timed

    def taken(self) -> tuple[float, float]:
        """Seconds since the last call: once, and all else."""
        once, whole = self._seconds["_connect"], self._seconds["_deliver"]
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return once, whole - once


def plain_call(uri: str, calls: int = 20) -> str:
    """The median of what one call takes, in ms."""
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("plain", artifact_location="file:///dev/null")
    run = client.create_run(experiment).info.run_id
    seconds = []
    for step in range(calls):
        began = time.perf_counter()
        client.log_batch(run, metrics=[Metric(f"metric_{n}", 1.0, step, step) for n in range(METRICS)])
        seconds.append(time.perf_counter() - began)
    return f"{statistics.median(seconds) * 1e3:.1f} ms"


def _config(options: argparse.Namespace, output: Path, uri: str | None) -> PretrainConfig:
    steps = options.steps
    settings = [f"data.store={options.store}", f"output={output}", f"train.steps={steps}", "optimizer.warmup_steps=5"]
    settings += [f"train.batch={options.batch}", "train.engine=plain", f"tracking.mlflow={uri or 'null'}"]
    settings += [f"held_out.every={steps}", f"checkpoint.every={steps}"]
    return load_config(PretrainConfig, options.config, settings)


def _step_s(config: PretrainConfig) -> float:
    """The median step of a run, in seconds."""
    pretrain(config)
    rows = read_journal(Path(config.output) / "journal.jsonl")
    return statistics.median(config.train.batch / row["samples_per_second"] for row in rows if row["kind"] == "step")


def _print_table(measured: dict[str, list[tuple[float, float, float]]], steps: int) -> None:
    print(f"{os.cpu_count()} cores, {len(measured['none'])} runs of {steps} steps each")
    print("| MLflow | step, s | beside none | its thread, once, s | then, ms a step | of a step |")
    print("|---|---|---|---|---|---|")
    for way, runs in measured.items():
        seconds = [step for step, _, _ in runs]
        added = [step / none - 1 for step, (none, _, _) in zip(seconds, measured["none"], strict=True)]
        own = [then / steps for _, _, then in runs]
        share = [then / step for then, step in zip(own, seconds, strict=True)]
        cells = [_told(seconds, ".3f"), _told(added, "+.1%"), _told([once for _, once, _ in runs], ".2f")]
        cells += [_told([then * 1e3 for then in own], ".1f"), _told(share, ".2%")]
        print(f"| {way} | {' | '.join(cells)} |", flush=True)


def _told(values: list[float], form: str) -> str:
    """Median and range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
