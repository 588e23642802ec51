"""A channel to one address: gRPC calls over one connection of HTTP/2, dialled when it is needed.

    call() ────────┐
                   ├──> Channel ──> Wire (asyncio protocol) ──> ClientConnection (http2/client.py) ──> socket
    open_stream() ─┘       |
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
    another status than OK                               | CallFailed
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
from typing import Any, Final, cast
from urllib.parse import unquote_to_bytes

from aio.expiry import Expiry
from aio.later import Later, Outcome, failed
from aio.tasks import Tasks
from http2.client import ClientConnection, ClientStream, Work
from http2.messages import HEADER_BYTES, announced_bytes, framed, only_message
from http2.outbox import Headers
from http2.status import StatusCode, parse_status

_CONNECT_S: Final = 1.0  # with the handshake of TLS
_FIRST_PAUSE_S: Final = 0.1
_LAST_PAUSE_S: Final = 1.0
_JITTER: Final = 0.2
_HIGH_WATER_BYTES: Final = 256 * 1024  # in the transport, before it asks for a pause
_MAX_MESSAGE_BYTES: Final = 64 * 1024**2
_HEADERS: Final[Headers] = [(b"content-type", b"application/grpc"), (b"te", b"trailers")]


class CallFailed(Exception):
    """The server has answered with another status than OK."""

    def __init__(self, code: StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code


class ConnectionLost(Exception):
    """There was no connection, or it ended before the answer; the text is for people."""


class IntroductionFailed(Exception):
    """There was a connection, and `introduce` raised `reason`."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


async def _no_introduction(_channel: Channel, _wire: Wire) -> None:
    pass


class Channel:
    """Calls to one address."""

    def __init__(
        self,
        address: str,
        *,
        tls: ssl.SSLContext | None = None,
        server_name: str = "",
        introduce: Callable[[Channel, Wire], Awaitable[Any]] = _no_introduction,
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
        self._wire: Wire | None = None
        self._retiring: set[Wire] = set()
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
        wire = await self.ready(timeout_s)
        return await self.call_on(wire, path, metadata, message, timeout_s=at_s - time.monotonic())

    async def call_on(  # a call's parts
        self,
        wire: Wire,
        path: bytes,
        metadata: Headers,
        message: bytes,
        *,
        timeout_s: float,
        max_bytes: int = _MAX_MESSAGE_BYTES,
    ) -> bytes:
        """Return the answer to one message on a connection that `ready` has just returned.

        Nothing may be awaited in between. Raises as `call` does.
        """
        answer: asyncio.Future[bytes] = wire.loop.create_future()
        stream = wire.open(path, self._headers(metadata), _Unary(answer, max_bytes))
        wire.send(stream, framed(message), is_last=True)
        self.expiry.add(answer, timeout_s)
        try:
            return await answer
        finally:
            # Nothing if the server has ended the stream.
            wire.cancel(stream)

    def open_stream(self, path: bytes, open_with: Callable[[Any], Headers]) -> ChannelStream:
        """Return a stream of messages; it is opened with the first of them.

        `open_with` gets what the introduction of the stream's connection returned, and returns the metadata.
        """
        return ChannelStream(self, path, open_with)

    def open_on(self, wire: Wire, path: bytes, metadata: Headers, work: Work) -> ClientStream:
        """Begin a request on a connection that `ready` has just returned."""
        return wire.open(path, self._headers(metadata), work)

    async def until_lost(self) -> None:
        """Return when the connection is lost that there is, or that can be made."""
        while not self.is_closed:
            try:
                wire = await self.ready(_CONNECT_S)
            except (ConnectionLost, IntroductionFailed, TimeoutError):
                await asyncio.sleep(max(self._dial_after_s - time.monotonic(), _FIRST_PAUSE_S))
            else:
                await wire.lost.wait()
                return

    async def close(self, grace_s: float = 0.0) -> None:
        """Close the connection; calls under way have so many seconds to finish, and are then lost."""
        self.is_closed = True
        await self._tasks.close()
        wires = [*self._retiring] if self._wire is None else [*self._retiring, self._wire]
        for wire in wires:
            wire.retire()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                for wire in wires:
                    await wire.lost.wait()
        for wire in wires:
            wire.abort()
        self.expiry.close()

    def _headers(self, metadata: Headers) -> Headers:
        return [self._authority, *_HEADERS, *metadata]

    async def ready(self, timeout_s: float) -> Wire:
        """Return a connection that takes a stream now.

        Raises:
            ConnectionLost: none can be made, or the last dial failed a moment ago.
            IntroductionFailed: the same, for a server that was not what the channel's owner wants.
            TimeoutError: none could be made in time, or the server takes no further stream yet.
        """
        wire = self._wire
        if wire is not None and wire.http.may_open:
            return wire
        async with asyncio.timeout(timeout_s):
            while True:
                wire = self._current()
                if wire is None:
                    await self._dial()
                elif wire.http.may_open:
                    return wire
                else:
                    self._room.clear()
                    await self._room.wait()

    def _current(self) -> Wire | None:
        """Return the connection for new calls, if there is one; one that retires is set aside."""
        wire = self._wire
        if wire is not None and (wire.http.is_retiring or wire.http.is_over):
            self._wire = None
            if not wire.http.is_over:
                self._retiring.add(wire)
                wire.retire()
        return self._wire

    async def _dial(self) -> None:
        """Have a connection made, together with all others that want one. Raises ConnectionLost."""
        if self._dialling is None:
            if self.is_closed or time.monotonic() < self._dial_after_s:
                raise self._failure.with_traceback(None)
            self._dialling = self._tasks.spawn(self._connect())
        if self._dialling is not None:
            # Not awaited itself: the dial belongs to all calls that wait, and `close` may cancel it.
            await asyncio.wait([self._dialling])
        if self._wire is None:
            raise self._failure.with_traceback(None)

    async def _connect(self) -> None:
        wire: Wire | None = None
        try:
            async with asyncio.timeout(_CONNECT_S):
                wire = await self._dialled()
                wire.introduction = await self._introduce(self, wire)
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
            wire.lost_to = self._lost
            if not wire.lost.is_set():
                self._wire = wire
        finally:
            if wire is not None and self._wire is not wire:
                wire.abort()
            self._dialling = None

    async def _dialled(self) -> Wire:
        """Return a connection to the first address that takes one. Raises OSError or TimeoutError.

        A name may have addresses of both families, of which the server has or can be reached at only one.
        """
        if self.unix_path:
            loop = asyncio.get_running_loop()
            return (await loop.create_unix_connection(lambda: Wire(self._room), self.unix_path))[1]
        hosts = await self._resolved()
        for host in hosts[:-1]:
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(_CONNECT_S / 2 / len(hosts)):
                    return await self._dialled_at(host)
        return await self._dialled_at(hosts[-1])

    async def _dialled_at(self, host: str) -> Wire:
        _, wire = await asyncio.get_running_loop().create_connection(
            lambda: Wire(self._room),
            host,
            self._port,
            ssl=self._tls,
            server_hostname=self._server_name if self._tls else None,
        )
        return wire

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

    def _lost(self, wire: Wire) -> None:
        self._retiring.discard(wire)
        if self._wire is wire:
            self._wire = None


class ChannelStream:
    """A stream on which each message is answered before the next is sent."""

    def __init__(self, channel: Channel, path: bytes, open_with: Callable[[Any], Headers]) -> None:
        self._channel = channel
        self._path = path
        self._open_with = open_with
        self._wire: Wire | None = None
        self._stream: ClientStream | None = None
        self._waiter: Later[bytes] | None = None
        self._received = bytearray()
        self._is_over = False

    @property
    def is_open(self) -> bool:
        """Whether the server waits for a message, as far as is known, on a connection that will stay."""
        return not self._is_over and (self._wire is None or not self._wire.http.is_retiring)

    async def open(self, *, timeout_s: float) -> None:
        """Open the stream, if it is not open yet. Raises as `ask` does."""
        if self._stream is not None:
            return
        try:
            wire = self._wire = await self._channel.ready(timeout_s)
        except BaseException:
            self.cancel()
            raise
        metadata = self._open_with(wire.introduction)
        self._stream = self._channel.open_on(wire, self._path, metadata, self)

    @property
    def is_begun(self) -> bool:
        """Whether it was opened."""
        return self._stream is not None

    def ask(self, message: bytes, *, timeout_s: float) -> Later[bytes]:
        """Send a message on an open stream, and return the next one that comes; a failure closes the stream.

        The Later fails with:
            CallFailed: the server has ended the stream with a status.
            ConnectionLost: no connection, or it broke, or the server has ended the stream.
            TimeoutError: no answer in time.
        """
        wire, stream = self._wire, self._stream
        if self._is_over or wire is None or stream is None:
            return failed(ConnectionLost("the stream is closed"))
        waiter: Later[bytes] = Later()
        answer = waiter.through(self._answered)
        self._waiter = waiter
        self._channel.expiry.add(waiter, timeout_s)
        try:
            wire.send(stream, framed(message), is_last=False)
        except Exception as exc:  # noqa: BLE001  # as if it had come later
            waiter.set_exception(exc)
        return answer

    def _answered(self, outcome: Outcome[bytes]) -> Outcome[bytes]:
        self._waiter = None
        if not isinstance(outcome, bytes):
            self.cancel()
        return outcome

    def take_news(self, stream: ClientStream) -> None:
        """See Work."""
        body = stream.take_body()
        has_ended = stream.is_complete or stream.reset_code is not None
        # Before the answer is given: it may bring the next message.
        self._is_over |= has_ended
        waiter = self._waiter
        if waiter is None or waiter.done():
            self._received += body
            return
        try:
            message = self._message_with(body)
        except CallFailed as exc:
            waiter.set_exception(exc)
            return
        if message is not None:
            waiter.set_result(message)
        elif has_ended:
            waiter.set_exception(_failure(stream) or ConnectionLost("the server has ended the stream"))

    def _message_with(self, body: bytes | bytearray) -> bytes | None:
        """Return the message that these bytes complete; None: more must come. Raises CallFailed."""
        if not self._received:
            # Most answers come as a whole.
            message = only_message(body)
            if message is not None:
                return message
        self._received += body
        return _first_message(self._received)

    def finish(self) -> None:
        """Tell the server that no further message comes; what it says to that is not awaited."""
        self._is_over = True
        if self._wire is not None and self._stream is not None:
            self._wire.finish(self._stream)

    def cancel(self) -> None:
        """End the stream at once."""
        self._is_over = True
        if self._wire is not None and self._stream is not None:
            self._wire.cancel(self._stream)


class _Unary:
    """Waits for the answer of one call."""

    def __init__(self, answer: asyncio.Future[bytes], max_bytes: int) -> None:
        self._answer = answer
        self._max_bytes = max_bytes

    def take_news(self, stream: ClientStream) -> None:
        if self._answer.done():
            return
        if stream.is_complete or stream.reset_code is not None:
            failure = _failure(stream)
            message = only_message(stream.body)
            if failure is not None:
                self._answer.set_exception(failure)
            elif message is None:
                self._answer.set_exception(CallFailed(StatusCode.INTERNAL, "the answer is no message"))
            else:
                self._answer.set_result(message)
        elif announced_bytes(stream.body) > self._max_bytes:
            self._answer.set_exception(CallFailed(StatusCode.RESOURCE_EXHAUSTED, "the answer is too large"))


class Wire(asyncio.Protocol):
    """One connection: does what ClientConnection decides."""

    def __init__(self, room: asyncio.Event) -> None:
        self.introduction: Any = None  # what the channel's `introduce` returned
        self.http = ClientConnection()
        self.loop = asyncio.get_running_loop()
        self.lost = asyncio.Event()
        self.lost_to: Callable[[Wire], None] = lambda _: None
        self._room = room
        self._transport: asyncio.Transport = None  # type: ignore[assignment]  # before anything else
        self._is_writable = True

    @property
    def host(self) -> str:
        """The address that was dialled."""
        return str(self._transport.get_extra_info("peername", ("",))[0])

    @property
    def certificate_names(self) -> tuple[str, ...]:
        """The names in the server's certificate, which was verified; empty without TLS."""
        tls = self._transport.get_extra_info("ssl_object")
        certificate = None if tls is None else tls.getpeercert()
        names = certificate.get("subjectAltName", ()) if certificate else ()
        return tuple(value for kind, value in names if kind in {"DNS", "IP Address"})

    def open(self, path: bytes, headers: Headers, work: Work) -> ClientStream:
        """Begin a request; `send` sends it."""
        return self.http.open(path, headers, work)

    def send(self, stream: ClientStream, part: bytes, *, is_last: bool) -> None:
        """Send a part of a request."""
        self.http.send(stream, part, time.monotonic())
        if is_last:
            self.http.finish(stream)
        self._flush()

    def finish(self, stream: ClientStream) -> None:
        """End a request."""
        self.http.finish(stream)
        self._flush()

    def cancel(self, stream: ClientStream) -> None:
        """Reset a stream, if it is open."""
        if stream.id in self.http.streams:
            self.http.cancel(stream)
            self._flush()
            self._close_if_done()

    def retire(self) -> None:
        """Open no more streams, and close after the last."""
        self.http.is_retiring = True
        self._close_if_done()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own class does not derive from it
        self._transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)

    def data_received(self, data: bytes) -> None:
        """Give the news of each stream to who waits for it."""
        for stream in self.http.receive(data):
            stream.work.take_news(stream)
        self._room.set()
        self._flush()
        self._close_if_done()

    def pause_writing(self) -> None:
        """Hold requests from now on."""
        self._is_writable = False
        self.http.pause(is_paused=True)

    def resume_writing(self) -> None:
        """Go on sending."""
        self._is_writable = True
        self.http.pause(is_paused=False)
        self._flush()

    def connection_lost(self, _exc: Exception | None) -> None:
        """Tell all who wait that nothing comes."""
        for stream in self.http.lose():
            stream.work.take_news(stream)
        self.lost.set()
        self._room.set()
        self.lost_to(self)

    def _flush(self) -> None:
        while not self._transport.is_closing():
            output = self.http.output(time.monotonic())
            if not output:
                break
            self._transport.write(output)
            if not self.http.unsent_bytes or not self._is_writable:
                break

    def _close_if_done(self) -> None:
        if self.http.is_over or (self.http.is_retiring and not self.http.streams):
            self._transport.close()


def _is_ip(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _first_message(received: bytearray) -> bytes | None:
    """Take the first message out of what has come; None: more must come. Raises CallFailed."""
    if len(received) < HEADER_BYTES:
        return None
    end = announced_bytes(received[:HEADER_BYTES])
    if received[0] or end > _MAX_MESSAGE_BYTES:
        raise CallFailed(StatusCode.INTERNAL, "the answer is compressed or too large")
    if len(received) < end:
        return None
    message = bytes(received[HEADER_BYTES:end])
    del received[:end]
    return message


def _failure(stream: ClientStream) -> CallFailed | ConnectionLost | None:
    """Return with what a stream has ended, unless that was OK."""
    if stream.reset_code is not None:
        return ConnectionLost(f"the stream was reset with code {stream.reset_code}")
    # An answer that is a failure alone has its status in the only block of headers.
    fields = dict(stream.headers) | dict(stream.trailers)
    if b"grpc-status" not in fields:
        return CallFailed(StatusCode.UNKNOWN, f"no answer of gRPC, but HTTP {stream.status}")
    code = parse_status(fields[b"grpc-status"])
    if code is StatusCode.OK:
        return None
    return CallFailed(code, unquote_to_bytes(fields.get(b"grpc-message", b"")).decode(errors="replace"))
