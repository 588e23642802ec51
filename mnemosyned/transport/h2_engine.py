"""The engine on the daemon's own event loop; the default.

    Acceptor ── socket ──> H2Engine ── TLS, if it is on ──> Connection (h2_connection.py), one for each client
                              |
                              └── once a second: `check` of every connection

The engine holds what belongs to all connections: the listening sockets, the certificate, the method table,
and the bounds that hold for all of them together. A connection beyond `-grpc.max-connections` is closed at
once, so that its client turns to another node.

New TLS files make a new context, which new connections get. Open connections keep theirs: nothing is closed,
and the sockets go on listening.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final

from aio.periodic import run_periodically
from aio.rate_limit import LogRateLimiter
from aio.tasks import Tasks
from http2.core import MAX_STREAMS
from http2.stream import ServerLimits
from mnemosyned.security.file_reloader import FilesUnusable
from mnemosyned.security.tls import TlsMaterial, grpc_context
from mnemosyned.transport.acceptor import Acceptor, inherited, open_sockets
from mnemosyned.transport.engine import MAX_METADATA_BYTES, EngineOptions, ListenFailed
from mnemosyned.transport.h2_backlog import Backlog
from mnemosyned.transport.h2_connection import Connection
from mnemosyned.transport.h2_server import Server
from mnemosyned.transport.methods import MethodTable

log = logging.getLogger(__name__)

_CHECK_S: Final = 1.0
_LAST_HANDSHAKES_S: Final = 1.0
_LAST_WORDS_S: Final = 2.0  # for clients to read the last answers
_KEEP_ALIVE: Final = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6))


class H2Engine:
    """Engine on http2/."""

    def __init__(
        self, table: MethodTable, options: EngineOptions, *, limits: ServerLimits | None = None
    ) -> None:
        """`limits` bound each connection, where they are not to be what `options` ask for."""
        self._table = table
        self._options = options
        self._limits = limits or _limits(options)
        self._server: Server | None = None
        self._tls: ssl.SSLContext | None = None
        self._acceptor: Acceptor | None = None
        self._accepted_count = 0  # of the open ones, and those in their handshake
        self._accepted_from: Counter[str] = Counter()  # the same by address
        self._refusals = LogRateLimiter()
        # As many as connections: the bound of connections is the one that counts.
        self._handshakes = Tasks("handshake", max_tasks=options.max_connections)
        self._checking: asyncio.Task[Any] | None = None

    async def start(self) -> int:
        """See Engine."""
        options = self._options
        try:
            if options.tls is not None:
                self._tls = grpc_context(options.tls)
            sockets = inherited(options.listeners) or await open_sockets(options.host, options.port)
        except (OSError, FilesUnusable) as exc:
            raise ListenFailed(f"cannot listen on {options.address}: {_reason(exc)}") from exc
        self._server = _new_server(self._table, options, self._limits)
        self._server.stalls.start()
        self._acceptor = Acceptor(
            sockets,
            self._accepted,
            options.stats.accept_failures,
            is_busy=self._is_busy_with(self._server.backlog),
            give_up=None if options.turns is None else options.turns.give_up,
        )
        self._acceptor.begin()
        self._checking = asyncio.create_task(
            run_periodically("connections_check", self._check, period_s=lambda: _CHECK_S)
        )
        return self._acceptor.port

    async def reload_tls(self, material: TlsMaterial) -> None:
        """See Engine."""
        assert self._options.tls is not None
        # The context reads the files itself, and they may have changed once more.
        self._tls = await asyncio.to_thread(grpc_context, self._options.tls)
        log.debug("tls_generation", extra={"expires_at": round(material.expires_at_s)})

    async def drain(self) -> None:
        """See Engine."""
        if self._acceptor is None or self._checking is None:
            return
        self._acceptor.close()
        if self._handshakes:
            # Their clients have been told by nothing yet that this server stops.
            await asyncio.wait(self._handshakes.running(), timeout=_LAST_HANDSHAKES_S)
        await self._handshakes.close()
        for connection in self._connections():
            connection.retire("drain")
        await self._wait_until_closed(self._options.drain_timeout_s)
        for connection in self._connections():
            connection.expel("mnemosyned: the server stops")
        await self._wait_until_closed(_LAST_WORDS_S)
        for connection in self._connections():
            connection.abort("drain")
        if self._server is not None:
            self._server.stalls.stop()
        self._checking.cancel()
        await asyncio.gather(self._checking, return_exceptions=True)

    def _connections(self) -> list[Connection]:
        return [] if self._server is None else list(self._server.connections)

    async def _wait_until_closed(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                for connection in self._connections():
                    await connection.closed.wait()

    def _accepted(self, accepted: socket.socket, address: Any) -> None:  # noqa: ANN401  # of any family
        host = address[0] if isinstance(address, tuple) else ""
        self._count(host, 1)
        if self._is_full(host) or self._handshakes.spawn(self._serve(accepted, host)) is None:
            accepted.close()
            self._forget(host)
            self._options.stats.ended["limit"] += 1
            left_out = self._refusals.take(time.monotonic())
            if left_out is not None:
                log.warning("connection_refused", extra={"peer": host, "left_out": left_out})

    def _is_busy_with(self, backlog: Backlog) -> Callable[[], bool]:
        turns = self._options.turns
        if turns is None:
            return lambda: backlog.is_busy
        return lambda: backlog.is_busy or not turns.may_accept(self._accepted_count)

    def _is_full(self, host: str) -> bool:
        options, most_of_one = self._options, self._options.max_connections_per_address
        if self._accepted_count > options.max_connections:
            return True
        return bool(most_of_one and host) and self._accepted_from[host] > most_of_one

    def _forget(self, host: str) -> None:
        self._count(host, -1)
        if not self._accepted_from[host]:
            del self._accepted_from[host]

    def _count(self, host: str, more: int) -> None:
        self._accepted_count += more
        self._accepted_from[host] += more
        if self._options.turns is not None:
            self._options.turns.show(self._accepted_count)

    async def _serve(self, accepted: socket.socket, host: str) -> None:
        assert self._server is not None
        _set_options(accepted)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                partial(Connection, self._server, partial(self._forget, host)),
                accepted,
                ssl=self._tls,
                ssl_handshake_timeout=self._options.handshake_timeout_s if self._tls else None,
            )
        except (OSError, TimeoutError) as exc:
            # The client is gone, or does not speak TLS, or has no certificate that we accept.
            log.debug("handshake_failed", extra={"peer": host, "error": str(exc)})
            self._options.stats.ended["handshake"] += 1
            accepted.close()
            self._forget(host)

    async def _check(self) -> None:
        now_s = time.monotonic()
        for connection in self._connections():
            connection.check(now_s)
        if self._server is not None:
            self._server.relieve()
            self._options.stats.unsent_bytes = self._server.unsent_total.size_bytes


def _reason(exc: OSError | FilesUnusable) -> str:
    # The text of `socket.create_server` repeats the address.
    text = exc.strerror if isinstance(exc, OSError) else None
    return (text or str(exc)).partition(" (while ")[0]


def _limits(options: EngineOptions) -> ServerLimits:
    return ServerLimits(
        max_streams=min(options.max_streams, MAX_STREAMS),
        max_header_bytes=MAX_METADATA_BYTES,
        max_unsent_bytes=options.max_unsent_bytes_per_connection,
        max_request_bytes=options.max_request_bytes_per_connection,
        preface_s=options.handshake_timeout_s,
        send_s=options.send_timeout_s,
        max_age_s=options.max_age_s or math.inf,
        grace_s=options.age_grace_s,
        idle_s=options.max_idle_s or math.inf,
    )


def _new_server(table: MethodTable, options: EngineOptions, limits: ServerLimits) -> Server:
    return Server(
        limits=limits,
        stats=options.stats,
        unary={path.encode(): method for path, method in table.unary.items()},
        streams={path.encode(): method for path, method in table.streams.items()},
        max_message_bytes=options.max_message_bytes,
        max_unsent_bytes=options.max_unsent_bytes,
        max_request_bytes=options.max_request_bytes,
    )


def _set_options(accepted: socket.socket) -> None:
    if accepted.family == socket.AF_UNIX:
        return
    with suppress(OSError):
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A client whose host has died sends no end: its connection would stay.
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE:
            if hasattr(socket, name):
                accepted.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
