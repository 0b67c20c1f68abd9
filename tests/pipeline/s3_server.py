"""A real S3 API on loopback, behind a door that checks signatures and can fail in every way that networks do.

moto answers; it takes any signature, so the door checks it (AWS Signature Version 4) before a request goes through.
`python -m tests.pipeline.s3_server BUCKET` serves until its input ends, for measurements.
"""

import functools
import hashlib
import hmac
import http.client
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from moto.server import ThreadedMotoServer

PAGE = 50
"""Objects that one answer lists: a thousand, as S3 does, would make tests of several pages slow."""
KEY, SECRET, REGION = "test-key", "test-secret", "eu-central-1"


@dataclass(frozen=True)
class Fault:
    """How a request goes wrong."""

    status: int = 0
    """Answered instead of passing the request on; 0 passes it on."""
    code: str = "InternalError"
    """S3's code in the body of that answer."""
    wait_s: float = 0.0
    """Before anything is sent back."""
    cut: bool = False
    """Only half of the answer's body is sent, then the connection ends."""
    drop: bool = False
    """The connection ends without an answer; the request has not been passed on."""


@dataclass(frozen=True)
class Request:
    """What a fault can be chosen by."""

    method: str
    path: str
    """/bucket/key, decoded."""
    query: str


class S3Server:
    """The service: state is in `moto` and outlives `down` and `up` of the door."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        os.environ["MOTO_S3_DEFAULT_MAX_KEYS"] = str(PAGE)
        self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._moto.start()
        self.backend = self._moto.get_host_and_port()
        assert self.call("POST", "/moto-api/reset")[0] == 200  # what it holds is the process's, not the server's
        self.fault: Callable[[Request], Fault | None] = lambda request: None
        self.requests: list[Request] = []
        self._door: ThreadingHTTPServer | None = None
        self._port = 0
        self.up()

    @property
    def endpoint(self) -> str:
        """What AWS_ENDPOINT_URL is set to."""
        return f"http://127.0.0.1:{self._port}"

    def environment(self) -> dict[str, str]:
        """The usual variables."""
        names = {"ACCESS_KEY_ID": KEY, "SECRET_ACCESS_KEY": SECRET, "REGION": REGION, "ENDPOINT_URL": self.endpoint}
        return {f"AWS_{name}": value for name, value in names.items()}

    def up(self) -> None:
        """Open the door, at the same port as before."""
        self._door = _Door(("127.0.0.1", self._port), _Handler)
        self._door.service = self
        self._port = self._door.server_address[1]
        threading.Thread(target=self._door.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """Close the door: connections are refused, open ones end."""
        if self._door is not None:
            self._door.shutdown()
            self._door.server_close()
            for connection in list(self._door.connections):
                with_suppressed(functools.partial(connection.shutdown, socket.SHUT_RDWR))
            self._door = None

    def stop(self) -> None:
        """End it all."""
        self.down()
        self._moto.stop()

    def call(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes, dict[str, str]]:
        """A request straight to the back end, past faults and signatures."""
        link = http.client.HTTPConnection(*self.backend, timeout=30)
        # moto takes the region from this header and nothing else of it.
        scope = f"Credential={KEY}/20260101/{REGION}/s3/aws4_request"
        link.request(method, path, body, {"Authorization": f"AWS4-HMAC-SHA256 {scope}", **headers})
        answer = link.getresponse()
        data = answer.read()
        link.close()
        return answer.status, data, dict(answer.getheaders())

    def make_bucket(self, name: str) -> None:
        """A new bucket."""
        place = (
            f"<CreateBucketConfiguration><LocationConstraint>{REGION}</LocationConstraint></CreateBucketConfiguration>"
        )
        assert self.call("PUT", f"/{name}", place.encode())[0] == 200

    def put(self, path: str, body: bytes) -> None:
        """An object at /bucket/key."""
        assert self.call("PUT", quote(path), body)[0] == 200

    def get(self, path: str) -> bytes:
        """The bytes of an object at /bucket/key."""
        status, body, _ = self.call("GET", quote(path))
        assert status == 200, path
        return body


def with_suppressed(action: Callable[[], None]) -> None:
    """Do what may already have been done."""
    with suppress(OSError):
        action()


class _Door(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    service: S3Server

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.connections: set = set()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away in mid-answer are what is tested here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Without this every answer waits for the client's delayed acknowledgement.
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)
        self._link = http.client.HTTPConnection(*self.server.service.backend, timeout=60)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        self._link.close()
        with_suppressed(super().finish)

    def log_message(self, *arguments: object) -> None:
        """Nothing."""

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        request = Request(self.command, unquote(parts.path), parts.query)
        service = self.server.service
        service.requests.append(request)
        fault = service.fault(request) or Fault()
        time.sleep(fault.wait_s)
        if fault.drop:
            self.close_connection = True
            return
        status, code = (fault.status, fault.code) if fault.status else _signature(self, body)
        if status:
            self._answer(status, {}, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode(), False)
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        # moto's server is HTTP/1.0: one request a connection.
        self._link.request(self.command, self.path, body, headers)
        answer = self._link.getresponse()
        data = answer.read()
        self._link.close()
        self._answer(answer.status, dict(answer.getheaders()), data, fault.cut)

    def _answer(self, status: int, headers: dict[str, str], body: bytes, cut: bool) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in {"connection", "content-length", "transfer-encoding"}:
                self.send_header(name, value)
        length = headers.get("Content-Length") or headers.get("content-length")
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve


def _signature(request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, str]:
    """(403, why) where a request is not signed with KEY and SECRET, or its body is not the signed one."""
    scheme, _, rest = (request.headers.get("Authorization") or "").partition(" ")
    if scheme != "AWS4-HMAC-SHA256":
        return 403, "AccessDenied"
    fields = dict(part.strip().split("=", 1) for part in rest.split(","))
    key, day, region, service, last = fields["Credential"].split("/")
    if key != KEY:
        return 403, "InvalidAccessKeyId"
    signed = fields["SignedHeaders"].split(";")
    payload = request.headers["x-amz-content-sha256"]
    if payload not in {"UNSIGNED-PAYLOAD", hashlib.sha256(body).hexdigest()}:
        return 400, "XAmzContentSHA256Mismatch"
    parts = urlsplit(request.path)
    pairs = sorted(parse_qsl(parts.query, keep_blank_values=True))
    query = "&".join(f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}" for name, value in pairs)
    headers = "".join(f"{name}:{' '.join((request.headers[name] or '').split())}\n" for name in signed)
    canonical = "\n".join([request.command, parts.path, query, headers, ";".join(signed), payload])
    scope = "/".join([day, region, service, last])
    text = "\n".join([scheme, request.headers["x-amz-date"], scope, hashlib.sha256(canonical.encode()).hexdigest()])
    secret = f"AWS4{SECRET}".encode()
    for step in (day, region, service, last):
        secret = hmac.digest(secret, step.encode(), "sha256")
    expected = hmac.digest(secret, text.encode(), "sha256").hex()
    return (0, "") if hmac.compare_digest(expected, fields["Signature"]) else (403, "SignatureDoesNotMatch")


@contextmanager
def s3_server(*buckets: str) -> Iterator[S3Server]:
    """A server with these buckets."""
    server = S3Server()
    try:
        for bucket in buckets:
            server.make_bucket(bucket)
        yield server
    finally:
        server.stop()


if __name__ == "__main__":
    with s3_server(*sys.argv[1:]) as running:
        print(running.endpoint, flush=True)
        sys.stdin.read()
