"""Our own Ray cluster: on loopback, behind a token, gone afterwards; a wrong address is one line and soon."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

OWN = """
import os
from mim_scale.ray_cluster import ray, ray_cluster
with ray_cluster(1) as address:
    assert os.environ["RAY_AUTH_MODE"] == "token"
    token = os.environ["RAY_AUTH_TOKEN_PATH"]
    assert os.stat(token).st_mode & 0o777 == 0o600
    print(address)
    print(ray.get(ray.remote(lambda: os.getppid()).remote()))
    print(token)
    with ray_cluster(1) as again:
        assert again == address
    assert ray.is_initialized()
assert not ray.is_initialized()
"""

JOIN = """
import time
from mim_scale.errors import ClusterError
from mim_scale.ray_cluster import ray_cluster
started = time.monotonic()
try:
    with ray_cluster() as address:
        print("joined", address)
except ClusterError as error:
    print(error)
print(time.monotonic() - started)
"""


def run(code: str, **environment: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, env=clean | environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def is_gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.ray
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_our_own_cluster_is_on_loopback_and_gone_after():
    address, raylet, token = run(OWN)
    host, port = address.rsplit(":", 1)
    assert host == "127.0.0.1"
    for _ in range(100):
        if is_gone(int(raylet)):
            break
        time.sleep(0.1)
    assert is_gone(int(raylet))
    assert not Path(token).exists()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((host, int(port)), 2).close()


@pytest.mark.ray
def test_a_child_joins_by_address(cluster):
    settings = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    lines = run(JOIN, **settings | {"RAY_ADDRESS": cluster})
    assert lines[0] == f"joined {cluster}"


@pytest.mark.ray
def test_nobody_listens_at_the_address():
    line, seconds = run(JOIN, RAY_ADDRESS="127.0.0.1:1")
    assert line.startswith("no Ray cluster can be joined at RAY_ADDRESS=127.0.0.1:1: nothing answers there")
    assert float(seconds) < 15


@pytest.mark.ray
def test_something_else_listens_at_the_address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        line, seconds = run(JOIN, RAY_ADDRESS=f"127.0.0.1:{port}")
    assert "nothing answers there" in line
    assert float(seconds) < 30


@pytest.mark.ray
def test_no_token_no_entry(cluster):
    line, seconds = run(JOIN, RAY_ADDRESS=cluster, RAY_AUTH_MODE="disabled", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
    assert "give this process the same RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH" in line
    assert float(seconds) < 90
