"""Channels to the other nodes: opened when needed, signed, one for gossip apart from one for calls."""

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

from cluster.errors import ClusterError, PeerRefused, PeerTimeout, PeerUnreachable
from cluster.peer_auth import METADATA_KEY, NONCE_BYTES, PeerAuth, StreamMac
from cluster.peerpb import peer_pb2 as pb

SERVICE_NAME: Final = "mnemosynepeer.Peer"
_MAX_RESPONSE_BYTES: Final = 64 * 1024**2
_OPTIONS: Final = (
    # Two channels to one address would share a connection, and gossip would wait behind calls.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", _MAX_RESPONSE_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    # A restarted peer is back within a second, perhaps elsewhere.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
)
_MAX_CHANNELS: Final = 512
_SILENCE_S: Final = 0.9
_DIAL_TIMEOUT_S: Final = 0.2
_END_TIMEOUT_S: Final = 0.2
# More than any call takes.
_GRACE_S: Final = 2.0
_REFUSALS: Final = frozenset({
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.FAILED_PRECONDITION,
})  # fmt: skip


class ChannelKind(Enum):
    """Which of the two channels to a peer."""

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
    callables: dict[str, Any] = field(default_factory=dict)


class Peers:
    """The other nodes by address."""

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
        self._lines: dict[tuple[str, ChannelKind], _Connection] = {}
        self._is_closed = False
        self._closing: set[asyncio.Task[None]] = set()

    def identify(self, identity: TlsIdentity) -> None:
        """Open connections over TLS from now on, with this.

        A channel keeps what it was made with, also when it connects again: those that are open finish their
        calls and close.
        """
        self._credentials = identity.credentials()
        for address, lane in list(self._lines):
            self._hang_up(address, lane, grace_s=_GRACE_S)

    async def call(
        self, address: str, method: str, body: bytes, *, timeout_s: float, lane: ChannelKind
    ) -> bytes:
        """Return a peer's answer.

        Raises:
            PeerUnreachable: no connection, or it broke.
            PeerTimeout: no answer in time.
            PeerRefused: the peer does not take us for one of its own.
        """
        metadata = _metadata(self._signature(method, body))
        with self._counted(address, lane, method):
            return bytes(
                await self._callable(address, lane, method)(body, timeout=timeout_s, metadata=metadata)
            )

    def exchange(self, address: str) -> ForwardStream:
        """Open a stream of forwarded batches to a peer."""
        line = self._line(address, ChannelKind.CALLS)
        opening = self._signature("Forward", b"")
        call = line.channel.stream_stream(_path("Forward"))(metadata=_metadata(opening))
        return ForwardStream(
            address,
            call,
            self._trust.stream_mac(opening),
            is_current=lambda: self._lines.get((address, ChannelKind.CALLS)) is line,
            counted=lambda: self._counted(address, ChannelKind.CALLS, "Forward"),
        )

    async def watch(self, address: str, lost: Callable[[], None]) -> None:
        """Keep the gossip connection to a peer open, and tell each time that it is lost; for ever."""
        while not self._is_closed:
            channel = self._line(address, ChannelKind.GOSSIP).channel
            state = channel.get_state(try_to_connect=True)
            # Closed meanwhile, it is replaced in the next turn.
            with suppress(grpc.aio.BaseError):
                await channel.wait_for_state_change(state)
            if state == grpc.ChannelConnectivity.READY:
                lost()

    def forget(self, address: str) -> None:
        """Close the channels to an address: its node is gone, or another one now."""
        for lane in ChannelKind:
            self._hang_up(address, lane)

    async def close(self) -> None:
        """Close all channels; calls under way fail."""
        self._is_closed = True
        lines, self._lines = list(self._lines.values()), {}
        await asyncio.gather(*(line.channel.close() for line in lines), *self._closing)

    def _line(self, address: str, lane: ChannelKind) -> _Connection:
        line = self._lines.get((address, lane))
        if line is None:
            if len(self._lines) >= _MAX_CHANNELS:
                self.forget(next(iter(self._lines))[0])
            line = _Connection(self._channel(address), answered_s=time.monotonic())
            self._lines[address, lane] = line
        return line

    def _channel(self, address: str) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(address, options=_OPTIONS)
        # Peers are dialled by address, and their certificates are for names.
        name = self._server_name(address).strip("[]")
        options = (*_OPTIONS, ("grpc.ssl_target_name_override", name))
        return grpc.aio.secure_channel(address, self._credentials, options=options)

    def _callable(self, address: str, lane: ChannelKind, method: str) -> Any:  # noqa: ANN401  # grpcio's own type is private
        line = self._line(address, lane)
        found = line.callables.get(method)
        if found is None:
            found = line.callables[method] = line.channel.unary_unary(_path(method))
        return found

    def _hang_up(self, address: str, lane: ChannelKind, *, grace_s: float | None = None) -> None:
        line = self._lines.pop((address, lane), None)
        if line is not None:
            task = asyncio.create_task(line.channel.close(grace_s))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    @contextmanager
    def _counted(self, address: str, lane: ChannelKind, method: str) -> Iterator[None]:
        """Count what is awaited inside, and raise its failure as one of ours."""
        stats = self._stats_by_method[method]
        stats.begin()
        started_s, code = time.perf_counter(), grpc.StatusCode.CANCELLED
        try:
            yield
            code = grpc.StatusCode.OK
            self._line(address, lane).answered_s = time.monotonic()
        except grpc.aio.AioRpcError as exc:
            code = exc.code()
            if code == grpc.StatusCode.DEADLINE_EXCEEDED:
                self._doubt(address, lane)
            raise _translated(exc) from None
        except TimeoutError:
            code = grpc.StatusCode.DEADLINE_EXCEEDED
            self._doubt(address, lane)
            raise PeerTimeout("no answer in time") from None
        except (grpc.aio.BaseError, asyncio.InvalidStateError):
            code = grpc.StatusCode.UNAVAILABLE
            raise PeerUnreachable("the connection was closed") from None
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]  # inside a coroutine
                raise
            # Not this task was cancelled but the call: its channel was closed.
            code = grpc.StatusCode.UNAVAILABLE
            raise PeerUnreachable("the connection was closed") from None
        finally:
            stats.end(code.name, time.perf_counter() - started_s)

    def _doubt(self, address: str, lane: ChannelKind) -> None:
        # What a network lost, TCP sends again ever more rarely; a new connection works as soon as it does.
        line = self._lines.get((address, lane))
        if line is not None and time.monotonic() - line.answered_s > _SILENCE_S:
            self._hang_up(address, lane)

    def _signature(self, method: str, body: bytes) -> str:
        now_ms = time.time_ns() // 1_000_000
        return self._trust.sign(method, body, now_ms=now_ms, nonce=os.urandom(NONCE_BYTES))


class ForwardStream:
    """A stream to one peer, on which each batch is answered before the next is sent."""

    def __init__(
        self,
        address: str,
        call: Any,  # noqa: ANN401  # likewise
        stream_mac: StreamMac,
        *,
        is_current: Callable[[], bool],
        counted: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """`is_current` tells whether the stream's channel is still in use, and not about to be closed.

        `counted` counts what is awaited inside, and raises its failure as one of ours.
        """
        self.address = address
        self._call = call
        self._seals = stream_mac
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
            PeerRefused: the peer does not take us for one of its own.
        """
        request = pb.ForwardRequest(batch=batch, seal=self._seals.seal(batch)).SerializeToString()
        try:
            with self._counted():
                async with asyncio.timeout(timeout_s):
                    return await self._asked(request)
        except BaseException:
            self._call.cancel()
            raise

    async def _asked(self, message: bytes) -> bytes:
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
        """Close the stream, in order where that is quick; there is nothing under way on it."""
        try:
            async with asyncio.timeout(_END_TIMEOUT_S):
                await self._call.done_writing()
        except (grpc.aio.AioRpcError, grpc.aio.BaseError, asyncio.InvalidStateError, TimeoutError):
            # Its channel may have been closed meanwhile.
            self._call.cancel()


async def is_refused(address: str) -> bool:
    """Dial an address; tell whether its host says that nothing listens there."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(_DIAL_TIMEOUT_S):
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
