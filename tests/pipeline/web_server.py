"""A web server on loopback that serves a folder, with and without ranges, and goes wrong as servers do."""

import functools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from tests.pipeline.s3_server import Fault, Request, with_suppressed


@dataclass(frozen=True)
class Asked(Request):
    """A request to a web server."""

    is_whole: bool
    """Whether all of a file is asked for, not a range of it."""


class WebServer:
    """What is below `root`, byte ranges included.

    has_ranges: whether ranges are understood; else all is sent.
    has_sizes: whether answers say how long they are.
    signature: wanted in the query, if any; then HEAD is refused, as addresses signed for reading refuse it.
    moved: paths that redirect elsewhere.
    fault: how a request goes wrong.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.has_ranges = True
        self.has_sizes = True
        self.signature = ""
        self.moved: dict[str, str] = {}
        self.fault: Callable[[Asked], Fault | None] = lambda request: None
        self.requests: list[Asked] = []
        self._door: ThreadingHTTPServer | None = None
        self._port = 0
        self.up()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self._port}"

    def up(self) -> None:
        """Serve, at the same port as before."""
        self._door = _Door(("127.0.0.1", self._port), _Handler)
        self._door.service = self
        self._port = self._door.server_address[1]
        threading.Thread(target=self._door.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """Refuse connections."""
        if self._door is not None:
            self._door.shutdown()
            self._door.server_close()
            for connection in list(self._door.connections):
                with_suppressed(functools.partial(connection.shutdown, socket.SHUT_RDWR))
            self._door = None


class _Door(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    service: WebServer

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.connections: set = set()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away in mid-answer are what is tested here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        with_suppressed(super().finish)

    def log_message(self, *arguments: object) -> None:
        """Nothing."""

    def _serve(self) -> None:
        service = self.server.service
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        request = Asked(self.command, path, parts.query, not self.headers.get("Range"))
        service.requests.append(request)
        fault = service.fault(request) or Fault()
        time.sleep(fault.wait_s)
        if fault.drop:
            self.close_connection = True
            return
        given = parse_qs(parts.query).get("Signature", [""])[0]
        if service.signature and (given != service.signature or self.command == "HEAD"):
            fault = Fault(status=403)
        if fault.status:
            self._answer(fault.status, b"no")
        elif path in service.moved:
            self._answer(302, b"", Location=service.moved[path])
        elif not (service.root / path.strip("/")).is_file():
            self._answer(404, b"not here")
        else:
            self._send((service.root / path.strip("/")).read_bytes(), fault.cut)

    def _send(self, body: bytes, cut: bool) -> None:
        service = self.server.service
        asked = self.headers.get("Range") if service.has_ranges else None
        if not asked:
            self._answer(200, body, cut)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(body)) + 1, len(body))
        if start >= len(body):
            self._answer(416, b"")
            return
        place = f"bytes {start}-{end - 1}/{len(body)}"
        self._answer(206, body[start:end], cut, **{"Content-Range": place})

    def _answer(self, status: int, body: bytes, cut: bool = False, **headers: str) -> None:
        service = self.server.service
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if service.has_sizes or status != 200:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut or not service.has_sizes

    do_GET = do_HEAD = _serve


@contextmanager
def web_server(root: Path) -> Iterator[WebServer]:
    """A server of what is below a folder."""
    server = WebServer(root)
    try:
        yield server
    finally:
        server.down()
