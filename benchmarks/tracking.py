"""What following a run by MLflow costs a step: nobody, its own database, a server, one that is away, a slow one."""

import argparse
import statistics
import tempfile
from pathlib import Path

from mim_scale.config import PretrainConfig
from mim_scale.config_file import check_config, config_values
from mim_scale.training.journal import read_journal
from mim_scale.training.loop import pretrain
from tests.synthetic import make_dataset
from tests.training.mlflow_server import Server, copy_database, proxy
from tests.training.standin import small_config

SLOW_S = 1.0
"""What every call to the slow server takes longer."""
AWAY = "http://127.0.0.1:9"


def main() -> None:
    """Print medians of a step's seconds, and what each way adds to a run without MLflow."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_dataset(root / "store")
        server = Server(root)
        copy_database(root / "server.db")
        server.start()
        try:
            with proxy(server.port) as slow:
                slow.delay_s = SLOW_S
                ways = {"none": None, "auto": "auto", "server": server.uri, "away": AWAY, "slow": slow.uri}
                seconds: dict[str, list[float]] = {way: [] for way in ways}
                for number in range(options.runs):
                    for way, uri in ways.items():
                        output = root / f"{way}_{number}"
                        seconds[way].append(_step_s(_config(root / "store", output, uri, options.steps)))
        finally:
            server.kill()
    for way, values in seconds.items():
        added = statistics.median(value / none - 1 for value, none in zip(values, seconds["none"], strict=True))
        print(
            f"| {way} | {statistics.median(values):.4f} ({min(values):.4f} to {max(values):.4f}) | {added:+.1%} |",
            flush=True,
        )


def _config(store: Path, output: Path, uri: str | None, steps: int) -> PretrainConfig:
    values = config_values(small_config(str(store), str(output), steps=steps, engine="plain"))
    values["tracking"]["mlflow"] = uri
    values["held_out"]["every"] = values["checkpoint"]["every"] = steps
    return check_config(PretrainConfig, values, "benchmark")


def _step_s(config: PretrainConfig) -> float:
    """The median step of a run, in seconds."""
    pretrain(config)
    rows = read_journal(Path(config.output) / "journal.jsonl")
    return statistics.median(config.train.batch / row["samples_per_second"] for row in rows if row["kind"] == "step")


if __name__ == "__main__":
    main()
