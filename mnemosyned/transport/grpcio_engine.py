"""The engine on grpc.aio, the reference: a call costs it about 14 times the CPU of the default engine.

It is a second implementation: what both engines answer alike in the tests is unlikely to be a quirk of one of
them. It also is the way back, if a client does not get on with the default engine, and it runs where zttp has
no wheel.

grpcio does the HTTP/2, the framing and the deadline's header. This module translates. It also unpacks what is
compressed, in slices (aio/slices.py): grpcio's own threads would unpack many messages of megabytes while all
other connections wait. Without its filter grpcio passes on the bytes as they are, and does not say that they
are compressed; they show it themselves (`frame.is_packed`).

Where grpcio differs from the port's ideal:

- It has one limit for the size of messages, for all methods. The largest limit of any method is given to it,
  and each method's own limit is checked once the message is in memory.
- It knows `-tls.client-auth` none and require, not optional (transport/config.py refuses that at the start).
- It has no limit of connections for an address, or of the bytes of requests that are not complete.
- It does not tell how many connections are open, or how much of an answer is sent (grpcio_unsent.py).
- It asks for the certificate at each handshake. New TLS files thus need no new server, and connections with
  the former certificate stay open.
- A handler that fails ends by `context.abort`, which raises: what follows in the function is never reached.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

import grpc

from aio.deadline import NO_DEADLINE, Deadline
from aio.later import Later
from aio.slices import SlicesFull, in_slices, in_turn
from aio.stalls import StallWatch
from aio.tasks import Tasks
from mnemosyned.errors import MessageTooLarge, MnemosyneError, Overloaded, Unimplemented
from mnemosyned.security.certificates import names_of
from mnemosyned.security.file_reloader import FilesUnusable
from mnemosyned.security.tls import ClientAuth, TlsMaterial
from mnemosyned.sessions.clock import uptime_ns
from mnemosyned.transport.acceptor import open_sockets, remove_left_socket
from mnemosyned.transport.call import (
    OWNER_KEY,
    UNKNOWN_METHOD,
    Failure,
    fail,
    failure_of,
    invoke_stream,
    invoke_unary,
    refuse,
)
from mnemosyned.transport.engine import (
    MAX_METADATA_BYTES,
    UNIX_PREFIX,
    EngineOptions,
    ListenFailed,
    host_port,
)
from mnemosyned.transport.frame import is_packed, unpacking_message
from mnemosyned.transport.grpcio_listener import ListenerWatch, duplicates, listening_files
from mnemosyned.transport.grpcio_server import Handlers, RegisteredServer
from mnemosyned.transport.grpcio_unsent import UnsentAnswers
from mnemosyned.transport.methods import MethodTable, StreamMethod, UnaryMethod
from mnemosyned.transport.spare_files import need_files

_KEEPALIVE_MS: Final = 60_000
_PENDING: Final = 10_000
_MIN_PING_MS: Final = 5_000
_NEVER_MS: Final = 2**31 - 1
# Of those that have ceased to accept connections, and may have open ones. Then the oldest is stopped, as in
# a drain.
_MAX_SERVERS: Final = 16
# grpcio reads the sockets in threads of its own, and hands the calls over one by one: after a stall some come
# later than with the other engine, and the later the more have come in it.
_STALL_MEMORY_S: Final = 0.5
_STALL_MEMORY_PART: Final = 0.5

# grpc.aio's generic classes take their type arguments only in the stubs.
Context = Any


def _is_not_of_metadata(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Invalid encoding")


class GrpcioEngine:
    """Engine on grpc.aio; its server keeps the certificate in a variable that handshakes read.

    A server that has ceased to accept connections is followed by another one, and goes on with those it has.
    """

    def __init__(self, table: MethodTable, options: EngineOptions) -> None:
        self._options = options
        self._identity: grpc.ServerCertificateConfiguration | None = None
        self._arguments = _channel_arguments(table, options)
        self._unsent = UnsentAnswers(options)
        self._stalls = StallWatch(uptime_ns, memory_s=_STALL_MEMORY_S, memory_part=_STALL_MEMORY_PART)
        self._handlers = _handlers(table, options.max_message_bytes, self._unsent, self._stalls)
        self._servers: list[RegisteredServer] = []  # the last one accepts connections
        self._retiring = Tasks("retirement", max_tasks=_MAX_SERVERS)
        self._watch: ListenerWatch | None = None

    async def start(self) -> int:
        """See Engine."""
        # It logs metadata that is not UTF-8, byte for byte and with a traceback. A token may be in it.
        logging.getLogger("grpc._cython.cygrpc").addFilter(_is_not_of_metadata)
        options = self._options
        try:
            if options.host.startswith(UNIX_PREFIX):
                _check_socket(options.host.removeprefix(UNIX_PREFIX))
            if options.tls is not None:
                self._identity = _identity(options.tls.read())
            addresses = await _addresses(options)
            sockets = await self._listen(addresses)
        except (RuntimeError, OSError, FilesUnusable) as exc:
            raise ListenFailed(f"cannot listen on {options.address}: {_reason(exc)}") from exc
        self._unsent.begin()
        self._stalls.start()
        self._watch = ListenerWatch(
            sockets, options.stats.accept_failures, partial(self._listen_again, addresses)
        )
        return 0 if options.host.startswith(UNIX_PREFIX) else int(addresses[0].rpartition(":")[2])

    async def reload_tls(self, material: TlsMaterial) -> None:
        """See Engine."""
        self._identity = _identity(material)

    async def drain(self) -> None:
        """See Engine."""
        if self._watch is not None:
            await self._watch.close()
        await asyncio.gather(*(self._stop(server) for server in self._servers), *self._retiring.running())
        await self._unsent.close()
        self._stalls.stop()

    async def _stop(self, server: RegisteredServer) -> None:
        await server.stop(self._options.drain_timeout_s)
        await server.close_refusals()

    async def _listen(self, addresses: Sequence[str]) -> list[socket.socket]:
        """Start another server; return its sockets. Raises a RuntimeError or an OSError."""
        server = RegisteredServer(self._arguments, self._handlers, _refuse)
        need_files()
        before = listening_files()
        for address in addresses:
            if self._options.tls is None:
                server.add_insecure_port(address)
            else:
                server.add_secure_port(address, self._credentials())
        await server.start()
        try:
            sockets = duplicates(listening_files() - before)
        except OSError:
            # It would keep the address.
            await server.stop(None)
            raise
        self._servers.append(server)
        return sockets

    async def _listen_again(self, addresses: Sequence[str]) -> list[socket.socket]:
        """See ListenerWatch."""
        try:
            sockets = await self._listen(addresses)
        except RuntimeError as exc:
            raise OSError(_reason(exc)) from exc
        if len(self._servers) > _MAX_SERVERS:
            self._retiring.spawn(self._stop(self._servers.pop(0)))
        return sockets

    def _credentials(self) -> grpc.ServerCredentials:
        identity = self._identity
        assert self._options.tls is not None
        assert identity is not None
        is_required = self._options.tls.client_auth is ClientAuth.REQUIRE
        # grpcio calls the second argument at each handshake.
        return grpc.dynamic_ssl_server_credentials(identity, lambda: self._identity or identity, is_required)


class _GrpcioCall:
    """Call on a servicer context; its deadline is read at once, because grpcio counts it from now on."""

    __slots__ = ("_context", "deadline", "owner")

    def __init__(self, context: Context, waited_s: float = 0.0) -> None:
        self._context = context
        self.owner = None if self.metadata(OWNER_KEY) is None else ""
        left_s = context.time_remaining()
        self.deadline = NO_DEADLINE if left_s is None else Deadline.in_s(left_s, waited_s=waited_s)

    @property
    def peer(self) -> str:
        return _peer(self._context)

    @property
    def certificate_names(self) -> tuple[str, ...]:
        (pem,) = self._context.auth_context().get("x509_pem_cert", (b"",))
        return names_of(pem.decode()) if pem else ()

    def metadata(self, key: str) -> str | None:
        for name, value in self._context.invocation_metadata() or ():
            if name == key:
                return value if isinstance(value, str) else value.decode(errors="replace")
        return None


def _peer(context: Context) -> str:
    # The brackets of an address of IPv6 are escaped.
    peer = str(context.peer())
    if peer.startswith("ipv6:"):
        return peer.removeprefix("ipv6:").replace("%5B", "[").replace("%5D", "]")
    return peer.removeprefix("ipv4:")


def _handlers(
    table: MethodTable, max_message_bytes: int, unsent: UnsentAnswers, stalls: StallWatch
) -> Handlers:
    unary: Handlers = {
        # As if the requests were streams. Otherwise grpcio leaves a request without a message unanswered.
        path: grpc.stream_unary_rpc_method_handler(_unary(method, max_message_bytes, unsent, stalls))
        for path, method in table.unary.items()
    }
    streams: Handlers = {
        path: grpc.stream_stream_rpc_method_handler(_stream(method, max_message_bytes))
        for path, method in table.streams.items()
    }
    return unary | streams


def _channel_arguments(table: MethodTable, options: EngineOptions) -> list[tuple[str, int]]:
    return [
        # Otherwise two daemons could listen on one port, and each would get half of its connections.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", _largest_limit(table, options)),
        ("grpc.max_send_message_length", -1),
        # Whether grpcio unpacks what is compressed: see the top of this module.
        ("grpc.per_message_decompression", 0),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.max_concurrent_streams", options.max_streams),
        # Calls that were reset count in both until they are taken up. After a stall they may be thousands,
        # whose deadlines have passed, and grpcio would refuse the calls with time left behind them.
        ("grpc.http.overload_protection", 0),
        ("grpc.server.max_pending_requests", _PENDING),
        ("grpc.server.max_pending_requests_hard_limit", 2 * _PENDING),
        ("grpc.max_allowed_incoming_connections", options.max_connections),
        # From the accept to the client's SETTINGS; 120 s by default.
        ("grpc.server_handshake_timeout_ms", round(options.handshake_timeout_s * 1000)),
        # The client is asked to reconnect, as h2 does.
        ("grpc.max_connection_idle_ms", round(options.max_idle_s * 1000) or _NEVER_MS),
        ("grpc.max_connection_age_ms", round(options.max_age_s * 1000) or _NEVER_MS),
        ("grpc.max_connection_age_grace_ms", round(options.age_grace_s * 1000)),
        # A client whose host has died sends no end, and its connection would stay.
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", round(options.send_timeout_s * 1000)),
        # PING more often than this three times ends the connection with ENHANCE_YOUR_CALM.
        ("grpc.http2.min_ping_interval_without_data_ms", _MIN_PING_MS),
        ("grpc.http2.max_ping_strikes", 2),
    ]


def _largest_limit(table: MethodTable, options: EngineOptions) -> int:
    # grpcio has one limit for all methods; `_check_size` has each method's own.
    unary = (method.max_message_bytes or 0 for method in table.unary.values())
    streams = (method.max_message_bytes or 0 for method in table.streams.values())
    return max(options.max_message_bytes, *unary, *streams)


def _unary(
    method: UnaryMethod, max_message_bytes: int, unsent: UnsentAnswers, stalls: StallWatch
) -> Callable[[AsyncIterator[bytes], Context], Awaitable[bytes]]:
    limit_bytes = method.max_message_bytes or max_message_bytes

    # An adapter for grpcio. Its messages are deserialized: without a deserializer, they are the bytes.
    async def behaviour(_: AsyncIterator[bytes], context: Context) -> bytes:
        peer = _peer(context)
        waited_s = stalls.waited_s()
        try:
            # Before the request is read: what is not read stays with the client.
            await unsent.room(peer, context)
            message = await _checked(await context.read(), limit_bytes)
        except MnemosyneError as exc:
            # `invoke_unary` was not reached, so the call is counted here: `fail` counts it out.
            method.stats.begin()
            await _abort(context, fail(method, _GrpcioCall(context), exc, time.perf_counter()))
        call = _GrpcioCall(context, waited_s)
        outcome = invoke_unary(method, message, call)
        if isinstance(outcome, Coroutine | Later):
            outcome = await outcome
        if call.owner:
            context.set_trailing_metadata(((OWNER_KEY, call.owner),))
        if isinstance(outcome, Failure):
            await _abort(context, outcome)
        try:
            # Others of this connection were answered meanwhile. The pieces are shared; what is joined is not.
            await unsent.room(peer, context)
        except Overloaded as exc:
            await _abort(context, failure_of(exc))
        # Counted before others ask for room, and then joined. Megabytes are copied here and once more by
        # grpcio: one such answer a slice.
        unsent.add(peer, len(outcome) if isinstance(outcome, bytes) else sum(map(len, outcome)), context)
        return outcome if isinstance(outcome, bytes) else await in_turn(partial(b"".join, outcome))

    return behaviour


def _stream(
    method: StreamMethod, max_message_bytes: int
) -> Callable[[AsyncIterator[bytes], Context], Awaitable[None]]:
    limit_bytes = method.max_message_bytes or max_message_bytes

    async def behaviour(messages: AsyncIterator[bytes], context: Context) -> None:
        bounded = _bounded(messages, limit_bytes)
        failure = await invoke_stream(method, bounded, _GrpcioCall(context), context.write)
        if failure is not None:
            await _abort(context, failure)

    return behaviour


async def _bounded(messages: AsyncIterator[bytes], limit_bytes: int) -> AsyncIterator[bytes]:
    async for message in messages:
        yield await _checked(message, limit_bytes)


async def _unpacked(message: bytes, limit_bytes: int) -> bytes:
    try:
        return await in_slices(unpacking_message(message, max_bytes=limit_bytes), size_bytes=len(message))
    except SlicesFull:
        raise Overloaded("mnemosyned: too many large requests are waiting") from None


async def _checked(message: bytes | object, limit_bytes: int) -> bytes:
    if not isinstance(message, bytes):
        # The end, in its place.
        raise Unimplemented("mnemosyned: the method takes exactly one message")
    if is_packed(message):
        message = await _unpacked(message, limit_bytes)
    _check_size(message, limit_bytes)
    return message


def _check_size(message: bytes, limit_bytes: int) -> None:
    if len(message) > limit_bytes:
        raise MessageTooLarge(f"mnemosyned: a message of {len(message)} bytes, over {limit_bytes}")


async def _refuse(context: Context) -> None:
    await _abort(context, refuse(_GrpcioCall(context), Unimplemented(UNKNOWN_METHOD)))


async def _abort(context: Context, failure: Failure) -> NoReturn:
    await context.abort(grpc.StatusCode[failure.code.name], failure.text)
    raise AssertionError("abort always raises")


def _identity(material: TlsMaterial) -> grpc.ServerCertificateConfiguration:
    pair = (material.private_key, material.certificate)
    return grpc.ssl_server_certificate_configuration([pair], root_certificates=material.authorities)


async def _addresses(options: EngineOptions) -> list[str]:
    """Return each address to listen on, with its port: those that the other engine would listen on.

    grpcio resolves names by rules of its own. The ports are free for a moment between the look and its start.

    Raises:
        OSError: an address is in use, or none is this host's.
    """
    if options.host.startswith(UNIX_PREFIX):
        return [options.address]
    sockets = await open_sockets(options.host, options.port)
    found = [host_port(*one.getsockname()[:2]) for one in sockets]
    for one in sockets:
        one.close()
    return found


def _check_socket(path: str) -> None:
    """Raise an OSError if another process listens on the socket: grpcio would take it over."""
    remove_left_socket(path)
    if Path(path).exists():
        raise OSError(os.strerror(errno.EADDRINUSE))


def _reason(exc: Exception) -> str:
    # grpcio's text ends with advice on its own debugging variables; of an error of a socket, its text repeats
    # the address.
    text = (exc.strerror if isinstance(exc, OSError) else None) or str(exc)
    return text.split(";", maxsplit=1)[0].partition(" (while ")[0]
