"""The HTTP server on the admin port: metrics, health and pages of JSON, on threads of its own.

    admin thread ── accepts ──> one thread per connection, at most 16 ── reads ──> counters and copies
    event loop   ── serves calls, and never waits for any of these threads

Threads and not the event loop, because a scrape renders thousands of lines: some milliseconds in which no
call would be answered. The price is that the threads share the interpreter's lock (GIL) with the loop, so
the number of connections is bounded.

What a client can do:

- A slow client holds one of 16 connections. Each read or write of it may take 5 s, then the connection is
  closed. A client that sends a byte every 4 s keeps its place, and 16 such clients keep scrapes out. They do
  not disturb calls. The admin port is for operators and not for the internet.
- Connection 17 gets 503 with Retry-After, without a thread.
- A client that does not finish its TLS handshake holds its own thread, not the thread that accepts.
- A request may be kept alive for more requests. `stop` waits for none of them: the threads are daemonic.
- No request changes anything: there are only GET and HEAD. Nothing of a request is logged or sent back, since
  its path may contain a token.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET6, SO_REUSEADDR, SOL_SOCKET, socket
from ssl import SSLContext
from typing import Any, Final
from urllib.parse import parse_qs

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from mnemosyned import __version__

log = logging.getLogger(__name__)

# Prometheus, the probes of an orchestrator and some operators need a handful.
_MAX_CONNECTIONS: Final = 16
# For each read or write of a connection.
_TIMEOUT_S: Final = 5.0
# `serve_forever` of the library looks this often for the request to stop, so `stop` takes this long.
_STOP_POLL_S: Final = 0.1
_BUSY: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """Whether calls should be sent to this node, and why."""

    is_ready: bool
    probes: Mapping[str, object]  # result by probe, as JSON


# From a query (values by name) to what is shown as JSON.
Page = Callable[[Mapping[str, list[str]]], object]


class AdminServer:
    """Serves `/metrics`, `/healthz`, `/healthr` and further pages of JSON until stopped.

    `readiness` and the pages are called on the server's threads, several at once, while the event loop runs.
    They must not block, and may only read what other threads may read: single values, or copies.
    """

    @classmethod
    def start(
        cls,
        host: str,
        port: int,
        *,
        registry: CollectorRegistry,
        readiness: Callable[[], Readiness],
        pages: Mapping[str, Page] | None = None,
        tls: SSLContext | None = None,
    ) -> AdminServer:
        """Listen and serve; port 0 is any free one.

        Raises:
            OSError: the port is taken, or the host has no such address.
        """
        server = _Server((host, port), registry, readiness, pages or {})
        server.tls = tls
        return cls(server)

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._thread = threading.Thread(
            target=server.serve_forever, args=(_STOP_POLL_S,), name="admin", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """The port listened on."""
        return int(self._server.server_address[1])

    def serve_tls(self, context: SSLContext) -> None:
        """Use this context for connections from now on; open ones keep theirs. Safe from any thread."""
        self._server.tls = context

    def stop(self) -> None:
        """Stop listening, within 0.1 s. Threads of requests under way end with the process."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    # Neither the end of the process nor `server_close` waits for a slow client.
    daemon_threads = True
    block_on_close = False
    # Connections that the kernel holds until they are accepted; the library's 5 would drop a burst.
    request_queue_size = 64
    tls: SSLContext | None = None

    def __init__(
        self,
        address: tuple[str, int],
        registry: CollectorRegistry,
        readiness: Callable[[], Readiness],
        pages: Mapping[str, Page],
    ) -> None:
        self.pages = pages
        self.registry = registry
        self.readiness = readiness
        self._places = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        if ":" in address[0]:
            self.address_family = AF_INET6
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own looks the host's name up in the DNS, which may block the start for seconds.
        self.socket.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401  # as inherited
        # On the thread that accepts: it must not wait, so a full server refuses at once.
        if not self._places.acquire(blocking=False):
            self._refuse(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401  # as inherited
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def finish_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401  # as inherited
        if self.tls is None:
            super().finish_request(request, client_address)
            return
        # On the connection's own thread: a client that is silent in the handshake delays no other client.
        request.settimeout(_TIMEOUT_S)
        with self.tls.wrap_socket(request, server_side=True) as encrypted:
            super().finish_request(encrypted, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401, ARG002  # as inherited
        # A connection that broke or timed out. The library would print a traceback to standard error.
        log.debug("admin_request_failed", extra={"peer": str(client_address)})

    def _refuse(self, request: socket) -> None:
        # Not encrypted, though the server may speak TLS: the client sees a failed handshake and retries.
        request.settimeout(0)
        try:
            request.send(_BUSY)
        except OSError:
            log.debug("admin_busy")
        self.shutdown_request(request)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _TIMEOUT_S
    server: _Server

    def do_GET(self) -> None:  # the library's name
        path, _, query = self.path.partition("?")
        if path == "/metrics":
            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
            self._send(HTTPStatus.OK, encode(self.server.registry), content_type)
        elif path == "/healthz":
            self._send_json(HTTPStatus.OK, {"version": __version__})
        elif path == "/healthr":
            readiness = self.server.readiness()
            status = HTTPStatus.OK if readiness.is_ready else HTTPStatus.SERVICE_UNAVAILABLE
            self._send_json(status, {"version": __version__, "probes": dict(readiness.probes)})
        elif path in self.server.pages:
            self._send_json(HTTPStatus.OK, self.server.pages[path](parse_qs(query)))
        else:
            paths = ", ".join(["/metrics", "/healthz", "/healthr", *self.server.pages])
            self._send_json(HTTPStatus.NOT_FOUND, {"error": f"the paths are {paths}"})

    do_HEAD = do_GET  # noqa: N815  # the library's name

    def _refuse_method(self) -> None:
        # The body is not read, so the connection cannot be used for another request.
        self.close_connection = True
        self._send_json(HTTPStatus.METHOD_NOT_ALLOWED, {"error": "only GET and HEAD"}, Allow="GET, HEAD")

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _refuse_method  # noqa: N815  # the library's names

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        # The library's own quotes the request, and a token may be in it.
        self.close_connection = True
        self._send_json(HTTPStatus(code), {"error": HTTPStatus(code).phrase})

    def _send_json(self, status: HTTPStatus, content: object, **headers: str) -> None:
        self._send(status, json.dumps(content).encode() + b"\n", "application/json", **headers)

    def _send(self, status: HTTPStatus, body: bytes, content_type: str, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        # The library's own tells the version of Python.
        return "mnemosyned"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the library's name
        # A line per scrape helps no one, and a path may contain a token (`/debug/cluster?token=`).
        pass
