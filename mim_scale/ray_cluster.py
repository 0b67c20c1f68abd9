"""One Ray cluster for the life of a `with`: the user's own where RAY_ADDRESS names it, else one of ours on loopback.

A cluster that we start is authenticated by a random token in a private file, and only a cluster that we started is
ended. Every other module takes `ray` from here: Ray reads these settings once, when imported; they must be set before.
"""

import atexit
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mim_scale.errors import ClusterError

KNOCK_LIMIT_S = 10.0
"""How long the head named by RAY_ADDRESS may take to answer at all."""
JOIN_LIMIT_S = 300.0
"""How long the nodes of one job may start apart."""


def _set_environment() -> None:
    """Keep our own cluster to this machine and behind a token, unless the user's cluster or settings are to be used."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "RAY_ADDRESS" in os.environ:
        return
    # Despite its name it rules on Linux too: without it Ray binds to every interface, whatever _node_ip_address says.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    if "RAY_AUTH_MODE" in os.environ:
        return
    descriptor, token = tempfile.mkstemp(prefix="mim-ray-token-")  # mkstemp gives mode 600
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    owner = os.getpid()
    atexit.register(lambda: Path(token).unlink(missing_ok=True) if os.getpid() == owner else None)
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=token)


_set_environment()

import ray as ray  # noqa: E402, PLC0414


@contextmanager
def ray_cluster(num_cpus: int | None = None) -> Iterator[str]:
    """Join or start a cluster; yields its address, which child processes join by RAY_ADDRESS.

    Raises:
        ClusterError: the cluster named by RAY_ADDRESS cannot be joined, or none can be started.
    """
    if ray.is_initialized():
        yield str(ray.get_runtime_context().gcs_address)
        return
    address = os.environ.get("RAY_ADDRESS")
    folder = None
    try:
        if address:
            _join(address)
        else:
            # Ray puts sockets below this folder and their paths are limited to about 100 characters.
            folder = Path(tempfile.mkdtemp(prefix="mim-ray-", dir="/tmp"))
            _start(folder, num_cpus)
        yield str(ray.get_runtime_context().gcs_address)
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def wait_for_nodes(count: int, limit_s: float = JOIN_LIMIT_S) -> None:
    """Return once so many nodes have joined the cluster that this process is in.

    Raises:
        ClusterError: fewer have, after the limit.
    """
    until = time.monotonic() + limit_s
    while (found := sum(node["Alive"] for node in ray.nodes())) < count:
        if time.monotonic() > until:
            raise ClusterError(
                f"{found} of {count} nodes joined the Ray cluster within {limit_s:.0f} s: look at what `ray start` "
                "said on the others"
            )
        time.sleep(0.5)


def _join(address: str) -> None:
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ClusterError(
            f"no Ray cluster can be joined at RAY_ADDRESS={address}: {reason}; start one with `ray start --head`, "
            "and give this process the same RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH as the head"
        ) from None


def _knock(address: str) -> None:
    """Raise ConnectionError unless something that speaks gRPC answers; Ray would try for minutes and then exit."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return  # `auto` and addresses of other kinds are Ray's to resolve, which it does fast
    try:
        with socket.create_connection((host.strip("[]"), int(port)), KNOCK_LIMIT_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return
            connection.settimeout(KNOCK_LIMIT_S)
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
            answer = connection.recv(9)
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"nothing answers there ({error})") from None
    if len(answer) < 4 or answer[3] != 4:
        raise ConnectionError("what answers there is not the head of a Ray cluster (its port is 6379 by default)")


def _start(folder: Path, num_cpus: int | None) -> None:
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _node_ip_address="127.0.0.1",
            _temp_dir=str(folder),
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ClusterError(
            f"Ray did not start on this machine: {reason} A busy machine can be too slow for it: start again, or do "
            "without it (`data build --executor local`, data.transport=threads)"
        ) from None
