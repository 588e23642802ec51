"""Bounds the answers that clients of grpcio have not taken: of each connection, and of all together.

grpcio holds an answer, twice, until its client has opened the windows for it, and the transport has it. It
tells of that only by the end of the call. So the bytes of an answer count from here until then:

    request ── `room` ──> read, handled ── `room` ──> `add` ──> grpcio ──> the end of the call
                 |                           |
                 └───────────────────────────┴── the connection holds its share: wait until it takes some

A client that asks for much and reads nothing thus has little held, and its further calls wait. Such clients
are ended, as by h2:

- When all connections together hold too much: the one that has taken nothing for the longest goes first.
- When a connection has taken next to nothing for `-grpc.send-timeout`.

grpcio ends no connection when it is asked to, so the socket is shut: the core finds it closed, and ends its
calls. The socket is found among the files of this process by the address of its other end. What a client has
taken is what its host has acknowledged, as the kernel counts it.

Connections of a Unix socket cannot be told apart. They share one bound, that of all, and beyond it further
calls are refused.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from aio.periodic import run_periodically
from aio.rate_limit import LogRateLimiter
from mnemosyned.errors import Overloaded
from mnemosyned.transport.engine import NO_LINGER, ConnectionStats, EngineOptions, host_port

log = logging.getLogger(__name__)

Context = Any

_CALL_BYTES: Final = 2048  # what grpcio holds of a call besides its answer, about
_COPIES: Final = 2  # of an answer: Python's, and the core's
_RELIEVED: Final = 0.9  # of the bound, when all connections together have passed it
_CHECK_S: Final = (0.25, 5.0)
_MOVE_BYTES: Final = 4096  # in one time-out; acknowledging PING must not look like reading
_FILES: Final = "/dev/fd"
# Where `tcpi_bytes_acked` stands in Linux's struct tcp_info.
_ACKED: Final = struct.Struct("@Q")
_ACKED_AT: Final = 120


class _Connection:
    """What one connection holds; it exists while that is anything, or while calls wait for it."""

    __slots__ = ("acked_bytes", "call_count", "is_ended", "moved_s", "size_bytes", "waiting")

    def __init__(self, now_s: float) -> None:
        self.size_bytes = 0
        self.call_count = 0
        self.moved_s = now_s  # when the client last took something
        self.acked_bytes = 0  # then
        self.waiting: deque[asyncio.Future[None]] = deque()
        self.is_ended = False


class UnsentAnswers:
    """The answers of one engine that clients have not taken. On the event loop alone: it has no lock."""

    def __init__(self, options: EngineOptions) -> None:
        self._max_bytes = options.max_unsent_bytes
        self._max_bytes_of_one = options.max_unsent_bytes_per_connection
        self._send_timeout_s = options.send_timeout_s
        self._stats: ConnectionStats = options.stats
        self._by_peer: dict[str, _Connection] = {}
        self._size_bytes = 0
        self._limiter = LogRateLimiter()
        self._checking: asyncio.Task[Any] | None = None

    @property
    def size_bytes(self) -> int:
        """How many bytes are held for all connections."""
        return self._size_bytes

    def begin(self) -> None:
        """Look after the time-out from now on."""
        least_s, most_s = _CHECK_S
        period_s = min(max(self._send_timeout_s / 4, least_s), most_s)
        self._checking = asyncio.create_task(
            run_periodically("answers_check", self._check, period_s=lambda: period_s)
        )

    async def close(self) -> None:
        """End that."""
        if self._checking is not None:
            self._checking.cancel()
            await asyncio.gather(self._checking, return_exceptions=True)

    async def room(self, peer: str, context: Context) -> None:
        """Wait until the connection holds less than its share.

        Raises:
            Overloaded: all connections together hold too much.
        """
        if self._size_bytes > self._max_bytes:
            raise Overloaded("mnemosyned: too many answers are not read")
        connection = self._by_peer.get(peer)
        if connection is None or not self._is_full(peer, connection):
            return
        room: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        connection.waiting.append(room)
        # Also if the call fails: the next one must have its turn.
        context.add_done_callback(lambda _: self._go_on(peer, connection))
        try:
            await room
        finally:
            if not room.done() or room.cancelled():
                connection.waiting.remove(room)

    def add(self, peer: str, answer_bytes: int, context: Context) -> None:
        """Count an answer from now until its call ends."""
        size_bytes = _COPIES * answer_bytes + _CALL_BYTES
        connection = self._by_peer.get(peer)
        if connection is None:
            connection = self._by_peer[peer] = _Connection(_now_s())
        connection.size_bytes += size_bytes
        connection.call_count += 1
        self._size_bytes += size_bytes
        context.add_done_callback(lambda _: self._taken(peer, connection, size_bytes))
        if self._size_bytes > self._max_bytes:
            self._relieve()

    def _is_full(self, peer: str, connection: _Connection) -> bool:
        share_bytes = self._max_bytes_of_one if _is_told_apart(peer) else self._max_bytes
        return connection.size_bytes >= share_bytes

    def _taken(self, peer: str, connection: _Connection, size_bytes: int) -> None:
        connection.call_count -= 1
        connection.moved_s = _now_s()
        if not connection.is_ended:
            connection.size_bytes -= size_bytes
            self._size_bytes -= size_bytes
        self._go_on(peer, connection)

    def _go_on(self, peer: str, connection: _Connection) -> None:
        """Let the next call of a connection on, and forget the connection if there is nothing of it."""
        while connection.waiting and not self._is_full(peer, connection):
            room = connection.waiting.popleft()
            if not room.done():
                room.set_result(None)
                return
        is_idle = not connection.call_count and not connection.waiting
        if is_idle and self._by_peer.get(peer) is connection:
            del self._by_peer[peer]

    def _relieve(self) -> None:
        """End connections until all together hold no more than they may; more than must be, as h2 does."""
        surplus_bytes = self._size_bytes - self._max_bytes * _RELIEVED
        victims: dict[str, _Connection] = {}
        for peer, connection in sorted(self._by_peer.items(), key=lambda item: item[1].moved_s):
            if surplus_bytes <= 0:
                break
            if connection.size_bytes and not connection.is_ended and _is_told_apart(peer):
                victims[peer] = connection
                surplus_bytes -= connection.size_bytes
        self._end(victims, "unread")

    async def _check(self) -> None:
        """End the connections whose clients have taken next to nothing for the time-out."""
        self._stats.unsent_bytes = self._size_bytes
        now_s = _now_s()
        still = {
            peer: connection
            for peer, connection in self._by_peer.items()
            # Looked at early enough to know how much is taken meanwhile.
            if connection.call_count and now_s - connection.moved_s >= self._send_timeout_s / 4
        }
        if not still:
            return
        stuck: dict[str, _Connection] = {}
        with _sockets(set(still)) as sockets:
            for peer, one in sockets.items():
                connection = still[peer]
                acked_bytes = _acked_bytes(one)
                if acked_bytes is None:
                    continue
                if acked_bytes - connection.acked_bytes >= _MOVE_BYTES:
                    connection.acked_bytes, connection.moved_s = acked_bytes, now_s
                elif now_s - connection.moved_s >= self._send_timeout_s:
                    stuck[peer] = connection
        self._end(stuck, "send")

    def _end(self, victims: dict[str, _Connection], reason: str) -> None:
        if not victims:
            return
        with _sockets(set(victims)) as sockets:
            for peer, one in sockets.items():
                connection = victims[peer]
                left_out = self._limiter.take(_now_s())
                if left_out is not None:
                    fields = {"peer": peer, "bytes": connection.size_bytes, "left_out": left_out}
                    log.warning("answers_unread", extra=fields)
                self._stats.ended[reason] += 1
                _shut(one)
                # Its calls end soon, but what they hold must not end further connections until then.
                connection.is_ended = True
                self._size_bytes -= connection.size_bytes
                connection.size_bytes = 0
                # Another connection may have the same address soon.
                self._by_peer.pop(peer, None)


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def _is_told_apart(peer: str) -> bool:
    return not peer.startswith("unix")


@contextmanager
def _sockets(peers: set[str]) -> Iterator[dict[str, socket.socket]]:
    """Find the sockets of this process with these other ends; they are duplicates, closed afterwards."""
    found: dict[str, socket.socket] = {}
    try:
        for number in map(int, os.listdir(_FILES)):  # noqa: PTH208  # numbers
            if _other_end(number) not in peers:
                continue
            try:
                one = socket.socket(fileno=os.dup(number))
            except OSError:
                continue
            # The file may be another one by now: the core has threads of its own.
            peer = _other_end(one.fileno())
            if peer in peers and peer not in found:
                found[peer] = one
            else:
                one.close()
        yield found
    except OSError:
        # Out of files, or a system that does not list them.
        yield {}
    finally:
        for one in found.values():
            one.close()


def _other_end(number: int) -> str | None:
    """Return the other end of a socket of TCP that this process accepted or opened, as `Call.peer` has it."""
    try:
        one = socket.socket(fileno=number)
    except OSError:
        return None
    try:
        address = one.getpeername()
    except OSError:
        return None
    finally:
        one.detach()
    if not isinstance(address, tuple):
        return None
    return host_port(address[0].removeprefix("::ffff:"), address[1])


def _acked_bytes(one: socket.socket) -> int | None:
    """Return how many bytes the other host has acknowledged; None if the system does not tell."""
    try:
        told = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        return int(_ACKED.unpack_from(told, _ACKED_AT)[0])
    except (AttributeError, OSError, struct.error):
        return None


def _shut(one: socket.socket) -> None:
    try:
        # What waits in the kernel is dropped when the core closes the socket.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        one.shutdown(socket.SHUT_RDWR)
    except OSError:
        log.debug("connection_gone")
