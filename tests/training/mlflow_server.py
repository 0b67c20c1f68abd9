"""A fresh MLflow database, a real MLflow server on loopback, and a proxy before it that can be slow or broken."""

import contextlib
import functools
import http.client
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mim_scale.training.tracking_mlflow import _make_database
from tests.training.jobs import environment, free_port

READY_S = 120


def copy_database(path: Path) -> None:
    """Put a fresh database there; one is made in each process, for making one takes seconds."""
    shutil.copy(Path(_template().name) / "mlflow.db", path)


@functools.cache
def _template() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(prefix="mim-scale-mlflow-")
    _make_database(Path(folder.name) / "mlflow.db")
    return folder


class Server:
    """`mlflow server` with one worker over a SQLite file, at the same address however often it is started."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.database = f"sqlite:///{folder / 'server.db'}"
        self.uri = f"http://127.0.0.1:{self.port}"
        self._job: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        stores = ["--backend-store-uri", self.database, "--artifacts-destination", str(self.folder / "artifacts")]
        self._log = open(self.folder / "server.log", "ab")  # noqa: SIM115
        self._job = subprocess.Popen(
            [*command, *stores, "--workers", "1"],
            env=environment(MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"),
            cwd=self.folder,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        deadline = time.monotonic() + READY_S
        while not self._answers():
            assert self._job.poll() is None, (self.folder / "server.log").read_text()[-3000:]
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()[-3000:]
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL to the server and its workers."""
        if self._job is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._job.pid, signal.SIGKILL)
            self._job.wait()
            self._log.close()
            self._job = None

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()


class Proxy(ThreadingHTTPServer):
    """Passes calls on to a server: after `delay_s`, or answers 500 instead while `is_broken`."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Pass)
        self.to, self.delay_s, self.is_broken, self.calls = port, 0.0, False, 0
        self.uri = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Pass(BaseHTTPRequestHandler):
    server: Proxy

    def do_GET(self) -> None:
        self.server.calls += 1
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        time.sleep(self.server.delay_s)
        status, answer = 500, b"broken"
        if not self.server.is_broken:
            connection = http.client.HTTPConnection("127.0.0.1", self.server.to, timeout=60)
            kept = {name: value for name, value in self.headers.items() if name != "Host"}
            connection.request(self.command, self.path, body, kept)
            found = connection.getresponse()
            status, answer = found.status, found.read()
            connection.close()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_PUT = do_PATCH = do_GET

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing."""


@contextlib.contextmanager
def proxy(port: int) -> Iterator[Proxy]:
    """A proxy before the server at that port."""
    with Proxy(port) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        try:
            yield found
        finally:
            found.shutdown()
            thread.join()
