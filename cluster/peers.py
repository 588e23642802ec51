"""Connections to the other nodes: opened when needed, authenticated, one for gossip apart from one for calls.

    gossip.py   --> Peers.call(GOSSIP) --------> connection 1 --> peer     a packet and its answer
                --> Peers.keep_connected ------> connection 1              tells when it is lost
    forward.py  --> Peers.call(CALLS) ---------> connection 2 --> peer     invalidations
                --> Peers.open_stream ---------> connection 2 --> peer     forwarded calls, in batches

Two connections, because packets of gossip must not wait behind a megabyte of forwarded calls: a member would
look dead because it is busy.

Every failure leaves this module as one of three errors (errors.py):

- PeerUnreachable: there was no connection, or it broke. The host may refuse, so it is worth a dial.
- PeerTimeout: no answer in time. If the connection was silent for SILENCE_S, it is replaced.
- PeerRefused: the peer answered, and does not take this node for one of its cluster.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from aio.tasks import Tasks
from cluster.channel import CallFailed, Channel, ChannelStream, ConnectionLost
from cluster.errors import ClusterError, PeerRefused, PeerTimeout, PeerUnreachable
from cluster.peer_auth import METADATA_KEY, NONCE_BYTES, PeerAuth, StreamMac
from cluster.peerpb import peer_pb2 as pb
from cluster.timing import CHANNEL_GRACE_S, DIAL_TIMEOUT_S, SILENCE_S
from http2.outbox import Headers
from http2.status import StatusCode

SERVICE_NAME: Final = "mnemosynepeer.Peer"
_MAX_CONNECTIONS: Final = 512
# The peer is alive and says no. Everything else may be a broken connection or a peer that is about to end.
_REFUSALS: Final = frozenset({
    StatusCode.UNAUTHENTICATED,
    StatusCode.PERMISSION_DENIED,
    StatusCode.UNIMPLEMENTED,
    StatusCode.RESOURCE_EXHAUSTED,
    StatusCode.FAILED_PRECONDITION,
})  # fmt: skip


class ChannelKind(Enum):
    """Which of the two connections to a peer."""

    GOSSIP = "gossip"
    CALLS = "calls"


class CallStats(Protocol):
    """Where the calls of one method are counted."""

    def begin(self) -> None:
        """Count a call in."""
        ...

    def end(self, code: str, elapsed_s: float) -> None:
        """Count a call out with its gRPC status name."""
        ...


@dataclass(slots=True, eq=False)
class _Connection:
    channel: Channel
    answered_s: float  # when it was opened, or the peer last answered on it


class Peers:
    """The connections to other nodes, by address."""

    def __init__(
        self,
        trust: PeerAuth,
        stats_by_method: Mapping[str, CallStats],
        *,
        server_name: Callable[[str], str] = lambda address: address.rpartition(":")[0],
    ) -> None:
        """`server_name` returns, over TLS, the name that an address's certificate must have."""
        self._trust = trust
        self._stats_by_method = stats_by_method
        self._server_name = server_name
        self._tls: ssl.SSLContext | None = None
        self._connections: dict[tuple[str, ChannelKind], _Connection] = {}
        self._is_closed = False
        self._closing = Tasks("peer_connection_close")

    def identify(self, context: ssl.SSLContext) -> None:
        """Open connections over TLS from now on, with this identity; it verifies the peer's name.

        A channel keeps the identity that it was made with, also when it connects again. Therefore open
        connections finish their calls and close.
        """
        self._tls = context
        for address, channel_kind in list(self._connections):
            self._hang_up(address, channel_kind, grace_s=CHANNEL_GRACE_S)

    async def call(
        self, address: str, method: str, body: bytes, *, timeout_s: float, channel_kind: ChannelKind
    ) -> bytes:
        """Return a peer's answer.

        Raises:
            PeerUnreachable: no connection, or it broke.
            PeerTimeout: no answer in time.
            PeerRefused: the peer does not take this node for one of its cluster.
        """
        metadata = _metadata(self._signature(method, body))
        with self._counted(address, channel_kind, method):
            channel = self._connection(address, channel_kind).channel
            return await channel.call(_path(method), metadata, body, timeout_s=timeout_s)

    def open_stream(self, address: str) -> ForwardStream:
        """Open a stream of forwarded batches to a peer."""
        connection = self._connection(address, ChannelKind.CALLS)
        opening = self._signature("Forward", b"")
        return ForwardStream(
            address,
            connection.channel.open_stream(_path("Forward"), _metadata(opening)),
            self._trust.stream_mac(opening),
            is_current=lambda: self._connections.get((address, ChannelKind.CALLS)) is connection,
            counted=lambda: self._counted(address, ChannelKind.CALLS, "Forward"),
        )

    async def keep_connected(self, address: str, lost: Callable[[], None]) -> None:
        """Keep the gossip connection to a peer open until cancelled; call `lost` each time it is lost."""
        while not self._is_closed:
            await self._connection(address, ChannelKind.GOSSIP).channel.until_lost()
            if not self._is_closed:
                lost()

    def forget(self, address: str) -> None:
        """Close the connections to an address: its node is gone, or is another one now."""
        for channel_kind in ChannelKind:
            self._hang_up(address, channel_kind)

    async def close(self) -> None:
        """Close all connections; calls under way fail."""
        self._is_closed = True
        connections, self._connections = list(self._connections.values()), {}
        closing = self._closing.running()
        await asyncio.gather(*(connection.channel.close() for connection in connections), *closing)

    def _connection(self, address: str, channel_kind: ChannelKind) -> _Connection:
        connection = self._connections.get((address, channel_kind))
        if connection is None:
            if len(self._connections) >= _MAX_CONNECTIONS:
                # The oldest address. If its peer is still there, the next call opens a connection.
                self.forget(next(iter(self._connections))[0])
            # Peers are dialled by address, and their certificates are for names.
            name = self._server_name(address).strip("[]")
            channel = Channel(address, tls=self._tls, server_name=name)
            connection = _Connection(channel, answered_s=time.monotonic())
            self._connections[address, channel_kind] = connection
        return connection

    def _hang_up(self, address: str, channel_kind: ChannelKind, *, grace_s: float = 0.0) -> None:
        """Close a connection in the background; the next call opens another at once."""
        connection = self._connections.pop((address, channel_kind), None)
        if connection is not None:
            self._closing.spawn(connection.channel.close(grace_s))

    @contextmanager
    def _counted(self, address: str, channel_kind: ChannelKind, method: str) -> Iterator[None]:
        """Count what is awaited inside, and raise its failure as one of this package's errors."""
        stats = self._stats_by_method[method]
        stats.begin()
        started_s, code = time.perf_counter(), StatusCode.CANCELLED
        try:
            yield
            code = StatusCode.OK
            self._connection(address, channel_kind).answered_s = time.monotonic()
        except CallFailed as exc:
            code = exc.code
            if code is StatusCode.DEADLINE_EXCEEDED:
                self._doubt(address, channel_kind)
            raise _translated(exc) from None
        except TimeoutError:
            code = StatusCode.DEADLINE_EXCEEDED
            self._doubt(address, channel_kind)
            raise PeerTimeout("no answer in time") from None
        except ConnectionLost as exc:
            code = StatusCode.UNAVAILABLE
            raise PeerUnreachable(str(exc)) from None
        finally:
            stats.end(code.name, time.perf_counter() - started_s)

    def _doubt(self, address: str, channel_kind: ChannelKind) -> None:
        """Replace a connection on which nothing came for a while.

        After a loss of packets TCP waits longer before each repetition, up to minutes. A new connection works
        as soon as the network does.
        """
        connection = self._connections.get((address, channel_kind))
        if connection is not None and time.monotonic() - connection.answered_s > SILENCE_S:
            self._hang_up(address, channel_kind)

    def _signature(self, method: str, body: bytes) -> str:
        now_ms = time.time_ns() // 1_000_000
        return self._trust.sign(method, body, now_ms=now_ms, nonce=os.urandom(NONCE_BYTES))


class ForwardStream:
    """A stream to one peer, on which each batch is answered before the next is sent.

    A stream costs half of what one call for each batch costs: its headers and its signature are sent once.
    The messages have no numbers, so a stream whose answer was not read cannot be used again: it would give
    one batch the answers of another. `ask` closes it after any failure.
    """

    def __init__(
        self,
        address: str,
        stream: ChannelStream,
        stream_mac: StreamMac,
        *,
        is_current: Callable[[], bool],
        counted: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """`is_current` tells whether the stream's connection is still in use, and not about to be closed.

        `counted` counts what is awaited inside, and raises its failure as one of this package's errors.
        """
        self.address = address
        self._stream = stream
        self._stream_mac = stream_mac
        self._is_current = is_current
        self._counted = counted

    @property
    def is_open(self) -> bool:
        """Whether the peer, as far as is known, waits for a batch."""
        return self._stream.is_open and self._is_current()

    async def ask(self, batch: bytes, *, timeout_s: float) -> bytes:
        """Return the peer's answer to a serialized Batch; after a failure the stream is closed.

        Raises:
            PeerUnreachable: no connection, or it broke, or the peer ended the stream.
            PeerTimeout: no answer in time.
            PeerRefused: the peer does not take this node for one of its cluster.
        """
        request = pb.ForwardRequest(batch=batch, seal=self._stream_mac.seal(batch)).SerializeToString()
        with self._counted():
            return await self._stream.ask(request, timeout_s=timeout_s)

    def end(self) -> None:
        """Close the stream; no batch is under way on it."""
        self._stream.finish()


async def is_refused(address: str) -> bool:
    """Dial an address; tell whether its host says that no process listens there.

    A host that is down, or a network that drops packets, gives no answer. That proves nothing.
    """
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError):
        return False
    writer.close()
    return False


def _path(method: str) -> bytes:
    return f"/{SERVICE_NAME}/{method}".encode()


def _metadata(signature: str) -> Headers:
    return [(METADATA_KEY.encode(), signature.encode())] if signature else []


def _translated(exc: CallFailed) -> ClusterError:
    if exc.code is StatusCode.DEADLINE_EXCEEDED:
        return PeerTimeout("no answer in time")
    if exc.code in _REFUSALS:
        return PeerRefused(str(exc))
    return PeerUnreachable(f"{exc.code.name}: {exc}")
