"""A call through a gRPC port as a client makes it: a new connection, and one call of the health service.

Nothing short of it tells that calls are answered. A port that listens may accept no connection, and an
accepted connection may be served by an event loop that is stalled.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from typing import Final

from http2.client import ClientConnection, ClientStream
from http2.messages import framed

_PATH: Final = b"/grpc.health.v1.Health/Check"
_HEADERS: Final = [(b"host", b"localhost"), (b"content-type", b"application/grpc"), (b"te", b"trailers")]
_READ_BYTES: Final = 65_536


class NotAnswered(Exception):
    """The port did not answer the call; the text says how, for people."""


class Refused(NotAnswered):
    """The port took the connection and closed it without an answer, as at the limit of connections."""


class Untrusted(Refused):
    """The port answered that it does not accept this node's certificate as a client's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a port can be reached from this host; with `unix_path`, at a socket in the file system."""

    host: str = ""
    port: int = 0
    unix_path: str = ""
    tls: ssl.SSLContext | None = None


class _News:
    """What `ClientConnection` tells of a stream: `receive` returns the same, so nothing is noted here."""

    def take_news(self, stream: ClientStream) -> None:
        pass


async def check(target: Target, *, timeout_s: float) -> None:
    """Make one call, within the time.

    An answer of any status counts: whether the node wants calls is asked elsewhere.

    Raises:
        NotAnswered: no connection, or no answer in time.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await _call(target)
    except TimeoutError:
        raise NotAnswered(f"no answer within {timeout_s:g} s") from None
    except ssl.SSLError as exc:
        raise Untrusted(f"our certificate is refused: {exc.reason}") from None
    except ConnectionRefusedError as exc:
        raise NotAnswered(exc.strerror or "connection refused") from None
    except OSError as exc:
        raise Refused(exc.strerror or type(exc).__name__) from None


async def _call(target: Target) -> None:
    reader, writer = await _connect(target)
    try:
        connection = ClientConnection()
        stream = connection.open(_PATH, _HEADERS, _News())
        connection.send(stream, framed(b""), 0.0)
        connection.finish(stream)
        has_spoken = False
        while not (stream.is_complete or stream.status):
            writer.write(connection.output(0.0))
            chunk = await reader.read(_READ_BYTES)
            if not chunk and target.tls is not None and not has_spoken:
                # A full port closes before the handshake; one that refuses a certificate closes after it.
                raise Untrusted("our certificate is refused")
            if not chunk:
                raise Refused("the connection was closed")
            has_spoken = True
            connection.receive(chunk)
            if stream.reset_code is not None or connection.is_over:
                raise Refused("the call was refused")
    finally:
        writer.transport.abort()


async def _connect(target: Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    name = None if target.tls is None else "localhost"
    if target.unix_path:
        return await asyncio.open_unix_connection(target.unix_path, ssl=target.tls, server_hostname=name)
    return await asyncio.open_connection(target.host, target.port, ssl=target.tls, server_hostname=name)
