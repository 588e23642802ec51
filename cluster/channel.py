"""A channel to one address: gRPC calls over one connection of HTTP/2, dialled when it is needed.

    call() ───────────────────────────┐
                                      ├──> Channel ──> Connection (connection.py) ──> socket
    ChannelStream (channel_stream.py) ┘       |
                                              └── dials; after a failure not before a pause has passed

- A new connection is introduced before any call uses it: the owner of the channel finds out who is at the
  other end, by the certificate or by a call of its own. Without an introduction there is no connection.
- All calls of a channel share its connection. When the server asks for a new one (GOAWAY), calls under way
  finish on the old one, and new calls go to a new one.
- A call that finds no connection waits for the dial, as long as its time-out allows. While a dial that failed
  is not to be repeated, calls fail at once: the caller can turn to the storage.
- Pauses between dials grow from _FIRST_PAUSE_S to _LAST_PAUSE_S, each a little different, so that nodes do
  not all dial a restarted node at the same instants.
- Time-outs have one timer for all calls (aio/expiry.py).

What a call can end with:

    an answer                                            | the message
    another status than OK                               | CallFailed (responses.py)
    no connection, or it broke, or the server reset it   | ConnectionLost
    no introduction                                      | IntroductionFailed
    no answer in time                                    | TimeoutError; the stream is reset

On the wire this is gRPC as every server knows it, so that a node of an earlier release can be the peer.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from ipaddress import ip_address
from typing import Any, Final

from aio.expiry import Expiry
from aio.tasks import Tasks
from cluster.connection import Connection
from cluster.responses import MAX_MESSAGE_BYTES, ConnectionLost, UnaryResponse
from http2.client import ClientStream, Work
from http2.messages import framed
from http2.outbox import Headers

_CONNECT_S: Final = 1.0  # with the handshake of TLS
_FIRST_PAUSE_S: Final = 0.1
_LAST_PAUSE_S: Final = 1.0
_JITTER: Final = 0.2
_HEADERS: Final[Headers] = [(b"content-type", b"application/grpc"), (b"te", b"trailers")]


class IntroductionFailed(Exception):
    """There was a connection, and `introduce` raised `reason`."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


async def _no_introduction(_channel: Channel, _connection: Connection) -> None:
    pass


class Channel:
    """Calls to one address."""

    def __init__(
        self,
        address: str,
        *,
        tls: ssl.SSLContext | None = None,
        server_name: str = "",
        introduce: Callable[[Channel, Connection], Awaitable[Any]] = _no_introduction,
        may_dial: Callable[[str], bool] = lambda _: True,
        unix_path: str = "",
    ) -> None:
        """Dial nothing yet.

        - Over TLS the server's certificate must be for `server_name`.
        - `introduce` is awaited with each new connection; what it returns goes with the calls on it. If it
          raises, the connection is closed, and the calls that wait for it fail.
        - `may_dial` is asked for what a host name stands for; an address is dialled as it is.
        - `unix_path` is a socket on this host where the address is reached, without TLS.
        """
        self.unix_path = unix_path
        host, _, port = address.rpartition(":")
        self._host, self._port = host.strip("[]"), int(port)
        self._authority = (b"host", address.encode())
        self._tls = tls
        self._server_name = server_name
        self._introduce = introduce
        self._may_dial = may_dial
        self._connection: Connection | None = None
        self._retiring: set[Connection] = set()
        self._dialling: asyncio.Task[None] | None = None
        self._pause_s = _FIRST_PAUSE_S
        self._dial_after_s = 0.0
        # Of the last dial.
        self._failure: ConnectionLost | IntroductionFailed = ConnectionLost("the channel is closed")
        self._tasks = Tasks("dial")
        self.expiry = Expiry()
        self._room = asyncio.Event()  # a stream may have ended
        self.is_closed = False

    async def call(self, path: bytes, metadata: Headers, message: bytes, *, timeout_s: float) -> bytes:
        """Return the answer to one message.

        Raises CallFailed, ConnectionLost, IntroductionFailed or TimeoutError.
        """
        at_s = time.monotonic() + timeout_s
        connection = await self.ready(timeout_s)
        return await self.call_on(connection, path, metadata, message, timeout_s=at_s - time.monotonic())

    async def call_on(  # a call's parts
        self,
        connection: Connection,
        path: bytes,
        metadata: Headers,
        message: bytes,
        *,
        timeout_s: float,
        max_bytes: int = MAX_MESSAGE_BYTES,
    ) -> bytes:
        """Return the answer to one message on a connection that `ready` has just returned.

        Nothing may be awaited in between. Raises as `call` does.
        """
        answer: asyncio.Future[bytes] = connection.loop.create_future()
        stream = connection.open(path, self._headers(metadata), UnaryResponse(answer, max_bytes))
        connection.send(stream, framed(message), is_last=True)
        self.expiry.add(answer, timeout_s)
        try:
            return await answer
        finally:
            # Nothing if the server has ended the stream.
            connection.cancel(stream)

    def open_on(self, connection: Connection, path: bytes, metadata: Headers, work: Work) -> ClientStream:
        """Begin a request on a connection that `ready` has just returned."""
        return connection.open(path, self._headers(metadata), work)

    async def until_lost(self) -> None:
        """Return when the connection is lost that there is, or that can be made."""
        while not self.is_closed:
            try:
                connection = await self.ready(_CONNECT_S)
            except (ConnectionLost, IntroductionFailed, TimeoutError):
                await asyncio.sleep(max(self._dial_after_s - time.monotonic(), _FIRST_PAUSE_S))
            else:
                await connection.lost.wait()
                return

    def dial_soon(self) -> None:
        """Dial with the next call: a server may have come since the last dial, after which calls fail."""
        self._dial_after_s = 0.0

    async def close(self, grace_s: float = 0.0) -> None:
        """Close the connection; calls under way have so many seconds to finish, and are then lost."""
        self.is_closed = True
        await self._tasks.close()
        connections = [*self._retiring] if self._connection is None else [*self._retiring, self._connection]
        for connection in connections:
            connection.retire()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                for connection in connections:
                    await connection.lost.wait()
        for connection in connections:
            connection.abort()
        self.expiry.close()

    def _headers(self, metadata: Headers) -> Headers:
        return [self._authority, *_HEADERS, *metadata]

    async def ready(self, timeout_s: float) -> Connection:
        """Return a connection that takes a stream now.

        Raises:
            ConnectionLost: none can be made, or the last dial failed a moment ago.
            IntroductionFailed: the same, for a server that was not what the channel's owner wants.
            TimeoutError: none could be made in time, or the server takes no further stream yet.
        """
        connection = self._connection
        if connection is not None and connection.http.may_open:
            return connection
        async with asyncio.timeout(timeout_s):
            while True:
                connection = self._current()
                if connection is None:
                    await self._dial()
                elif connection.http.may_open:
                    return connection
                else:
                    self._room.clear()
                    await self._room.wait()

    def _current(self) -> Connection | None:
        """Return the connection for new calls, if there is one; one that retires is set aside."""
        connection = self._connection
        if connection is not None and (connection.http.is_retiring or connection.http.is_over):
            self._connection = None
            if not connection.http.is_over:
                self._retiring.add(connection)
                connection.retire()
        return self._connection

    async def _dial(self) -> None:
        """Have a connection made, together with all others that want one. Raises ConnectionLost."""
        if self._dialling is None:
            if self.is_closed or time.monotonic() < self._dial_after_s:
                raise self._failure.with_traceback(None)
            self._dialling = self._tasks.spawn(self._connect())
        if self._dialling is not None:
            # Not awaited itself: the dial belongs to all calls that wait, and `close` may cancel it.
            await asyncio.wait([self._dialling])
        if self._connection is None:
            raise self._failure.with_traceback(None)

    async def _connect(self) -> None:
        connection: Connection | None = None
        try:
            async with asyncio.timeout(_CONNECT_S):
                connection = await self._dialled()
                connection.introduction = await self._introduce(self, connection)
        except Exception as exc:  # noqa: BLE001  # what `introduce` raises is for the calls that wait
            if isinstance(exc, OSError | TimeoutError | ConnectionLost):
                self._failure = ConnectionLost(str(exc) or "no answer to the dial")
            else:
                self._failure = IntroductionFailed(exc)
            self._dial_after_s = time.monotonic() + self._pause_s * random.uniform(  # noqa: S311  # only jitter
                1 - _JITTER, 1 + _JITTER
            )
            self._pause_s = min(2 * self._pause_s, _LAST_PAUSE_S)
        else:
            self._pause_s, self._failure = _FIRST_PAUSE_S, ConnectionLost("the connection is lost")
            connection.lost_to = self._lost
            if not connection.lost.is_set():
                self._connection = connection
        finally:
            if connection is not None and self._connection is not connection:
                connection.abort()
            self._dialling = None

    async def _dialled(self) -> Connection:
        """Return a connection to the first address that takes one. Raises OSError or TimeoutError.

        A name may have addresses of both families, of which the server has or can be reached at only one.
        """
        if self.unix_path:
            loop = asyncio.get_running_loop()
            return (await loop.create_unix_connection(lambda: Connection(self._room), self.unix_path))[1]
        hosts = await self._resolved()
        for host in hosts[:-1]:
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(_CONNECT_S / 2 / len(hosts)):
                    return await self._dialled_at(host)
        return await self._dialled_at(hosts[-1])

    async def _dialled_at(self, host: str) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(self._room),
            host,
            self._port,
            ssl=self._tls,
            server_hostname=self._server_name if self._tls else None,
        )
        return connection

    async def _resolved(self) -> list[str]:
        """Return the addresses to dial, of each family the first. Raises OSError."""
        if _is_ip(self._host):
            return [self._host]
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        hosts: dict[int, str] = {}
        for family, *_, address in found:
            if self._may_dial(str(address[0])):
                hosts.setdefault(family, str(address[0]))
        if hosts:
            return list(hosts.values())
        raise OSError(f"{self._host} stands for no address that may be a node's")

    def _lost(self, connection: Connection) -> None:
        self._retiring.discard(connection)
        if self._connection is connection:
            self._connection = None


def _is_ip(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
