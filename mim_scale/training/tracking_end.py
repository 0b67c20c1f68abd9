"""Tell MLflow how a run ended whose process could not: `python -m mim_scale.training.tracking_end RUN FAILED`.

The supervisor calls it when rank 0 was killed and is not started again; otherwise the run would be RUNNING for ever.
"""

import sys
from pathlib import Path

from mim_scale.config import PretrainConfig
from mim_scale.config_file import load_config
from mim_scale.errors import ConfigError, exit_with
from mim_scale.training.run_folder import CONFIG, JOURNAL, LOCK
from mim_scale.training.status import holder_of
from mim_scale.training.tracking_mlflow import RUN_FILE, MlflowTracker


def main() -> int:
    """Set the status of a run that MLflow takes for running and nobody makes; silent where there is nothing to tell."""
    run, status = Path(sys.argv[1]), sys.argv[2]
    if not (run / RUN_FILE).is_file() or holder_of(run / LOCK)[1]:
        return 0
    tracking = load_config(PretrainConfig, run / CONFIG).tracking
    if tracking.mlflow is None:
        return 0
    tracker = MlflowTracker(tracking.mlflow, tracking.experiment, run, run / JOURNAL)
    try:
        client = tracker.new_client()
        run_id = tracker.known_run(client)
        if run_id is not None and client.get_run(run_id).info.status == "RUNNING":
            client.set_terminated(run_id, status)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(
            f"MLflow at {tracker.uri} still takes {run} for running ({reason}); the next start tells it"
        ) from None
    return 0


if __name__ == "__main__":
    exit_with(main)
