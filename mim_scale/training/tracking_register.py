"""An export becomes a version of a registered model, in the MLflow of the run that it came from."""

import json
from pathlib import Path

from mim_scale.errors import ConfigError
from mim_scale.training.run_folder import JOURNAL
from mim_scale.training.tracking_mlflow import RUN_FILE, MlflowTracker


def register(run: Path, uri: str, export: Path, model: str, alias: str | None, facts: dict[str, str]) -> str:
    """Upload an export to its run in MLflow, and make it a version of a registered model.

    Args:
        run: The run folder.
        uri: As the run's `tracking.mlflow`.
        export: The folder that was exported.
        model: The registered model's name; made where there is none.
        alias: Moved to this version; None for none.
        facts: Tags of the version: step, hash and the like.

    Returns:
        Where it is: the server, and `models:/NAME/3`. Weights that are a version already stay that one.

    Raises:
        ConfigError: the run is not known to MLflow, or MLflow does not take the export.
    """
    try:
        run_id = str(json.loads((run / RUN_FILE).read_bytes())["run_id"] or "")
    except (OSError, ValueError, KeyError, TypeError):
        run_id = ""
    if not run_id:
        raise ConfigError(
            f"{run}: {RUN_FILE} names no run of MLflow; start the run again, also if it is done: it sends what it lacks"
        )
    tracker = MlflowTracker(uri, "", run, run / JOURNAL)
    try:
        client = tracker.new_client()
        where = f"exports/{export.name}-step-{facts['step']}"
        client.log_artifacts(run_id, str(export), where)
        source = f"{client.get_run(run_id).info.artifact_uri}/{where}"
        if not client.search_registered_models(f"name = '{model}'"):
            client.create_registered_model(model)
        versions = client.search_model_versions(f"name = '{model}' and run_id = '{run_id}'")
        same = [one.version for one in versions if one.tags.get("sha256") == facts["sha256"]]
        version = same[0] if same else client.create_model_version(model, source, run_id=run_id, tags=facts).version
        if alias is not None:
            client.set_registered_model_alias(model, alias, version)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(
            f"MLflow at {tracker.uri} does not register {export} ({reason}); the export stands: mend that, then start "
            "the same command again"
        ) from None
    return f"{tracker.uri}: models:/{model}/{version}"
