"""Connections to the other nodes: opened when needed, authenticated, one for gossip apart from one for calls.

    gossip.py   --> Peers.call(GOSSIP) --------> connection 1 --> peer     a packet and its answer
                --> Peers.keep_connected ------> connection 1              tells when it is lost
    forward.py  --> Peers.call(CALLS) ---------> connection 2 --> peer     invalidations
                --> Peers.open_stream ---------> connection 2 --> peer     forwarded calls, in batches

Two connections, because packets of gossip must not wait behind a megabyte of forwarded calls: a member would
look dead because it is busy.

Each connection begins with Hello, in which both ends prove that they know the cluster's secret
(peer_auth.py). Nothing else is sent before, and no answer is taken that is not sealed.

Every failure leaves this module as one of four errors (peer_failures.py):

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

from aio.later import Outcome
from aio.tasks import Tasks
from cluster.channel import Channel
from cluster.connection import Connection
from cluster.errors import ClusterError, UnauthenticatedPeer
from cluster.forward_stream import ForwardStream
from cluster.peer_auth import HELLO, NO_KEY, NONCE_BYTES, PeerAuth, PeerKey
from cluster.peer_failures import FAILURES, error_of
from cluster.peerpb import peer_pb2 as pb
from cluster.signing import metadata, now_ms, path, sign
from cluster.timing import CHANNEL_GRACE_S, SILENCE_S
from cluster.wire import parsed
from http2.status import StatusCode

_MAX_CONNECTIONS: Final = 4096  # two to each member of the largest usual cluster, and more
_MAX_HELLO_BYTES: Final = 1024  # of an answer of who has proved nothing yet
_HELLO_S: Final = 1.0  # no more than the dial that it belongs to (channel.py)


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
            signature = sign(key, method, body)
            answer = await channel.call_on(
                connection, path(method), metadata(signature), body, timeout_s=until_s - time.monotonic()
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
            count=lambda: self._begun(address, ChannelKind.CALLS, "Forward").end,
            tasks=self._opening,
        )

    async def keep_connected(self, address: str, lost: Callable[[], None]) -> None:
        """Keep the gossip connection to a peer open until cancelled; call `lost` each time it is lost."""
        while not self._is_closed:
            await self._connection(address, ChannelKind.GOSSIP).channel.until_lost()
            if not self._is_closed:
                lost()

    def dial_soon(self, address: str) -> None:
        """Dial an address with the next call, also if the last dial failed: a process says it is there."""
        for channel_kind in ChannelKind:
            connection = self._connections.get((address, channel_kind))
            if connection is not None:
                connection.channel.dial_soon()

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
            greeting = self._auth.greeting(body, now_ms=now_ms(), nonce=os.urandom(NONCE_BYTES))
            answer = await channel.call_on(
                connection,
                path(HELLO),
                metadata(greeting),
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
        if not isinstance(failure, FAILURES):
            return StatusCode.CANCELLED, failure
        code, error = error_of(failure)
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
