"""An HTTP proxy before an S3 server that counts the requests by operation and, by a seeded plan, breaks some of them."""

from __future__ import annotations

import http.client
import random
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

DROPS = ("before the server", "before the header", "in the body")
"""Where a connection is cut: the server never sees the request, has done it without an answer, or the answer ends early."""
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass
class Faults:
    """What goes wrong. Shares are of all requests, 0 to 1."""

    errors: float = 0.0
    """Share answered with 500 InternalError or 503 SlowDown."""
    drops: float = 0.0
    """Share of cut connections, spread over `DROPS`."""
    delay: float = 0.0
    """Seconds before every answer."""
    slow: float = 0.0
    """Share of requests answered `slow_seconds` later."""
    slow_seconds: float = 5.0
    fail_next: int = 0
    """So many of the next requests are answered with 503, whatever the shares."""
    drop_next: str = ""
    """One of `DROPS`: the next request is cut there."""
    down: bool = False
    """No request is answered: every connection is cut."""


class FaultProxy:
    """Listens on a free port of 127.0.0.1 until `close`. Set `faults` at any time."""

    def __init__(self, upstream_port: int, seed: int = 0) -> None:
        self.upstream_port = upstream_port
        self.faults = Faults()
        self.counts: Counter[str] = Counter()
        """Requests by operation (GET, PUT, HEAD, LIST, DELETE, MULTIPART BEGIN/PART/COMPLETE/ABORT), broken ones too."""
        self.keys: Counter[tuple[str, str]] = Counter()
        """The same by (operation, key or listed prefix)."""
        self.broken: Counter[str] = Counter()
        """Faults injected, by kind."""
        self.connections = 0
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reset(self, faults: Faults | None = None) -> None:
        """Forget the counts and set what goes wrong from here on."""
        with self._lock:
            self.counts.clear()
            self.keys.clear()
            self.broken.clear()
            self.faults = faults or Faults()

    def total(self) -> int:
        return sum(self.counts.values())

    def plan(self, operation: str, key: str) -> tuple[str, float]:
        """What happens to this request ('' nothing, '500', '503' or one of `DROPS`) and the seconds before it."""
        with self._lock:
            self.counts[operation] += 1
            self.keys[operation, key] += 1
            faults, draw = self.faults, self._random.random()
            wait = faults.delay + (faults.slow_seconds if self._random.random() < faults.slow else 0.0)
            fate = ""
            if faults.down:
                fate = DROPS[0]
            elif faults.drop_next:
                fate, faults.drop_next = faults.drop_next, ""
            elif faults.fail_next > 0:
                faults.fail_next -= 1
                fate = "503"
            elif draw < faults.errors:
                fate = self._random.choice(("500", "503"))
            elif draw < faults.errors + faults.drops:
                fate = self._random.choice(DROPS)
            if fate:
                self.broken[fate] += 1
            return fate, wait


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        # A client that has left, killed or tired of waiting, is what the tests are about.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    owner: FaultProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.owner.connections += 1
        self._upstream = http.client.HTTPConnection("127.0.0.1", self.owner.upstream_port, timeout=120)

    def finish(self) -> None:
        self._upstream.close()
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        return

    def _pass(self) -> None:
        operation, key = operation_of(self.command, self.path)
        fate, wait = self.owner.plan(operation, key)
        if fate == DROPS[0]:
            return self._cut()
        body = self._body()
        time.sleep(wait)
        if fate in ("500", "503"):
            return self._fail(int(fate))
        self._upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("connection", "expect", "transfer-encoding", "content-length"):
                self._upstream.putheader(name, value)
        if body or self.command in ("PUT", "POST"):
            self._upstream.putheader("Content-Length", str(len(body)))
        self._upstream.endheaders(body)
        answer = self._upstream.getresponse()
        content = answer.read()
        if fate == DROPS[1]:
            return self._cut()
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP:
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if fate == DROPS[2]:
            self.wfile.write(content[: len(content) // 2])
            return self._cut()
        self.wfile.write(content)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _fail(self, status: int) -> None:
        code = "InternalError" if status == 500 else "SlowDown"
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Content-Type", "application/xml")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _cut(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        # A reset, as a lost peer gives, instead of a polite end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.connection.close()


def operation_of(command: str, path: str) -> tuple[str, str]:
    """The S3 operation of a request and its key (of a listing: its prefix)."""
    parts = urlsplit(path)
    query = parse_qs(parts.query, keep_blank_values=True)
    key = parts.path.strip("/").partition("/")[2]
    if "uploads" in query:
        return "MULTIPART BEGIN" if command == "POST" else "LIST UPLOADS", key
    if "uploadId" in query:
        return {"PUT": "MULTIPART PART", "POST": "MULTIPART COMPLETE", "DELETE": "MULTIPART ABORT"}[command], key
    if "list-type" in query or (command == "GET" and not key):
        return "LIST", query.get("prefix", [""])[0]
    if "delete" in query:
        return "DELETE", ""
    return command, key
