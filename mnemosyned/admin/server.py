"""The HTTP server on the admin port: metrics, health and pages of JSON, on a thread of its own.

    admin thread ── an event loop: accepts, reads requests, answers probes ──> counters and copies
        └── two threads more: render `/metrics` and pages
    the daemon's event loop ── serves calls, and never waits for any of these threads

A thread and not the daemon's event loop, for two reasons: a scrape renders thousands of lines, some
milliseconds in which no call would be answered, and a probe must get its answer when that loop is stalled.

What a client can do:

- An idle, slow or silent client costs a connection and no thread. There are at most MAX_CONNECTIONS; one more
  closes the connection that has waited the longest without a request of its own under way. A probe sends its
  request with its connection, so it is answered before.
- A client has 10 s for a TLS handshake, for the rest of a request, and for each part of an answer.
- A slow scrape delays no probe: rendering is on other threads, and sending waits for that client alone.
- Without a file for a new connection, a spare one is given up, and taken back later: a process that is out of
  files answers its probes.
- No request changes anything: there are only GET and HEAD. Nothing of a request is logged or sent back, since
  its path may contain a token.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from ssl import SSLContext
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qs

from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from mnemosyned import __version__
from mnemosyned.transport.acceptor import Acceptor, open_sockets

if TYPE_CHECKING:
    import socket

    from mnemosyned.admin.health import Health

log = logging.getLogger(__name__)

# Prometheus, the probes of an orchestrator and some operators need a handful.
MAX_CONNECTIONS: Final = 128
_MAX_HEAD_BYTES: Final = 32 * 1024
_TIMEOUT_S: Final = 10.0
# Scrapes come each 15 s or so, and may keep their connection.
_IDLE_S: Final = 60.0
_RENDERERS: Final = 2
_SPARE_FILES: Final = 4
_END_OF_HEAD: Final = b"\r\n\r\n"

# From a query (values by name) to what is shown as JSON.
Page = Callable[[Mapping[str, list[str]]], object]


class AdminServer:
    """Serves `/metrics`, `/healthz`, `/healthr` and further pages of JSON until stopped.

    The pages are called on threads of the server, while the daemon's event loop runs. They may only read what
    other threads may read: single values, or copies.
    """

    @classmethod
    async def start(
        cls,
        host: str,
        port: int,
        *,
        registry: Collector,
        health: Health,
        pages: Mapping[str, Page] | None = None,
        tls: SSLContext | None = None,
    ) -> AdminServer:
        """Listen on all addresses of the host and serve; port 0 is any free one.

        Raises:
            OSError: the port is taken, or the host has no such address.
        """
        return cls(await open_sockets(host, port), _Site(registry, health, pages or {}), tls)

    def __init__(self, sockets: Sequence[socket.socket], site: _Site, tls: SSLContext | None) -> None:
        self._sockets = sockets
        self._site = site
        self._tls = tls
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        # By what it waits for: True while a request is being answered. The oldest is first.
        self._is_busy: dict[_Connection, bool] = {}
        self._spare: list[int] = []
        self._thread = threading.Thread(target=self._run, name="admin", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port listened on; 0 for a Unix socket."""
        address = self._sockets[0].getsockname()
        return int(address[1]) if isinstance(address, tuple) else 0

    def serve_tls(self, context: SSLContext) -> None:
        """Use this context for connections from now on; open ones keep theirs. Safe from any thread."""
        self._tls = context

    def stop(self) -> None:
        """Stop listening, and close all connections; within a second. Not from the server's thread."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop.set_exception_handler(_log_quietly)
        self._take_spare()
        acceptor = Acceptor(self._sockets, self._accepted, Counter(), make_room=self._make_room)
        acceptor.begin()
        watch = asyncio.create_task(self._site.health.watch())
        await self._stop.wait()
        watch.cancel()
        acceptor.close()
        tasks = [connection.task for connection in self._is_busy if connection.task is not None]
        for connection in list(self._is_busy):
            connection.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        for number in self._spare:
            os.close(number)

    def _make_room(self) -> bool:
        if not self._spare:
            return False
        os.close(self._spare.pop())
        return True

    def _take_spare(self) -> None:
        with suppress(OSError):
            while len(self._spare) < _SPARE_FILES:
                self._spare.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    def _accepted(self, accepted: socket.socket, _: object) -> None:
        if len(self._is_busy) >= MAX_CONNECTIONS:
            # If each is being answered, the oldest of these.
            idle = (one for one, is_busy in self._is_busy.items() if not is_busy)
            oldest = next(idle, next(iter(self._is_busy)))
            del self._is_busy[oldest]
            oldest.close()
        connection = _Connection(accepted)
        self._is_busy[connection] = False
        connection.task = asyncio.create_task(self._converse(connection))
        connection.task.add_done_callback(lambda _: self._ended(connection))

    def _ended(self, connection: _Connection) -> None:
        self._is_busy.pop(connection, None)
        # A task that was cancelled before it began has closed nothing.
        connection.release()
        self._take_spare()

    async def _converse(self, connection: _Connection) -> None:
        try:
            await connection.open(self._tls)
            while True:
                # To the end of the dictionary: it was used last.
                self._is_busy.pop(connection, None)
                self._is_busy[connection] = False
                head = await connection.read_head()
                self._is_busy[connection] = True
                answer, is_last = await self._site.answer(head)
                await connection.write(answer)
                if is_last:
                    await connection.finish()
                    return
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
            # A connection that broke, timed out, or sent no request.
            log.debug("admin_request_failed")
        finally:
            connection.release()


class _Connection:
    """One connection of a client."""

    def __init__(self, accepted: socket.socket) -> None:
        self._accepted = accepted
        self._reader = asyncio.StreamReader(limit=_MAX_HEAD_BYTES)
        self._writer: asyncio.StreamWriter | None = None
        self.task: asyncio.Task[None] | None = None

    async def open(self, tls: SSLContext | None) -> None:
        """Do the TLS handshake, if there is one. Raises OSError or TimeoutError."""
        loop = asyncio.get_running_loop()
        protocol = asyncio.StreamReaderProtocol(self._reader)
        timeout_s = None if tls is None else _TIMEOUT_S
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol, self._accepted, ssl=tls, ssl_handshake_timeout=timeout_s
        )
        # A client that reads slowly is waited for from the first bytes on.
        transport.set_write_buffer_limits(high=_MAX_HEAD_BYTES)
        self._writer = asyncio.StreamWriter(transport, protocol, self._reader, loop)

    async def read_head(self) -> bytes:
        """Return the next request without its body, of which there is none in a GET.

        Raises OSError, EOFError, TimeoutError, or LimitOverrunError.
        """
        async with asyncio.timeout(_IDLE_S):
            first = await self._reader.readexactly(1)
        async with asyncio.timeout(_TIMEOUT_S):
            return first + await self._reader.readuntil(_END_OF_HEAD)

    async def write(self, answer: bytes) -> None:
        """Send an answer. Raises OSError, or TimeoutError if the client takes none of it for 10 s."""
        assert self._writer is not None
        for at in range(0, len(answer), _MAX_HEAD_BYTES):
            self._writer.write(answer[at : at + _MAX_HEAD_BYTES])
            async with asyncio.timeout(_TIMEOUT_S):
                await self._writer.drain()

    async def finish(self) -> None:
        """Close once the answer is sent. Raises OSError or TimeoutError."""
        assert self._writer is not None
        self._writer.close()
        async with asyncio.timeout(_TIMEOUT_S):
            await self._writer.wait_closed()

    def close(self) -> None:
        """Have the conversation end, and the connection with it."""
        # Not the socket itself: until the conversation has ended, its number must not go to another one.
        if self.task is not None:
            self.task.cancel()

    def release(self) -> None:
        """Close at once, whatever the client has not read: it may never read it."""
        if self._writer is not None:
            self._writer.transport.abort()
        else:
            self._accepted.close()


class _Site:
    """What the paths answer."""

    def __init__(self, registry: Collector, health: Health, pages: Mapping[str, Page]) -> None:
        self._registry = registry
        self.health = health
        self._pages = pages
        # Not the loop's own threads, on which names are looked up: a page may take its time.
        self._threads = ThreadPoolExecutor(_RENDERERS, thread_name_prefix="admin")

    async def answer(self, head: bytes) -> tuple[bytes, bool]:
        """Return the answer to a request, and whether the connection ends with it."""
        request = _Request(head)
        if request.is_valid:
            await self._respond(request)
        return request.answer, request.close_connection

    async def _respond(self, request: _Request) -> None:
        path, _, query = request.path.partition("?")
        in_thread = partial(asyncio.get_running_loop().run_in_executor, self._threads)
        if request.command not in {"GET", "HEAD"}:
            # The body is not read, so the connection cannot be used for another request.
            request.close_connection = True
            request.respond_json(
                HTTPStatus.METHOD_NOT_ALLOWED, {"error": "only GET and HEAD"}, Allow="GET, HEAD"
            )
        elif path == "/metrics":
            encode, content_type = choose_encoder(request.headers.get("Accept", ""))
            request.respond(HTTPStatus.OK, await in_thread(encode, self._registry), content_type)
        elif path == "/healthz":
            complaint = await self.health.complaint()
            status = HTTPStatus.SERVICE_UNAVAILABLE if complaint else HTTPStatus.OK
            request.respond_json(
                status, {"version": __version__} | ({"error": complaint} if complaint else {})
            )
        elif path == "/healthr":
            readiness = await self.health.readiness()
            status = HTTPStatus.OK if readiness.is_ready else HTTPStatus.SERVICE_UNAVAILABLE
            request.respond_json(status, {"version": __version__, "probes": dict(readiness.probes)})
        elif path in self._pages:
            page = self._pages[path]
            request.respond_json(HTTPStatus.OK, await in_thread(page, parse_qs(query)))
        else:
            paths = ", ".join(["/metrics", "/healthz", "/healthr", *self._pages])
            request.respond_json(HTTPStatus.NOT_FOUND, {"error": f"the paths are {paths}"})


class _Request(BaseHTTPRequestHandler):
    """The library's parser of HTTP/1, and its form of an answer, on bytes."""

    protocol_version = "HTTP/1.1"

    def __init__(self, head: bytes) -> None:  # not the library's: that one serves a socket
        self.rfile = BytesIO(head)
        self.wfile = self._output = BytesIO()
        self.client_address = ("", 0)
        self.command, self.requestline, self.request_version = "", "", ""
        self.raw_requestline = self.rfile.readline(65_537)
        self.close_connection = True
        self.is_valid = self.parse_request()

    @property
    def answer(self) -> bytes:
        """All that was responded."""
        return self._output.getvalue()

    def respond_json(self, status: HTTPStatus, content: object, **headers: str) -> None:
        """Answer with JSON."""
        self.respond(status, json.dumps(content).encode() + b"\n", "application/json", **headers)

    def respond(self, status: HTTPStatus, body: bytes, content_type: str, **headers: str) -> None:
        """Answer; a HEAD without the body."""
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        # The library's own quotes the request, and a token may be in it.
        self.close_connection = True
        self.respond_json(HTTPStatus(code), {"error": HTTPStatus(code).phrase})

    def version_string(self) -> str:
        # The library's own tells the version of Python.
        return "mnemosyned"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the library's name
        # A line per scrape helps no one, and a path may contain a token (`/debug/cluster?token=`).
        pass


def _log_quietly(_: asyncio.AbstractEventLoop, context: Mapping[str, object]) -> None:
    # A connection that breaks in its handshake, for example. asyncio would log a traceback.
    log.debug("admin_request_failed", extra={"reason": str(context.get("message", ""))})
