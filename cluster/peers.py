"""Connections to the other nodes: opened when needed, authenticated, one for gossip apart from one for calls.

    gossip.py   --> Peers.call(GOSSIP) --------> connection 1 --> peer     a packet and its answer
                --> Peers.keep_connected ------> connection 1              tells when it is lost
    forward.py  --> Peers.call(CALLS) ---------> connection 2 --> peer     invalidations
                --> Peers.open_stream ---------> connection 2 --> peer     forwarded calls, in batches

Two connections, because packets of gossip must not wait behind a megabyte of forwarded calls: a member would
look dead because it is busy.

Each connection begins with Hello, in which both ends prove that they know the cluster's secret
(peer_auth.py). Nothing else is sent before, and no answer is taken that is not sealed.

Every failure leaves this module as one of four errors (errors.py):

- PeerUnreachable: there was no connection, or it broke. The host may refuse, so it is worth a dial.
- PeerTimeout: no answer in time. If the connection was silent for SILENCE_S, it is replaced.
- PeerRefused: the peer answered, and does not take this node for one of its cluster.
- PeerUnproven: what answered did not prove that it is a node of this cluster.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Final, Protocol

from aio.later import Later, Outcome, begun
from aio.tasks import Tasks
from cluster.channel import Channel, IntroductionFailed
from cluster.channel_stream import ChannelStream
from cluster.connection import Connection
from cluster.errors import (
    ClusterError,
    MalformedPacket,
    PeerRefused,
    PeerTimeout,
    PeerUnproven,
    PeerUnreachable,
    UnauthenticatedPeer,
)
from cluster.peer_auth import HELLO, METADATA_KEY, NO_KEY, NONCE_BYTES, PeerAuth, PeerKey, StreamMac
from cluster.peerpb import peer_pb2 as pb
from cluster.responses import CallFailed, ConnectionLost
from cluster.timing import CHANNEL_GRACE_S, SILENCE_S
from cluster.wire import parsed
from http2.outbox import Headers
from http2.status import StatusCode

SERVICE_NAME: Final = "mnemosynepeer.Peer"
_MAX_CONNECTIONS: Final = 4096  # two to each member of the largest usual cluster, and more
_MAX_HELLO_BYTES: Final = 1024  # of an answer of who has proved nothing yet
_HELLO_S: Final = 1.0  # no more than the dial that it belongs to (channel.py)
# Dialling a member to learn whether its host refuses. Within one network a reset takes milliseconds.
_DIAL_TIMEOUT_S: Final = 0.2
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
class _PeerConnection:
    channel: Channel
    callee: str  # the name of the node there; empty for any node of the cluster
    answered_s: float  # when it was opened, or the peer last answered on it


class Peers:
    """The connections to other nodes, by address."""

    def __init__(
        self,
        peer_auth: PeerAuth,
        stats_by_method: Mapping[str, CallStats],
        *,
        server_name: Callable[[str], str] = lambda address: address.rpartition(":")[0],
        may_dial: Callable[[str], bool] = lambda _: True,
        socket_at: Callable[[str], str] = lambda _: "",
    ) -> None:
        """Open no connection yet.

        - `server_name` returns, over TLS, the name that an address's certificate must have.
        - `may_dial` tells whether a node may be where a host name leads.
        - `socket_at` returns the Unix socket of the node at an address, if it is another process of this
          daemon. Only this user reaches that socket, so nothing is proved and nothing is sealed there.
        """
        self.socket_at = socket_at
        self._may_dial = may_dial
        self._auth = peer_auth
        self._stats_by_method = stats_by_method
        self._server_name = server_name
        self._tls: ssl.SSLContext | None = None
        self._connections: dict[tuple[str, ChannelKind], _PeerConnection] = {}
        self._is_closed = False
        self._closing = Tasks("peer_connection_close")
        self._opening = Tasks("peer_stream_open")

    def identify(self, context: ssl.SSLContext) -> None:
        """Open connections over TLS from now on, with this identity; it verifies the peer's name.

        A channel keeps the identity that it was made with, also when it connects again. Therefore open
        connections finish their calls and close.
        """
        self._tls = context
        self.dial_again()

    def dial_again(self) -> None:
        """Open other connections from now on; those that are open finish their calls and close."""
        for address, channel_kind in list(self._connections):
            self._hang_up(address, channel_kind, grace_s=CHANNEL_GRACE_S)

    async def call(
        self,
        address: str,
        method: str,
        body: bytes,
        *,
        timeout_s: float,
        channel_kind: ChannelKind,
        callee: str = "",
    ) -> bytes:
        """Return the answer of the node of this name; of any node there, if the name is empty.

        Raises:
            PeerUnreachable: no connection, or it broke.
            PeerTimeout: no answer in time.
            PeerRefused: the peer does not take this node for one of its cluster.
            PeerUnproven: what answers there is not proved to be a node of this cluster.
        """
        with self._counted(address, channel_kind, method):
            channel = self._connection(address, channel_kind, callee).channel
            until_s = time.monotonic() + timeout_s
            connection = await channel.ready(timeout_s)
            key: PeerKey = connection.introduction
            signature = _signature(key, method, body)
            answer = await channel.call_on(
                connection, _path(method), _metadata(signature), body, timeout_s=until_s - time.monotonic()
            )
            sealed = parsed(pb.SealedAnswer, answer)
            key.check_answer(signature, sealed.answer, sealed.seal)
            return sealed.answer

    def open_stream(self, address: str, callee: str) -> ForwardStream:
        """Return a stream of forwarded batches to the node of this name; its first batch opens it."""
        connection = self._connection(address, ChannelKind.CALLS, callee)
        return ForwardStream(
            address,
            connection.channel,
            is_current=lambda: self._connections.get((address, ChannelKind.CALLS)) is connection,
            count=lambda: self._begun(address, ChannelKind.CALLS, "Forward"),
            tasks=self._opening,
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
        closing_channels = [connection.channel.close() for connection in connections]
        await asyncio.gather(*closing_channels, *closing, self._opening.close())

    def _connection(self, address: str, channel_kind: ChannelKind, callee: str = "") -> _PeerConnection:
        """Return the connection to an address; another node there than before gets another one."""
        connection = self._connections.get((address, channel_kind))
        if connection is not None and callee not in ("", connection.callee):
            self._hang_up(address, channel_kind)
            connection = None
        if connection is None:
            if len(self._connections) >= _MAX_CONNECTIONS:
                # The oldest address. If its peer is still there, the next call opens a connection.
                self.forget(next(iter(self._connections))[0])
            channel = Channel(
                address,
                tls=self._tls,
                # Peers are dialled by address, and their certificates are for names.
                server_name=self._server_name(address).strip("[]"),
                introduce=partial(self._introduce, callee),
                may_dial=self._may_dial,
                unix_path=self.socket_at(address),
            )
            connection = _PeerConnection(channel, callee, answered_s=time.monotonic())
            self._connections[address, channel_kind] = connection
        return connection

    async def _introduce(self, callee: str, channel: Channel, connection: Connection) -> PeerKey:
        """Say Hello on a new connection; return the key for calls on it.

        The Hello names its callee. Otherwise a process that took over the address of a dead node could pass
        the Hello on to a live one, and read what follows.

        Raises:
            UnauthenticatedPeer: what answers there is no node of this cluster.
            CallFailed: it refuses this node, or fails.
        """
        if channel.unix_path:
            return NO_KEY
        process = proof = b""
        greeting = ""
        if self._auth.has_secret:
            body = pb.HelloRequest(callee=callee).SerializeToString()
            greeting = self._auth.greeting(body, now_ms=_now_ms(), nonce=os.urandom(NONCE_BYTES))
            answer = await channel.call_on(
                connection,
                _path(HELLO),
                _metadata(greeting),
                body,
                timeout_s=_HELLO_S,
                max_bytes=_MAX_HELLO_BYTES,
            )
            hello = parsed(pb.HelloResponse, answer)
            process, proof = hello.process, hello.proof
        if proof:
            return self._auth.key_for(process, proof, greeting=greeting)
        objection = self._auth.objection_to_callee(connection.certificate_names, connection.host)
        if objection:
            raise UnauthenticatedPeer(objection)
        return NO_KEY

    def _hang_up(self, address: str, channel_kind: ChannelKind, *, grace_s: float = 0.0) -> None:
        """Close a connection in the background; the next call opens another at once."""
        connection = self._connections.pop((address, channel_kind), None)
        if connection is not None:
            self._closing.spawn(connection.channel.close(grace_s))

    @contextmanager
    def _counted(self, address: str, channel_kind: ChannelKind, method: str) -> Iterator[None]:
        """Count what is awaited inside, and raise its failure as one of this package's errors."""
        count = self._begun(address, channel_kind, method)
        try:
            yield
        except BaseException as exc:
            error = count.failed(exc)
            if error is exc:
                raise
            raise error from None
        count.answered()

    def _begun(self, address: str, channel_kind: ChannelKind, method: str) -> _Count:
        return _Count(self, self._stats_by_method[method], address, channel_kind)

    def answered(self, address: str, channel_kind: ChannelKind) -> None:
        """Take note of an answer."""
        connection = self._connections.get((address, channel_kind))
        if connection is not None:
            connection.answered_s = time.monotonic()

    def error_of(
        self, failure: BaseException, address: str, channel_kind: ChannelKind
    ) -> tuple[StatusCode, BaseException]:
        """Take note of a failure; return its status, and what it is for the callers of this module."""
        if not isinstance(failure, _FAILURES):
            return StatusCode.CANCELLED, failure
        code, error = _failure(failure)
        if code is StatusCode.DEADLINE_EXCEEDED:
            self._doubt(address, channel_kind)
        if isinstance(failure, ClusterError):
            # Something else speaks on this connection than what was introduced.
            self._hang_up(address, channel_kind)
        return code, error

    def _doubt(self, address: str, channel_kind: ChannelKind) -> None:
        """Replace a connection on which nothing came for a while.

        After a loss of packets TCP waits longer before each repetition, up to minutes. A new connection works
        as soon as the network does.
        """
        connection = self._connections.get((address, channel_kind))
        if connection is not None and time.monotonic() - connection.answered_s > SILENCE_S:
            self._hang_up(address, channel_kind)


class _Count:
    """One call that was counted in; it is counted out once, by one of the methods."""

    __slots__ = ("_address", "_channel_kind", "_peers", "_started_s", "_stats")

    def __init__(self, peers: Peers, stats: CallStats, address: str, channel_kind: ChannelKind) -> None:
        stats.begin()
        self._peers = peers
        self._stats = stats
        self._address = address
        self._channel_kind = channel_kind
        self._started_s = time.perf_counter()

    def answered(self) -> None:
        """Count it out as answered."""
        self._peers.answered(self._address, self._channel_kind)
        self._stats.end(StatusCode.OK.name, time.perf_counter() - self._started_s)

    def failed(self, failure: BaseException) -> BaseException:
        """Count it out; return its failure as one of this package's errors."""
        code, error = self._peers.error_of(failure, self._address, self._channel_kind)
        self._stats.end(code.name, time.perf_counter() - self._started_s)
        return error

    def end(self, outcome: Outcome[bytes]) -> Outcome[bytes]:
        """Count it out, as a step of a Later."""
        if isinstance(outcome, BaseException):
            return self.failed(outcome)
        self.answered()
        return outcome


class ForwardStream:
    """A stream to one peer, on which each batch is answered before the next is sent.

    A stream costs half of what one call for each batch costs: its headers and its signature are sent once.
    The messages have no numbers, so a stream whose answer was not read cannot be used again: it would give
    one batch the answers of another. `ask` closes it after any failure.
    """

    def __init__(
        self,
        address: str,
        channel: Channel,
        *,
        is_current: Callable[[], bool],
        count: Callable[[], _Count],
        tasks: Tasks,
    ) -> None:
        """`is_current` tells whether the stream's connection is still in use, and not about to be closed.

        `count` counts a batch in, and `tasks` open the stream.
        """
        self.address = address
        self._stream = ChannelStream(channel, _path("Forward"), self._open)
        self._batches, self._answers = StreamMac(None), StreamMac(None)
        self._is_current = is_current
        self._count = count
        self._tasks = tasks

    @property
    def is_open(self) -> bool:
        """Whether the peer, as far as is known, waits for a batch."""
        return self._stream.is_open and self._is_current()

    def ask(self, batch: bytes, *, timeout_s: float) -> Later[bytes]:
        """Return the peer's answers to a serialized Batch; after a failure the stream is closed.

        The Later fails with:
            PeerUnreachable: no connection, or it broke, or the peer ended the stream.
            PeerTimeout: no answer in time.
            PeerRefused: the peer does not take this node for one of its cluster.
            PeerUnproven: what answers there is not proved to be a node of this cluster.
        """
        count = self._count()
        if self._stream.is_begun:
            answer = self._ask(batch, timeout_s)
        else:
            answer = begun(self._open_and_ask(batch, timeout_s), self._tasks)
        return answer.through(count.end)

    def _ask(self, batch: bytes, timeout_s: float) -> Later[bytes]:
        request = pb.ForwardRequest(batch=batch, seal=self._batches.seal(batch)).SerializeToString()
        return self._stream.ask(request, timeout_s=timeout_s).through(self._checked)

    async def _open_and_ask(self, batch: bytes, timeout_s: float) -> bytes:
        until_s = time.monotonic() + timeout_s
        await self._stream.open(timeout_s=timeout_s)
        return await self._ask(batch, until_s - time.monotonic())

    def _checked(self, response: Outcome[bytes]) -> Outcome[bytes]:
        if not isinstance(response, bytes):
            return response
        try:
            sealed = parsed(pb.ForwardResponse, response)
            self._answers.check(sealed.seal, sealed.answers)
        except ClusterError:
            self._stream.cancel()
            raise
        return sealed.answers

    def _open(self, key: PeerKey) -> Headers:
        # An empty body, since no batch is there yet.
        opening = _signature(key, "Forward", b"")
        self._batches, self._answers = key.stream_macs(opening)
        return _metadata(opening)

    def end(self) -> None:
        """Close the stream; no batch is under way on it."""
        self._stream.finish()


async def is_refused(address: str, unix_path: str = "") -> bool:
    """Dial an address, or a socket on this host; tell whether the host says that no process listens there.

    A host that is down, or a network that drops packets, gives no answer. That proves nothing.
    """
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(_DIAL_TIMEOUT_S):
            if unix_path:
                _, writer = await asyncio.open_unix_connection(unix_path)
            else:
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except (ConnectionRefusedError, FileNotFoundError):
        return True
    except (OSError, TimeoutError):
        return False
    writer.close()
    return False


def _path(method: str) -> bytes:
    return f"/{SERVICE_NAME}/{method}".encode()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _signature(key: PeerKey, method: str, body: bytes) -> str:
    return key.sign(method, body, now_ms=_now_ms(), nonce=os.urandom(NONCE_BYTES))


def _metadata(signature: str) -> Headers:
    return [(METADATA_KEY.encode(), signature.encode())] if signature else []


_FAILURES: Final = (
    CallFailed,
    ConnectionLost,
    IntroductionFailed,
    MalformedPacket,
    TimeoutError,
    UnauthenticatedPeer,
)


def _failure(exc: BaseException) -> tuple[StatusCode, ClusterError]:
    """Return the status to count for one of `_FAILURES`, and what it is for the callers of this module."""
    if isinstance(exc, IntroductionFailed):
        exc = exc.reason
    if isinstance(exc, UnauthenticatedPeer | MalformedPacket):
        return StatusCode.UNAUTHENTICATED, PeerUnproven(str(exc))
    if isinstance(exc, TimeoutError):
        return StatusCode.DEADLINE_EXCEEDED, PeerTimeout("no answer in time")
    if not isinstance(exc, CallFailed):
        return StatusCode.UNAVAILABLE, PeerUnreachable(str(exc))
    if exc.code is StatusCode.DEADLINE_EXCEEDED:
        return exc.code, PeerTimeout("no answer in time")
    if exc.code in _REFUSALS:
        return exc.code, PeerRefused(str(exc))
    return exc.code, PeerUnreachable(f"{exc.code.name}: {exc}")
