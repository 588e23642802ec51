"""The engine port: something that serves a method table as gRPC over HTTP/2.

    client ── HTTP/2 ──> engine ── Call, message ──> invoke_unary / invoke_stream (call.py) ──> handler
                            ^                             |
                            └────── bytes or Failure ─────┘

What gRPC requires of an engine (https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md):

- The path is `/package.Service/Method`. A path that the table does not have is UNIMPLEMENTED, as a gRPC
  status on HTTP status 200.
- The content type begins with `application/grpc`. Anything else is no gRPC call and gets HTTP status 415.
- A message is framed: one byte of flags and four of length (frame.py). It may be compressed.
- `grpc-timeout` counts from the arrival of the call. The engine turns it into `Call.deadline`; `invoke_…`
  enforces it.
- The status is in the trailers. A failure without a message may put it into the one block of headers.
- A client that resets its stream, or whose connection breaks, cancels its call: the engine cancels the task.

What the daemon requires besides:

- Each message of a request is held to the limit of its method before it is held in memory as a whole, or as
  soon as the engine allows.
- Two daemons never share a port: the second one's `start` fails.
- `drain` refuses new connections before it waits for calls in flight.
- New TLS files are served without closing the listener, so that no connection is refused.
- Names in a client's certificate reach the call only if one of our authorities has signed it.

Two engines implement the port, and one suite of tests runs on both (tests/contract). What they do alike is
in call.py, so that counting, logging and statuses cannot differ.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from mnemosyned.security.tls import TlsFiles, TlsMaterial

if TYPE_CHECKING:
    from mnemosyned.transport.turns import Turns

# All of a call's metadata. A token of 4,096 bytes travels in it (`Context`), beside headers that proxies and
# tracing add. Without a limit a client could fill the memory before any handler sees its call.
MAX_METADATA_BYTES: Final = 32 * 1024

# Before the path of a Unix socket, where a host name could stand.
UNIX_PREFIX: Final = "unix:"
# What `Call.peer` is for a caller that has come through one, with h2.
UNIX_PEER: Final = "unix"

# For SO_LINGER: what waits in the kernel is dropped with the connection. A client that does not read would
# otherwise keep megabytes there after its end.
NO_LINGER: Final = struct.pack("ii", 1, 0)


class ListenFailed(Exception):
    """The address cannot be listened on; the text is one line for people, and names the address."""


@dataclass(slots=True)
class ConnectionStats:
    """What the connections of an engine have done; only h2 counts them."""

    open: int = 0
    unsent_bytes: int = 0  # of answers that clients have not taken
    ended: Counter[str] = field(default_factory=Counter)  # by reason, which is one of a few words
    accept_failures: Counter[str] = field(default_factory=Counter)  # by the name of the error


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What both engines need; sizes in bytes, times in seconds."""

    host: str
    port: int  # 0: any free port
    max_message_bytes: int  # of a request, where its method has no limit of its own
    max_streams: int  # calls on one connection at once; the client holds further ones back
    max_connections: int  # further ones are closed at once
    max_connections_per_address: int = 0  # 0: no limit of their own
    drain_timeout_s: float
    max_age_s: float = 0.0  # of a connection, give or take a tenth; 0: no limit
    age_grace_s: float = 10.0  # then for its calls in flight
    max_idle_s: float = 600.0  # of a connection without a call; 0: no limit
    handshake_timeout_s: float = 10.0  # for TLS, and then for the beginning of HTTP/2
    send_timeout_s: float = 20.0  # in which a client must take something of what waits for it
    max_unsent_bytes: int = 128 * 1024**2  # answers that clients have not taken, over all connections
    max_unsent_bytes_per_connection: int = 1024**2  # beyond which its further requests wait
    max_request_bytes: int = 128 * 1024**2  # requests that are not complete, over all connections
    max_request_bytes_per_connection: int = 64 * 1024**2
    stats: ConnectionStats = field(default_factory=ConnectionStats)
    tls: TlsFiles | None = None  # they have been read once, and were valid
    listeners: tuple[int, ...] = ()  # files of sockets that listen already, shared with siblings (h2 alone)
    turns: Turns | None = None  # which of the processes that share them accepts

    @property
    def address(self) -> str:
        """What to listen on."""
        return host_port(self.host, self.port)


def host_port(host: str, port: int) -> str:
    """Join a host and a port, IPv6 in brackets. A Unix socket has no port."""
    if host.startswith(UNIX_PREFIX):
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Engine(Protocol):
    """A gRPC server; used once, from `start` to `drain`, on one event loop."""

    async def start(self) -> int:
        """Listen, and serve calls from now on; return the port.

        Raises:
            ListenFailed: the address is in use or not this host's, or the TLS files are invalid.
        """
        ...

    async def reload_tls(self, material: TlsMaterial) -> None:
        """Serve new connections with what the TLS files hold now.

        Connections that are open keep the former certificate.

        Raises:
            FilesUnusable: the files have changed once more since they were read, and are invalid. The former
                certificate is still served.
        """
        ...

    async def drain(self) -> None:
        """Refuse new calls, let those in flight finish, and cancel what is left after `drain_timeout_s`.

        Raises nothing: the daemon has further steps after this one.
        """
        ...
