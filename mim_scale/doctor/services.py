"""What `mim-scale doctor` asks of the servers that a run speaks to: MLflow, and a Ray cluster of the user's own."""

import base64
import http.client
import json
import os
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mim_scale.doctor.disk import existing, scratch
from mim_scale.doctor.finding import Finding, Level, short
from mim_scale.doctor.machine import installed

ANSWER_S = 5.0
JOIN_S = 60.0
"""How long a process may take to join a Ray cluster, the import of Ray included."""
TAG = "mim_scale.doctor"
GOES_ON = "training goes on without it, and its rows follow once it answers"
_JOIN = "from mim_scale.doctor.services import join_ray; join_ray()"


def mlflow(uri: str | None, experiment: str, output: Path) -> Iterator[Finding]:
    """Whether the tracking URI of a config answers and can be written to.

    Args:
        uri: `tracking.mlflow`.
        experiment: `tracking.experiment`.
        output: The run folder, where `auto` keeps its database.
    """
    if uri is None:
        yield Finding("ok", "mlflow", "not used; the journal is kept in any case")
    elif uri == "auto":
        yield from _sqlite(output / "mlflow.db")
    elif uri.startswith("sqlite:///"):
        yield from _sqlite(Path(uri.removeprefix("sqlite:///")))
    elif not _can_be_read(uri):
        remedy = "write tracking.mlflow as http://host:port; training would go on without it"
        yield Finding("warning", "mlflow", f"{uri.rpartition('@')[2]} is no address", remedy)
    elif uri.startswith(("http://", "https://")):
        yield from _server(uri.rstrip("/"), experiment)
    else:
        yield Finding("note", "mlflow", f"{_told(uri)}: not looked at; only http(s), sqlite and `auto` are")


def _can_be_read(uri: str) -> bool:
    try:
        _ = urllib.parse.urlsplit(uri).port
    except ValueError:
        return False
    return True


def _sqlite(path: Path) -> Iterator[Finding]:
    """One that is there is locked and let go; in place of one that is not, another is made beside and deleted."""
    try:
        if path.is_dir():
            remedy = f"name a file in it: {path / 'mlflow.db'}"
            yield Finding("warning", "mlflow", f"{path} is a folder, not a database", remedy)
            return
        if path.is_file():
            with_lock = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=2)
            with_lock.execute("BEGIN IMMEDIATE")
            with_lock.rollback()
            with_lock.close()
            told = f"{path} can be written to"
        else:
            with scratch(existing(path.parent)) as folder, sqlite3.connect(folder / "trial.db") as trial:
                trial.execute("CREATE TABLE trial (number INTEGER)")
                trial.commit()
            told = f"{path} will be made; SQLite works on that disk"
        yield Finding("ok", "mlflow", f"{told}, by mlflow {installed('mlflow')}")
    except (sqlite3.Error, OSError) as error:
        remedy = "look who holds it (a run, `mlflow ui`), or give another tracking.mlflow; " + GOES_ON
        yield Finding("warning", "mlflow", f"{path}: {short(error)}", remedy)


def _server(uri: str, experiment: str) -> Iterator[Finding]:
    where = _told(uri)
    try:
        version = _call(uri, "/version", text=True)
    except OSError as error:
        remedy = f"start it, or mend tracking.mlflow or the network; {GOES_ON}"
        yield Finding("warning", "mlflow", f"{where} does not answer: {_reason(error)}", remedy)
        return
    told, ours = f"{where} answers, mlflow {short(version)}", installed("mlflow") or "none"
    if not version[:1].isdigit():
        remedy = f"look at tracking.mlflow; {GOES_ON}"
        yield Finding("warning", "mlflow", f"{where} answers, but as no MLflow server does", remedy)
        return
    if version.partition(".")[0] != ours.partition(".")[0]:
        yield Finding("warning", "mlflow", f"{told}, but here it is {ours}", "install the same first number on both")
    try:
        _write(uri, experiment)
    except OSError as error:
        remedy = f"set MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN, of one who may; {GOES_ON}"
        yield Finding("warning", "mlflow", f"{told}, but takes nothing: {_reason(error)}", remedy)
    else:
        yield Finding("ok", "mlflow", f"{told}, and takes what is written")


def _write(uri: str, experiment: str) -> None:
    """Set a tag on the experiment, or where there is none yet on the default one, and take it away again."""
    name = urllib.parse.quote(experiment)
    try:
        found = _call(uri, f"/api/2.0/mlflow/experiments/get-by-name?experiment_name={name}")
        number = str(found["experiment"]["experiment_id"])
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
        number = "0"
    tag = {"experiment_id": number, "key": TAG}
    _call(uri, "/api/2.0/mlflow/experiments/set-experiment-tag", {**tag, "value": "written"})
    try:
        _call(uri, "/api/2.0/mlflow/experiments/delete-experiment-tag", tag)
    except urllib.error.HTTPError as error:
        # Servers before 3.0 cannot; the next trial writes the same tag.
        if error.code != 404:
            raise


def _call(uri: str, path: str, values: dict[str, Any] | None = None, text: bool = False) -> Any:
    """GET, or POST of values; raises OSError where the answer is none, or not 2xx, or not JSON where that is meant."""
    parts = urllib.parse.urlsplit(uri)
    bare = urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    headers = {"Content-Type": "application/json", **_authorization(os.environ, parts)}
    data = None if values is None else json.dumps(values).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(bare + path, data, headers), timeout=ANSWER_S) as answer:
            body = answer.read(1 << 20).decode(errors="replace").strip()
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"{type(error).__name__}: {short(error)}") from None  # no HTTP, or no address
    try:
        return body if text else json.loads(body or "{}")
    except ValueError:
        raise OSError("the answer is no JSON") from None


def _authorization(environment: Mapping[str, str], parts: urllib.parse.SplitResult) -> dict[str, str]:
    user = environment.get("MLFLOW_TRACKING_USERNAME") or urllib.parse.unquote(parts.username or "")
    password = environment.get("MLFLOW_TRACKING_PASSWORD") or urllib.parse.unquote(parts.password or "")
    if user:
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
    token = environment.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _reason(error: OSError) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"{error.code} {short(error.read(200).decode(errors='replace')) or error.reason}"
    return short(str(error.reason) if isinstance(error, urllib.error.URLError) else error)


def _told(uri: str) -> str:
    """A URI without name and password."""
    parts = urllib.parse.urlsplit(uri)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def ray_settings(environment: Mapping[str, str], is_used: bool) -> Iterator[Finding]:
    """The token that RAY_AUTH_MODE asks for, and the cluster that RAY_ADDRESS names; nothing of ours is started.

    Args:
        environment: Of this process.
        is_used: Whether the config reads through Ray.
    """
    address = environment.get("RAY_ADDRESS")
    if not is_used and not address:
        yield Finding("ok", "ray", "not used by this config")
        return
    if environment.get("RAY_AUTH_MODE") == "token":
        yield from _token(environment, "error" if is_used else "warning")
    if not address:
        yield Finding("ok", "ray", f"a cluster of our own will be started on loopback, ray {installed('ray')}")
    elif not is_used:
        yield Finding("note", "ray", f"RAY_ADDRESS={address} is not used by this config (data.transport)")
    else:
        yield _joined(address)


def _token(environment: Mapping[str, str], level: Level) -> Iterator[Finding]:
    if environment.get("RAY_AUTH_TOKEN"):
        return
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    remedy = "copy the head's token file here, and name it in RAY_AUTH_TOKEN_PATH"
    try:
        is_empty, mode = not path.read_bytes().strip(), path.stat().st_mode & 0o777
    except OSError as error:
        yield Finding(level, "ray token", f"{path}: {error.strerror}", remedy)
        return
    if is_empty:
        yield Finding(level, "ray token", f"{path} is empty", remedy)
    elif mode & 0o077:
        yield Finding("warning", "ray token", f"{path} may be read by others ({mode:o})", f"chmod 600 {path}")
    else:
        yield Finding("ok", "ray token", str(path))


def _joined(address: str) -> Finding:
    """Join in a process of its own: Ray may end, or wait longer than we would, the process that it refuses."""
    remedy = "give this process the RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH of the head; start one by `ray start --head`"
    try:
        job = subprocess.run([sys.executable, "-c", _JOIN], capture_output=True, text=True, timeout=JOIN_S, check=False)
    except subprocess.TimeoutExpired:
        return Finding("error", "ray", f"RAY_ADDRESS={address} did not let us in within {JOIN_S:.0f} s", remedy)
    lines = [line for line in job.stdout.splitlines() if line.startswith("RAY ")]
    found = (
        json.loads(lines[-1].removeprefix("RAY ")) if lines else {"error": f"the process ended with {job.returncode}"}
    )
    if "error" in found:
        return Finding("error", "ray", found["error"], remedy)
    told = f"joined {address}: {found['nodes']} node(s), {found['cores']:g} cores, ray {installed('ray')}"
    return Finding("ok", "ray", told)


def join_ray() -> None:
    """In a process of its own: join the cluster of RAY_ADDRESS, print what it has, or why not."""
    from mim_scale.errors import ClusterError
    from mim_scale.ray_cluster import ray, ray_cluster

    try:
        with ray_cluster():
            found: dict[str, Any] = {
                "nodes": sum(node["Alive"] for node in ray.nodes()),
                "cores": ray.cluster_resources().get("CPU", 0),
            }
    except ClusterError as error:
        found = {"error": str(error).partition("; start one with")[0]}
    print("RAY", json.dumps(found), flush=True)
    os._exit(0)
