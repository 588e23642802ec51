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
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, Protocol

import grpc

from aio.tasks import Tasks
from cluster.errors import ClusterError, PeerRefused, PeerTimeout, PeerUnreachable
from cluster.peer_auth import METADATA_KEY, NONCE_BYTES, PeerAuth, StreamMac
from cluster.peerpb import peer_pb2 as pb
from cluster.timing import CHANNEL_GRACE_S, DIAL_TIMEOUT_S, SILENCE_S

SERVICE_NAME: Final = "mnemosynepeer.Peer"
_MAX_RESPONSE_BYTES: Final = 64 * 1024**2
_OPTIONS: Final = (
    # Without this, two channels to one address share a connection, and gossip waits behind calls.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", _MAX_RESPONSE_BYTES),
    ("grpc.max_send_message_length", -1),
    # A call that failed goes to the storage. Sent again, it would only take the caller's time.
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    # A restarted peer is back within a second, perhaps at another address.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
)
_MAX_CONNECTIONS: Final = 512
_END_TIMEOUT_S: Final = 0.2
# The peer is alive and says no. Everything else may be a broken connection or a peer that is about to end.
_REFUSALS: Final = frozenset({
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.FAILED_PRECONDITION,
})  # fmt: skip


class ChannelKind(Enum):
    """Which of the two connections to a peer."""

    GOSSIP = "gossip"
    CALLS = "calls"


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsIdentity:
    """With what nodes dial one another over TLS, all in PEM."""

    certificate: bytes
    private_key: bytes = field(repr=False)
    authorities: bytes | None  # None: those that grpcio knows

    def credentials(self) -> grpc.ChannelCredentials:
        """Return it as grpcio wants it."""
        return grpc.ssl_channel_credentials(self.authorities, self.private_key, self.certificate)


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
    channel: Any  # grpc.aio.Channel; its stubs are partial
    answered_s: float  # when it was opened, or the peer last answered on it
    callables: dict[str, Any] = field(default_factory=dict)  # by method; grpcio builds them slowly


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
        self._credentials: grpc.ChannelCredentials | None = None
        self._connections: dict[tuple[str, ChannelKind], _Connection] = {}
        self._is_closed = False
        self._closing = Tasks("peer_connection_close")

    def identify(self, identity: TlsIdentity) -> None:
        """Open connections over TLS from now on, with this identity.

        A channel keeps the identity that it was made with, also when it connects again. Therefore open
        connections finish their calls and close.
        """
        self._credentials = identity.credentials()
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
            call = self._callable(address, channel_kind, method)
            return bytes(await call(body, timeout=timeout_s, metadata=metadata))

    def open_stream(self, address: str) -> ForwardStream:
        """Open a stream of forwarded batches to a peer."""
        connection = self._connection(address, ChannelKind.CALLS)
        opening = self._signature("Forward", b"")
        call = connection.channel.stream_stream(_path("Forward"))(metadata=_metadata(opening))
        return ForwardStream(
            address,
            call,
            self._trust.stream_mac(opening),
            is_current=lambda: self._connections.get((address, ChannelKind.CALLS)) is connection,
            counted=lambda: self._counted(address, ChannelKind.CALLS, "Forward"),
        )

    async def keep_connected(self, address: str, lost: Callable[[], None]) -> None:
        """Keep the gossip connection to a peer open until cancelled; call `lost` each time it is lost."""
        while not self._is_closed:
            channel = self._connection(address, ChannelKind.GOSSIP).channel
            state = channel.get_state(try_to_connect=True)
            # A channel that is closed meanwhile raises, and the next turn opens another.
            with suppress(grpc.aio.BaseError):
                await channel.wait_for_state_change(state)
            if state == grpc.ChannelConnectivity.READY:
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
            connection = _Connection(self._channel(address), answered_s=time.monotonic())
            self._connections[address, channel_kind] = connection
        return connection

    def _channel(self, address: str) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(address, options=_OPTIONS)
        # Peers are dialled by address, and their certificates are for names.
        name = self._server_name(address).strip("[]")
        options = (*_OPTIONS, ("grpc.ssl_target_name_override", name))
        return grpc.aio.secure_channel(address, self._credentials, options=options)

    def _callable(self, address: str, channel_kind: ChannelKind, method: str) -> Any:  # noqa: ANN401  # grpcio's own type is private
        connection = self._connection(address, channel_kind)
        found = connection.callables.get(method)
        if found is None:
            found = connection.callables[method] = connection.channel.unary_unary(_path(method))
        return found

    def _hang_up(self, address: str, channel_kind: ChannelKind, *, grace_s: float | None = None) -> None:
        """Close a connection in the background; the next call opens another at once."""
        connection = self._connections.pop((address, channel_kind), None)
        if connection is not None:
            self._closing.spawn(connection.channel.close(grace_s))

    @contextmanager
    def _counted(self, address: str, channel_kind: ChannelKind, method: str) -> Iterator[None]:
        """Count what is awaited inside, and raise its failure as one of this package's errors.

        grpcio raises CancelledError both when this task is cancelled and when the channel under a call is
        closed. Only the first may pass through, because a caller would take the second for its own end.
        """
        stats = self._stats_by_method[method]
        stats.begin()
        started_s, code = time.perf_counter(), grpc.StatusCode.CANCELLED
        try:
            yield
            code = grpc.StatusCode.OK
            self._connection(address, channel_kind).answered_s = time.monotonic()
        except grpc.aio.AioRpcError as exc:
            code = exc.code()
            if code == grpc.StatusCode.DEADLINE_EXCEEDED:
                self._doubt(address, channel_kind)
            raise _translated(exc) from None
        except TimeoutError:
            code = grpc.StatusCode.DEADLINE_EXCEEDED
            self._doubt(address, channel_kind)
            raise PeerTimeout("no answer in time") from None
        except (grpc.aio.BaseError, asyncio.InvalidStateError):
            code = grpc.StatusCode.UNAVAILABLE
            raise PeerUnreachable("the connection was closed") from None
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]  # inside a coroutine
                raise
            code = grpc.StatusCode.UNAVAILABLE
            raise PeerUnreachable("the connection was closed") from None
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
        call: Any,  # noqa: ANN401  # grpcio's own type is private
        stream_mac: StreamMac,
        *,
        is_current: Callable[[], bool],
        counted: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """`is_current` tells whether the stream's connection is still in use, and not about to be closed.

        `counted` counts what is awaited inside, and raises its failure as one of this package's errors.
        """
        self.address = address
        self._call = call
        self._stream_mac = stream_mac
        self._is_current = is_current
        self._counted = counted

    @property
    def is_open(self) -> bool:
        """Whether the peer, as far as is known, waits for a batch."""
        return not self._call.done() and self._is_current()

    async def ask(self, batch: bytes, *, timeout_s: float) -> bytes:
        """Return the peer's answer to a serialized Batch; after a failure the stream is closed.

        Raises:
            PeerUnreachable: no connection, or it broke, or the peer ended the stream.
            PeerTimeout: no answer in time.
            PeerRefused: the peer does not take this node for one of its cluster.
        """
        request = pb.ForwardRequest(batch=batch, seal=self._stream_mac.seal(batch)).SerializeToString()
        try:
            with self._counted():
                async with asyncio.timeout(timeout_s):
                    return await self._write_and_read(request)
        except BaseException:
            self._call.cancel()
            raise

    async def _write_and_read(self, message: bytes) -> bytes:
        # At once, not one after the other: both wait for grpcio's thread, for about the same time.
        reading = asyncio.create_task(self._call.read())
        try:
            await self._call.write(message)
            answer = await reading
        except BaseException:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            raise
        if answer is grpc.aio.EOF:
            raise grpc.aio.UsageError("ended")
        return bytes(answer)

    async def end(self) -> None:
        """Close the stream, cleanly where that is quick; no batch is under way on it."""
        try:
            async with asyncio.timeout(_END_TIMEOUT_S):
                await self._call.done_writing()
        except (grpc.aio.AioRpcError, grpc.aio.BaseError, asyncio.InvalidStateError, TimeoutError):
            # Its channel may have been closed meanwhile.
            self._call.cancel()


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


def _path(method: str) -> str:
    return f"/{SERVICE_NAME}/{method}"


def _metadata(signature: str) -> tuple[tuple[str, str]] | None:
    return ((METADATA_KEY, signature),) if signature else None


def _translated(exc: grpc.aio.AioRpcError) -> ClusterError:
    code, text = exc.code(), exc.details() or ""
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return PeerTimeout("no answer in time")
    if code in _REFUSALS:
        return PeerRefused(text)
    return PeerUnreachable(f"{code.name}: {text}")
