"""The engine on h2corn: HTTP/2 in Rust, gRPC here. The default.

h2corn calls `_app`, an ASGI application, with one task for each request. A request passes these steps:

    receive() ──> frame.only_message: the whole message in one piece, the usual case
              └─> FrameReader: in pieces, compressed, or damaged
              ──> invoke_unary (call.py) ──> send(start), send(body), send(trailers)

- h2corn cancels a request's task when its client disconnects or resets the stream.
- h2corn sends trailers only to clients that announce `te: trailers`, as every gRPC client must.
- A failure is sent as one block of headers, which gRPC calls Trailers-Only.

Another transport will replace this engine; engine.py is the port that it implements.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import h2corn

from aio.deadline import NO_DEADLINE, Deadline
from mnemosyned.errors import MnemosyneError, Unimplemented
from mnemosyned.security.certificates import names_of
from mnemosyned.security.file_reloader import FilesUnusable
from mnemosyned.security.tls import ClientAuth, TlsFiles, TlsMaterial
from mnemosyned.transport import frame
from mnemosyned.transport.call import ClientGone, Failure, fail, invoke_stream, invoke_unary, refuse
from mnemosyned.transport.engine import (
    MAX_METADATA_BYTES,
    EngineOptions,
    ListenFailed,
    host_port,
)
from mnemosyned.transport.methods import MethodTable, StreamMethod, UnaryMethod

log = logging.getLogger(__name__)

# ASGI's own types; h2corn's are narrower than what an application may rely on.
Scope = Any
Receive = Any
Send = Any
Event = Any

_GRPC: Final = b"application/grpc"
_CONTENT_TYPE: Final = (b"content-type", _GRPC)
_OK_START: Final = {
    "type": "http.response.start",
    "status": 200,
    "headers": [_CONTENT_TYPE],
    "trailers": True,
}
_OK_TRAILERS: Final = {"type": "http.response.trailers", "headers": [(b"grpc-status", b"0")]}
_END: Final = {"type": "http.response.body", "body": b"", "more_body": False}
# A client that stops in the middle of its message must not hold a task without limit.
_BODY_IDLE_S: Final = 60.0
_RESPONSE_STALL_S: Final = 60.0
_KEEP_ALIVE_S: Final = 600.0
_BACKLOG: Final = 1024
_CERT_REQS: Final = {
    ClientAuth.NONE: "none",
    ClientAuth.OPTIONAL: "optional",
    ClientAuth.REQUIRE: "required",
}


class H2cornEngine:
    """Engine on h2corn.

    A server of h2corn keeps the certificate that it began with. A new certificate is served by a new server
    on the same listener, while the former server finishes its calls.
    """

    def __init__(self, table: MethodTable, options: EngineOptions) -> None:
        self._table = table
        self._options = options
        self._listener: socket.socket | None = None
        self._server: h2corn.Server | None = None
        # Owned by this engine until `drain`: the tasks of the current server and of former ones.
        self._serving: set[asyncio.Task[None]] = set()

    async def start(self) -> int:
        """See Engine."""
        address = self._options.address
        try:
            self._listener = await _listener(self._options)
        except OSError as exc:
            raise ListenFailed(f"cannot listen on {address}: {exc.strerror or exc}") from exc
        try:
            self._server = await self._serve(self._listener)
        except (OSError, ValueError) as exc:
            self._listener.close()
            raise ListenFailed(f"cannot listen on {address}: {exc}") from exc
        return int(self._listener.getsockname()[1])

    async def reload_tls(self, material: TlsMaterial) -> None:
        """See Engine."""
        former = self._server
        assert self._listener is not None
        assert former is not None
        try:
            # The new server reads the files itself, and they may have changed once more.
            self._server = await self._serve(self._listener)
        except (OSError, ValueError) as exc:
            raise FilesUnusable(str(exc)) from exc
        former.shutdown()
        log.debug("tls_generation", extra={"expires_at": round(material.expires_at_s)})

    async def drain(self) -> None:
        """See Engine."""
        if self._server is None or self._listener is None:
            return
        self._server.shutdown()
        # h2corn keeps its copy of the socket open while it drains, and the kernel would go on accepting
        # connections for it. After a shutdown the socket refuses connections, whichever copies are open.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        await asyncio.gather(*self._serving)

    async def _serve(self, listener: socket.socket) -> h2corn.Server:
        server = h2corn.Server(self._app, _config(self._options, listener.fileno()))
        serving = asyncio.create_task(_served(server))
        self._serving.add(serving)
        serving.add_done_callback(self._serving.discard)
        try:
            await server.wait_started()
        except asyncio.CancelledError:
            # The daemon stops while it reloads: `drain` does not know this server.
            server.shutdown()
            raise
        return server

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = _H2cornCall(scope)
        method = self._table.unary.get(scope["path"])
        try:
            if method is None or not (call.is_grpc_type and call.takes_trailers):
                await self._handle_other(call, receive, send)
                return
            outcome = await self._handle_unary(method, call, receive)
            if isinstance(outcome, Failure):
                await _send_failure(send, outcome)
                return
            await send(_OK_START)
            await send({"type": "http.response.body", "body": frame.framed(outcome), "more_body": False})
            await send(_OK_TRAILERS)
        except (OSError, ClientGone):
            # The client has closed the stream and waits for nothing.
            log.debug("client_gone", extra={"peer": call.peer})

    async def _handle_unary(
        self, method: UnaryMethod, call: _H2cornCall, receive: Receive
    ) -> bytes | Failure:
        event = await receive()
        # Most clients end their stream in a separate HTTP/2 frame. A whole message need not wait for that
        # frame: waiting costs a task switch, a fifth of the call.
        message = frame.only_message(event.get("body", b""))
        limit_bytes = method.max_message_bytes or self._options.max_message_bytes
        if message is None or len(message) > limit_bytes:
            started_s = time.perf_counter()
            body = await _body(event, receive, frame.HEADER_BYTES + limit_bytes)
            try:
                message = _only_message(body, _frame_reader(call, limit_bytes))
            except MnemosyneError as exc:
                method.stats.begin()
                return fail(method, call, exc, started_s)
        return await invoke_unary(method, message, call)

    async def _handle_other(self, call: _H2cornCall, receive: Receive, send: Send) -> None:
        stream = self._table.streams.get(call.path)
        if not call.is_grpc_type:
            await _send_unsupported(send)
        elif not call.takes_trailers:
            exc = Unimplemented("mnemosyned: the request lacks `te: trailers`")
            await _send_failure(send, refuse(call.path, call, exc))
        elif stream is None:
            exc = Unimplemented(f"mnemosyned: unknown method {call.path[:200]}")
            await _send_failure(send, refuse(call.path, call, exc))
        else:
            await self._handle_stream(stream, call, receive, send)

    async def _handle_stream(
        self, method: StreamMethod, call: _H2cornCall, receive: Receive, send: Send
    ) -> None:
        limit_bytes = method.max_message_bytes or self._options.max_message_bytes
        messages = _messages(_frame_reader(call, limit_bytes), receive)
        has_begun = False

        async def send_message(message: bytes) -> None:
            nonlocal has_begun
            try:
                if not has_begun:
                    has_begun = True
                    await send(_OK_START)
                await send({"type": "http.response.body", "body": frame.framed(message), "more_body": True})
            except OSError:
                # The client has closed the stream.
                raise ClientGone from None

        failure = await invoke_stream(method, messages, call, send_message)
        if failure is not None and not has_begun:
            await _send_failure(send, failure)
            return
        if not has_begun:
            await send(_OK_START)
        await send(_END)
        trailers = [(b"grpc-status", b"0")] if failure is None else _status_headers(failure)
        await send({"type": "http.response.trailers", "headers": trailers})


async def _served(server: h2corn.Server) -> None:
    try:
        await server.serve()
    except RuntimeError as exc:
        log.warning("drain_incomplete", extra={"error": str(exc)})
    except (OSError, ValueError) as exc:
        # `wait_started` has raised it too, and `start` or `reload_tls` reports it.
        log.debug("not_started", extra={"error": str(exc)})


async def _body(event: Event, receive: Receive, max_bytes: int) -> bytes:
    """Return the whole body of a request, or its beginning if it is longer than `max_bytes`.

    Raises:
        ClientGone: the client disconnected before the body was complete.
    """
    body = bytearray(event.get("body", b""))
    while event.get("more_body") and frame.announced_bytes(body) <= max_bytes:
        event = await receive()
        body += event.get("body", b"")
    if event["type"] == "http.disconnect":
        raise ClientGone
    return bytes(body)


def _only_message(body: bytes, reader: frame.FrameReader) -> bytes:
    """Return the one message of a body. Raises what is wrong with it, as `FrameReader` does."""
    messages = reader.feed(body)
    reader.end()
    if len(messages) != 1:
        raise Unimplemented("mnemosyned: the method takes exactly one message")
    return messages[0]


def _frame_reader(call: _H2cornCall, max_message_bytes: int) -> frame.FrameReader:
    encoding = call.header(b"grpc-encoding") or b""
    return frame.FrameReader(encoding=encoding, max_message_bytes=max_message_bytes)


class _H2cornCall:
    """Call on an ASGI scope. Headers are read when they are asked for: most calls need one or two."""

    __slots__ = ("_arrived_s", "_scope")

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._arrived_s = time.monotonic()

    @property
    def path(self) -> str:
        return str(self._scope["path"])

    @property
    def is_grpc_type(self) -> bool:
        value = self.header(b"content-type")
        if value == _GRPC:
            return True
        return value is not None and value.lower().startswith((_GRPC + b"+", _GRPC + b";"))

    @property
    def takes_trailers(self) -> bool:
        return "http.response.trailers" in self._scope["extensions"]

    @property
    def peer(self) -> str:
        host, port = self._scope.get("client") or ("", 0)
        return host_port(host, port)

    def header(self, wanted: bytes) -> bytes | None:
        for name, value in self._scope["headers"]:
            if name == wanted:
                found: bytes = value
                return found
        return None

    @property
    def deadline(self) -> Deadline:
        value = self.header(b"grpc-timeout")
        return NO_DEADLINE if value is None else Deadline(self._arrived_s + frame.timeout_s(value))

    @property
    def certificate_names(self) -> tuple[str, ...]:
        tls = self._scope["extensions"].get("tls")
        chain = tls["client_cert_chain"] if tls is not None else ()
        return names_of(chain[0]) if chain else ()

    def metadata(self, key: str) -> str | None:
        value = self.header(key.encode())
        return None if value is None else value.decode(errors="replace")


async def _messages(reader: frame.FrameReader, receive: Receive) -> AsyncIterator[bytes]:
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise ClientGone
        for message in reader.feed(event.get("body", b"")):
            yield message
        if not event.get("more_body"):
            reader.end()
            return


def _status_headers(failure: Failure) -> list[tuple[bytes, bytes]]:
    return [
        (b"grpc-status", str(failure.code.value[0]).encode()),
        (b"grpc-message", frame.status_message(failure.text)),
    ]


async def _send_failure(send: Send, failure: Failure) -> None:
    await send(_failure_start(failure))
    await send(_END)


# Most failures are alike, and may come in floods. The cache holds texts of errors, hence its bound.
@lru_cache(maxsize=64)
def _failure_start(failure: Failure) -> Event:
    # gRPC's Trailers-Only form: a single block of headers.
    headers = [
        _CONTENT_TYPE,
        *_status_headers(failure),
        (b"grpc-accept-encoding", frame.ACCEPTED_ENCODINGS),
    ]
    return {"type": "http.response.start", "status": 200, "headers": headers}


async def _send_unsupported(send: Send) -> None:
    headers = [(b"content-type", b"text/plain"), (b"accept-post", _GRPC)]
    await send({"type": "http.response.start", "status": 415, "headers": headers})
    text = b"mnemosyned speaks gRPC here; its admin pages are on the next port\n"
    await send({"type": "http.response.body", "body": text, "more_body": False})


async def _listener(options: EngineOptions) -> socket.socket:
    found = await asyncio.get_running_loop().getaddrinfo(
        options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    family, _, _, _, address = found[0]
    is_dual = family is socket.AF_INET6 and socket.has_dualstack_ipv6()
    return socket.create_server(address, family=family, backlog=_BACKLOG, dualstack_ipv6=is_dual)


def _config(options: EngineOptions, listener_fd: int) -> h2corn.Config:
    policy = h2corn.RequestPolicy(
        path="/*",
        # The limit of a message is enforced here, with gRPC's own status.
        max_request_body_size=0,
        timeout_request_body_idle=_BODY_IDLE_S,
        h2_timeout_response_stall=_RESPONSE_STALL_S,
    )
    return h2corn.Config(
        bind=(f"fd://{listener_fd}",),
        grpc=True,
        # With HTTP/1, `curl` would get a readable answer. But h2corn's HTTP/1 accepts `Upgrade: h2c`, which
        # cannot be turned off: it leads around a proxy that filters HTTP/1 only. Also, a client that sends
        # the head of a request byte by byte holds a connection for longer than an HTTP/2 preface may take.
        http1=False,
        # A second thread only contends for Python's lock: with it a cached Get cost 20 % more.
        runtime_threads=1,
        lifespan="off",
        access_log=False,
        date_header=False,
        log_format="json" if options.log_as_json else "text",
        max_concurrent_streams=options.max_streams,
        limit_connections=options.max_connections,
        h2_max_header_list_size=MAX_METADATA_BYTES,
        h2_max_header_block_size=MAX_METADATA_BYTES,
        request_policies=(policy,),
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=options.drain_timeout_s,
        **_tls(options.tls),
    )


def _tls(files: TlsFiles | None) -> dict[str, Any]:
    if files is None:
        return {}
    asked = {} if files.client_auth is ClientAuth.NONE else {"ca_certs": Path(files.authorities)}
    return {
        "certfile": Path(files.certificate),
        "keyfile": Path(files.private_key),
        "cert_reqs": _CERT_REQS[files.client_auth],
        **asked,
    }
