"""The engine on grpc.aio, the reference: a call costs it about 14 times the CPU of the default engine.

It is a second implementation: what both engines answer alike in the tests is unlikely to be a quirk of one of
them. It also is the way back, if a client does not get on with the default engine, and it runs where zttp has
no wheel.

grpcio does the HTTP/2, the framing, the compression and the deadline's header. This module translates. Where
grpcio differs from the port's ideal:

- It has one limit for the size of messages, for all methods. The largest limit of any method is given to it,
  and each method's own limit is checked once the message is in memory.
- It knows `-tls.client-auth` none and require, not optional (transport/config.py refuses that at the start).
- It has no limit of connections for an address, or of the bytes of requests that are not complete.
- It does not tell how many connections are open.
- It asks for the certificate at each handshake. New TLS files thus need no new server, and connections with
  the former certificate stay open.
- A handler that fails ends by `context.abort`, which raises: what follows in the function is never reached.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Final, NoReturn

import grpc

from aio.deadline import NO_DEADLINE, Deadline
from mnemosyned.errors import MessageTooLarge, Unimplemented
from mnemosyned.security.certificates import names_of
from mnemosyned.security.file_reloader import FilesUnusable
from mnemosyned.security.tls import ClientAuth, TlsMaterial
from mnemosyned.transport.acceptor import remove_left_socket
from mnemosyned.transport.call import (
    UNKNOWN_METHOD,
    Failure,
    fail,
    invoke_stream,
    invoke_unary,
    refuse,
)
from mnemosyned.transport.engine import (
    MAX_METADATA_BYTES,
    UNIX_PREFIX,
    EngineOptions,
    ListenFailed,
)
from mnemosyned.transport.grpcio_server import Handlers, RegisteredServer
from mnemosyned.transport.methods import MethodTable, StreamMethod, UnaryMethod

_IDLE_MS: Final = 600_000
_KEEPALIVE_MS: Final = 60_000
_MIN_PING_MS: Final = 5_000
_NEVER_MS: Final = 2**31 - 1

# grpc.aio's generic classes take their type arguments only in the stubs.
Context = Any


def _is_not_of_metadata(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Invalid encoding")


class GrpcioEngine:
    """Engine on grpc.aio; one server, which keeps its certificate in a variable that handshakes read."""

    def __init__(self, table: MethodTable, options: EngineOptions) -> None:
        self._options = options
        self._identity: grpc.ServerCertificateConfiguration | None = None
        self._server = RegisteredServer(
            _channel_arguments(table, options), _handlers(table, options.max_message_bytes), _refuse
        )

    async def start(self) -> int:
        """See Engine."""
        # It logs metadata that is not UTF-8, byte for byte and with a traceback. A token may be in it.
        logging.getLogger("grpc._cython.cygrpc").addFilter(_is_not_of_metadata)
        options = self._options
        try:
            if options.host.startswith(UNIX_PREFIX):
                _check_socket(options.host.removeprefix(UNIX_PREFIX))
            if options.tls is None:
                port = self._server.add_insecure_port(options.address)
            else:
                port = self._server.add_secure_port(options.address, self._credentials(options.tls.read()))
        except (RuntimeError, OSError, FilesUnusable) as exc:
            raise ListenFailed(f"cannot listen on {options.address}: {_reason(exc)}") from exc
        await self._server.start()
        return port

    async def reload_tls(self, material: TlsMaterial) -> None:
        """See Engine."""
        self._identity = _identity(material)

    async def drain(self) -> None:
        """See Engine."""
        await self._server.stop(self._options.drain_timeout_s)
        await self._server.close_refusals()

    def _credentials(self, material: TlsMaterial) -> grpc.ServerCredentials:
        self._identity = identity = _identity(material)
        is_required = material.client_auth is ClientAuth.REQUIRE
        # grpcio calls the second argument at each handshake.
        return grpc.dynamic_ssl_server_credentials(identity, lambda: self._identity or identity, is_required)


class _GrpcioCall:
    """Call on a servicer context; its deadline is read at once, because grpcio counts it from now on."""

    __slots__ = ("_context", "deadline")

    def __init__(self, context: Context) -> None:
        self._context = context
        left_s = context.time_remaining()
        self.deadline = NO_DEADLINE if left_s is None else Deadline.in_s(left_s)

    @property
    def peer(self) -> str:
        return str(self._context.peer()).removeprefix("ipv4:").removeprefix("ipv6:")

    @property
    def certificate_names(self) -> tuple[str, ...]:
        (pem,) = self._context.auth_context().get("x509_pem_cert", (b"",))
        return names_of(pem.decode()) if pem else ()

    def metadata(self, key: str) -> str | None:
        for name, value in self._context.invocation_metadata() or ():
            if name == key:
                return value if isinstance(value, str) else value.decode(errors="replace")
        return None


def _handlers(table: MethodTable, max_message_bytes: int) -> Handlers:
    unary: Handlers = {
        path: grpc.unary_unary_rpc_method_handler(_unary(method, max_message_bytes))
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
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.max_concurrent_streams", options.max_streams),
        ("grpc.max_allowed_incoming_connections", options.max_connections),
        # From the accept to the client's SETTINGS; 120 s by default.
        ("grpc.server_handshake_timeout_ms", round(options.handshake_timeout_s * 1000)),
        # The client is asked to reconnect, as h2 does.
        ("grpc.max_connection_idle_ms", _IDLE_MS),
        ("grpc.max_connection_age_ms", round(options.max_age_s * 1000) or _NEVER_MS),
        ("grpc.max_connection_age_grace_ms", round(options.drain_timeout_s * 1000)),
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


def _unary(method: UnaryMethod, max_message_bytes: int) -> Callable[[bytes, Context], Awaitable[bytes]]:
    limit_bytes = method.max_message_bytes or max_message_bytes

    # An adapter for grpcio, which calls it with the deserialized message: without a deserializer, the bytes.
    async def behaviour(message: bytes, context: Context) -> bytes:
        call = _GrpcioCall(context)
        try:
            _check_size(message, limit_bytes)
        except MessageTooLarge as exc:
            # `invoke_unary` was not reached, so the call is counted here: `fail` counts it out.
            method.stats.begin()
            await _abort(context, fail(method, call, exc, time.perf_counter()))
        outcome = invoke_unary(method, message, call)
        if isinstance(outcome, Coroutine):
            outcome = await outcome
        if isinstance(outcome, Failure):
            await _abort(context, outcome)
        return outcome if isinstance(outcome, bytes) else b"".join(outcome)

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
        _check_size(message, limit_bytes)
        yield message


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


def _check_socket(path: str) -> None:
    """Raise an OSError if another process listens on the socket: grpcio would take it over."""
    remove_left_socket(path)
    if Path(path).exists():
        raise OSError(os.strerror(errno.EADDRINUSE))


def _reason(exc: Exception) -> str:
    # grpcio's text ends with advice on its own debugging variables.
    return str(exc).split(";", maxsplit=1)[0]
