"""Real servers on 127.0.0.1 for the tests of remote shards: one that serves a folder, one that spoils its answers.

`RangeServer` serves a folder as web servers do: GET, HEAD, ranges, listings. `FaultProxy` stands in front of any HTTP
server, passes requests on as they are (method, path, query, headers, body) and spoils the answers that it is told to
spoil. Both keep a record of what they were asked.
"""

from __future__ import annotations

import http.client
import io
import os
import re
import socket
import struct
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

#: What can go wrong with an answer. Statuses ("500") are faults too.
FAULTS = (
    "refuse",  # hang up without an answer
    "reset",  # half the body, then a TCP reset
    "cut",  # half the body, then the end, though the length of the whole was announced
    "short",  # half the body, announced as if it were all
    "flip",  # one byte is another one
    "drip",  # the body in small pieces with pauses
    "stall",  # half the body, then nothing for as long as `stall_s`
    "whole",  # the range that was asked for is ignored: the whole file with status 200
)
_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "proxy-connection"}


@dataclass(frozen=True)
class Request:
    """One request as it came in, and the fault that its answer was given."""

    method: str
    path: str  # with query
    range: str | None
    fault: str


#: Connections of the servers of this process. A forked child that kept copies would keep them open when the server
#: hangs up, and the client would wait for ever.
_accepted: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _drop_accepted() -> None:
    for connection in list(_accepted):
        if connection.fileno() >= 0:
            os.close(connection.detach())


os.register_at_fork(after_in_child=_drop_accepted)


class _Server(ThreadingHTTPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.requests: list[Request] = []
        self.stopping = threading.Event()

    def process_request(self, request: Any, client_address: Any) -> None:
        _accepted.add(request)
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""

    def count(self, ending: str = "", method: str = "GET") -> int:
        """How many requests of `method` there were for paths that end like this."""
        return sum(r.method == method and urlsplit(r.path).path.endswith(ending) for r in list(self.requests))

    def start(self) -> None:
        """Serve in a thread until `stop`."""
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """End all answers in progress and the server."""
        self.stopping.set()
        self.shutdown()
        self.server_close()


class RangeServer(_Server):
    """Serves `folder`, with ranges."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        super().__init__(_RangeHandler)


class _RangeHandler(SimpleHTTPRequestHandler):
    server: RangeServer
    protocol_version = "HTTP/1.1"

    def __init__(self, request: Any, address: Any, server: RangeServer) -> None:
        super().__init__(request, address, server, directory=str(server.folder))

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        self.server.requests.append(Request("GET", self.path, self.headers.get("Range"), ""))
        if asked is None or not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()
        start, last = int(asked[1]), int(asked[2] or len(data) - 1)
        if start >= len(data):
            self.send_error(416)
            return
        body = data[start : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class FaultProxy(_Server):
    """Stands in front of the server at `target` (a URL). Faults are given with `inject`."""

    def __init__(self, target: str, *, stall_s: float = 20.0, drip_s: float = 0.02) -> None:
        parts = urlsplit(target)
        self.host, self.port = str(parts.hostname), int(parts.port or 80)
        self.stall_s, self.drip_s = stall_s, drip_s
        self._faults: list[list[Any]] = []  # [method, ending, fault, how often still]
        self._lock = threading.Lock()
        super().__init__(_ProxyHandler)

    def inject(self, ending: str, fault: str, times: int = 1, *, method: str = "GET", skip: int = 0) -> None:
        """Spoil the next `times` answers to `method` for paths that end with `ending`, after `skip` good ones."""
        assert fault in FAULTS or fault.isdigit(), fault
        with self._lock:
            if skip:
                self._faults.append([method, ending, "", skip])
            self._faults.append([method, ending, fault, times])

    def take(self, method: str, path: str) -> str:
        """The fault for this request, "" for none."""
        with self._lock:
            for row in self._faults:
                if row[3] > 0 and row[0] == method and urlsplit(path).path.endswith(row[1]):
                    row[3] -= 1
                    return str(row[2])
        return ""


class _ProxyHandler(BaseHTTPRequestHandler):
    server: FaultProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.take(self.command, self.path)
        self.server.requests.append(Request(self.command, self.path, self.headers.get("Range"), fault))
        if fault == "refuse":
            self._hang_up(reset=True)
        elif fault.isdigit():
            self._answer(int(fault), [("Content-Type", "text/plain")], b"injected")
        else:
            self._pass_on(body, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _pass_on(self, body: bytes, fault: str) -> None:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
        if fault == "whole":
            headers = {name: value for name, value in headers.items() if name.lower() != "range"}
        connection = http.client.HTTPConnection(self.server.host, self.server.port, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        kept = [(n, v) for n, v in answer.getheaders() if n.lower() not in _HOP]
        if self.command == "HEAD":
            self._head(answer.status, kept)
            return
        kept = [(n, v) for n, v in kept if n.lower() != "content-length"]
        if fault == "flip":
            data = data[: len(data) // 3] + bytes([data[len(data) // 3] ^ 0xFF]) + data[len(data) // 3 + 1 :]
        half = data[: len(data) // 2]
        if fault in ("reset", "cut", "stall"):
            self._head(answer.status, [*kept, ("Content-Length", str(len(data)))])
            self.wfile.write(half)
            self.wfile.flush()
            if fault == "stall":
                self.server.stopping.wait(self.server.stall_s)
            self._hang_up(reset=fault == "reset")
        elif fault == "drip":
            self._head(answer.status, [*kept, ("Content-Length", str(len(data)))])
            for start in range(0, len(data), max(1, len(data) // 20)):
                self.wfile.write(data[start : start + max(1, len(data) // 20)])
                self.wfile.flush()
                if self.server.stopping.wait(self.server.drip_s):
                    break
        else:
            self._answer(answer.status, kept, half if fault == "short" else data)

    def _head(self, status: int, headers: list[tuple[str, str]]) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        self._head(status, [*headers, ("Content-Length", str(len(data)))])
        if self.command != "HEAD":
            self.wfile.write(data)

    def _hang_up(self, *, reset: bool) -> None:
        self.close_connection = True
        if reset:  # closing with unsent bytes thrown away sends a reset instead of an end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.wfile = io.BytesIO()  # for what the base class writes and flushes at the end
            self.connection.close()


@contextmanager
def running(server: Any) -> Iterator[Any]:
    """A server that serves for the length of the block."""
    server.start()
    try:
        yield server
    finally:
        server.stop()
