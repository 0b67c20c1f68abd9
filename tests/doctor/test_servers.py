"""`mim-scale doctor` and the servers of a run: MLflow and Ray, real ones in the soak; each fault of theirs is made."""

import os
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mim_scale.doctor import services as doctor_services
from mim_scale.doctor.finding import Finding, run_check
from tests.doctor.findings import levels
from tests.training.jobs import environment, free_port
from tests.training.mlflow_server import Server


class _Answers(BaseHTTPRequestHandler):
    version, refuses, calls = b"3.17.2", 0, 0

    def do_GET(self) -> None:
        is_write = self.command == "POST"
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        code = self.refuses if is_write and self.refuses else 404 if "get-by-name" in self.path else 200
        type(self).calls += is_write
        body = self.version if self.path == "/version" else b"{}"
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[Callable[..., str]]:
    """Starts servers that answer as told; returns the address."""
    servers = []

    def start(**told: Any) -> str:
        one = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (_Answers,), told))
        servers.append(one)
        threading.Thread(target=one.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://user:secret@127.0.0.1:{one.server_port}"

    yield start
    for one in servers:
        one.shutdown()
        one.server_close()


def mlflow_found(uri: str, folder: Path) -> Finding:
    (found,) = run_check("mlflow", lambda: doctor_services.mlflow(uri, "mim-scale", folder))
    assert "secret" not in found.found + found.remedy
    return found


def test_mlflow_servers(server: Callable[..., str], tmp_path: Path) -> None:
    """One that takes what is written, one that takes nothing, one that is another thing, and none."""
    ours = (doctor_services.installed("mlflow") or "").encode()
    good = mlflow_found(server(version=ours), tmp_path)
    assert (good.level, "takes what is written" in good.found) == ("ok", True)
    closed = mlflow_found(server(version=ours, refuses=403), tmp_path)
    assert (closed.level, "takes nothing: 403" in closed.found) == ("warning", True)
    assert "MLFLOW_TRACKING_USERNAME" in closed.remedy
    page = mlflow_found(server(version=b"<html>"), tmp_path)
    assert (page.level, "as no MLflow server does" in page.found) == ("warning", True)
    nobody = mlflow_found(f"http://user:secret@127.0.0.1:{free_port()}", tmp_path)
    assert (nobody.level, "does not answer: " in nobody.found) == ("warning", True)
    older = server(version=b"1.30.0")
    found = run_check("mlflow", lambda: doctor_services.mlflow(older, "mim-scale", tmp_path))
    assert levels(found) == ["warning", "ok"]


def test_an_mlflow_server_that_says_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor_services, "ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = mlflow_found(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path)
    assert (found.level, found.found.endswith("does not answer: timed out")) == ("warning", True)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("http://user:secret@[bad", "[bad is no address"),
        ("http://host:port", "http://host:port is no address"),
        ("file://[bad", "file://[bad is no address"),
        ("http://", "does not answer: "),
        ("http://two words", "does not answer: InvalidURL"),
        ("http://two..dots", "does not answer: UnicodeError"),
    ],
)
def test_a_uri_that_is_none(uri: str, said: str, tmp_path: Path) -> None:
    """It is the user's to mend, never a check that failed."""
    found = mlflow_found(uri, tmp_path)
    assert (found.level, said in found.found, found.remedy != "") == ("warning", True, True), found


def test_a_server_of_another_kind(tmp_path: Path) -> None:
    """It answers, but not by HTTP."""

    def answer(listening: socket.socket) -> None:
        with listening.accept()[0] as one:
            one.recv(1 << 16)
            one.sendall(b"SSH-2.0-Another\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=answer, args=(listening,), daemon=True).start()
        found = mlflow_found(f"http://127.0.0.1:{listening.getsockname()[1]}", tmp_path)
    assert (found.level, "does not answer: BadStatusLine" in found.found) == ("warning", True), found


def test_mlflow_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    assert mlflow_found("auto", tmp_path).level == "ok"
    assert list(tmp_path.iterdir()) == []
    with sqlite3.connect(path) as held:
        held.execute("CREATE TABLE a (b INTEGER)")
    assert mlflow_found(f"sqlite:///{path}", tmp_path).level == "ok"
    path.write_bytes(b"no database" * 100)
    found = mlflow_found(f"sqlite:///{path}", tmp_path)
    assert (found.level, "not a database" in found.found) == ("warning", True)
    found = mlflow_found(f"sqlite:///{tmp_path}", tmp_path)
    assert (found.level, "is a folder, not a database" in found.found) == ("warning", True)
    assert mlflow_found("databricks", tmp_path).level == "note"


def test_tokens_for_ray(tmp_path: Path) -> None:
    token = tmp_path / "token"

    def found() -> list[Finding]:
        settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        return [one for one in doctor_services.ray_settings(settings, is_used=True) if one.check == "ray token"]

    assert (levels(found()), "No such file" in found()[0].found) == (["error"], True)
    token.write_text("\n")
    assert (levels(found()), found()[0].found.endswith("is empty")) == (["error"], True)
    token.write_text("a" * 64)
    token.chmod(0o644)
    assert (levels(found()), found()[0].remedy) == (["warning"], f"chmod 600 {token}")
    token.chmod(0o600)
    assert levels(found()) == ["ok"]


@pytest.mark.soak
def test_a_real_mlflow_server(tmp_path: Path) -> None:
    """It is left as it was: no experiment, no tag."""
    from mlflow import MlflowClient

    server = Server(tmp_path)
    server.start()
    try:
        found = run_check("mlflow", lambda: doctor_services.mlflow(server.uri, "mim-scale", tmp_path))
        client = MlflowClient(server.uri)
        tags = [dict(one.tags) for one in client.search_experiments()]
        client.create_experiment("mim-scale")
        again = run_check("mlflow", lambda: doctor_services.mlflow(server.uri, "mim-scale", tmp_path))
        tags += [dict(one.tags) for one in client.search_experiments()]
    finally:
        server.kill()
    assert [(one.level, "takes what is written" in one.found) for one in found + again] == [("ok", True)] * 2
    assert not [tag for one in tags for tag in one if tag == doctor_services.TAG]


HOLD = """
import os, sys
from mim_scale.ray_cluster import ray_cluster
with ray_cluster(1) as address:
    print(address, os.environ["RAY_AUTH_TOKEN_PATH"], flush=True)
    sys.stdin.read()
"""


@pytest.mark.ray
@pytest.mark.soak
def test_a_cluster_of_ray_with_the_right_and_a_wrong_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    wrong.chmod(0o600)
    head = subprocess.Popen(
        [sys.executable, "-c", HOLD], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert head.stdout is not None
        address, token = head.stdout.readline().split()
        settings = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        found = {}
        for name, path in (("right", token), ("wrong", str(wrong))):
            monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", path)
            found[name] = list(doctor_services.ray_settings(os.environ, is_used=True))[-1]
    finally:
        head.communicate("", timeout=60)
    assert (found["right"].level, "1 node(s), 1 cores" in found["right"].found) == ("ok", True)
    assert found["wrong"].level == "error"
    assert "RAY_AUTH_TOKEN_PATH" in found["wrong"].remedy
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    nobody = list(doctor_services.ray_settings(os.environ, is_used=True))[-1]
    assert (nobody.level, "nothing answers there" in nobody.found) == ("error", True)
