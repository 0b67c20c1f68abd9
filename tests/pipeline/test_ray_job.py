"""`ray job submit` of launch/build_shards.py on a running cluster gives the store that a local build gives."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_pipeline.build.run import Silent, run_build
from mim_scale.store.dataset import Dataset
from tests.pipeline.sources import Series, config, phantom, write_image, write_series

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")


@dataclass(frozen=True)
class Head:
    address: str
    environment: Mapping[str, str]


@pytest.fixture
def head() -> Iterator[Head]:
    """A token-authenticated head on loopback, ended with all that it started, and nothing else."""
    # Ray puts sockets below this folder and their paths are limited to about 100 characters.
    folder = Path(tempfile.mkdtemp(prefix="head-", dir="/tmp"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    dashboard, client = _free_ports(2)
    command = [RAY, "start", "--head", "--block", "--port=0", "--num-cpus=2", f"--temp-dir={folder}"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [
        f"--ray-client-server-port={client}",
        "--dashboard-agent-listen-port=0",
        "--object-store-memory=100000000",
    ]
    with open(folder / "head.log", "wb") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_for(dashboard, process, folder / "head.log")
        yield Head(f"http://127.0.0.1:{dashboard}", environment)
    finally:
        process.terminate()  # `ray start --block` takes its own processes with it
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(opened.getsockname()[1]) for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the Ray head did not start: {log.read_text()[-2000:]}")


def test_a_submitted_job_builds_the_same_store(tmp_path: Path, head: Head) -> None:
    source = tmp_path / "in"
    for seed in range(3):
        write_image(source / f"{seed}.nii.gz", phantom(seed))
    write_series(source / "series", Series(phantom(7)))
    (source / "broken.nii").write_bytes(b"no scan")
    command = [str(RAY), "job", "submit", "--address", head.address, "--working-dir", ".", "--", sys.executable]
    command += [
        "launch/build_shards.py",
        "--config",
        "configs/build.yaml",
        f"source={source}",
        f"store={tmp_path / 'job'}",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=dict(head.environment), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "5 = 4 stored + 1 quarantined" in done.stdout
    local = run_build(config(source, tmp_path / "local"), Silent())
    job = Dataset.open(tmp_path / "job")
    assert job.fingerprint == local.fingerprint
    assert job.rows == Dataset.open(tmp_path / "local").rows
    assert job.quarantine == local.quarantine
