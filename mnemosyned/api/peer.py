"""The Peer service: what other nodes of the cluster may ask. Nobody else gets past `_Guard`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from grpc import StatusCode

from aio.deadline import Deadline
from cluster.errors import MalformedPacket, UnauthenticatedPeer
from cluster.gossip import Gossip
from cluster.peer_auth import METADATA_KEY, PeerAuth, StreamMac
from cluster.peerpb import peer_pb2 as pb
from cluster.peers import SERVICE_NAME
from mnemosyned.api import session_manager
from mnemosyned.api.session_manager import Answer, parsed
from mnemosyned.errors import (
    DeadlineExceeded,
    MalformedMessage,
    NotOurCluster,
    Unauthenticated,
    Unimplemented,
)
from mnemosyned.transport.call import Call, answer_in_time, failure_of
from mnemosyned.transport.methods import MethodTable, UnaryHandler

log = logging.getLogger(__name__)

METHODS: Final = ("Gossip", "Forward", "Invalidate", "Leave")
# A table of many thousand members; a forwarded request is the client's own and some bytes.
_MAX_MESSAGE_BYTES: Final = 8 * 1024**2
_ITEM_OVERHEAD_BYTES: Final = 64 * 1024
# More than what two estimates of the storage's clock differ by.
_CLOCK_ERROR_US: Final = 50_000
# Well below what a caller takes: it gets the rest from the storage.
_MAX_RESPONSE_BYTES: Final = 32 * 1024**2
_MS_PER_S: Final = 1000


class PeerService:
    """Gossip, forwarded calls and invalidations."""

    def __init__(
        self,
        gossip: Callable[[], Gossip],
        calls: MethodTable,
        *,
        storage_now_us: Callable[[], int],
        drop: Callable[[Sequence[str] | None], None],
        stop: Callable[[], None],
    ) -> None:
        """Ask `gossip` for the membership with each call, since it begins later than the listening.

        `calls` answers forwarded calls; `drop` takes tokens, or None for all; `stop` begins this node's end.
        """
        self._gossip = gossip
        self._calls = calls
        self._storage_now_us = storage_now_us
        self._drop = drop
        self._stop = stop
        self._waiting: set[asyncio.Task[Any]] = set()  # streams without a batch under way
        self._is_closed = False
        self._rounds = 0  # of streams that were begun between two ends

    def add_to(self, table: MethodTable, trust: PeerAuth, *, max_message_bytes: int) -> None:
        """Serve it to peers; `max_message_bytes` is a client's limit."""
        answers: dict[str, UnaryHandler] = {
            "Gossip": self._answer_gossip,
            "Invalidate": self._invalidate,
            "Leave": self._leave,
        }
        limit = max(_MAX_MESSAGE_BYTES, max_message_bytes + _ITEM_OVERHEAD_BYTES)
        for name, answer in answers.items():
            table.add_unary(SERVICE_NAME, name, _guarded(name, answer, trust), max_message_bytes=limit)

        def forward(messages: AsyncIterator[bytes], call: Call) -> AsyncIterator[bytes]:
            return self._forward(messages, call, trust)

        table.add_stream(SERVICE_NAME, "Forward", forward, max_message_bytes=limit)

    def close(self) -> None:
        """End the streams of forwarded calls, each when its batch is answered."""
        self._is_closed = True
        self.end_streams()

    def end_streams(self) -> None:
        """Have peers open new streams; those that are there end as by `close`."""
        self._rounds += 1
        for task in self._waiting:
            task.cancel()

    def _answer_gossip(self, message: bytes, _: Call) -> bytes:
        try:
            return self._gossip().answer(message)
        except MalformedPacket as exc:
            raise MalformedMessage(f"mnemosyned: {exc}") from None

    async def _forward(
        self, messages: AsyncIterator[bytes], call: Call, trust: PeerAuth
    ) -> AsyncIterator[bytes]:
        opening = call.metadata(METADATA_KEY)
        _check(trust, opening, "Forward", b"", call)
        stream_mac = StreamMac([]) if trust.knows(call.certificate_names) else trust.stream_mac(opening or "")
        async for message in self._until_closed(messages):
            request = parsed(pb.ForwardRequest, message)
            with _refusing_strangers():
                stream_mac.check(request.seal, request.batch)
            answer = self._answer_batch(parsed(pb.Batch, request.batch), call)
            yield answer if isinstance(answer, bytes) else await answer

    async def _until_closed(self, messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        task, mine = asyncio.current_task(), self._rounds
        assert task is not None
        while not self._is_closed and self._rounds == mine:
            self._waiting.add(task)
            try:
                message = await anext(messages)
            except StopAsyncIteration:
                return
            except asyncio.CancelledError:
                # By `end_streams`, unless the caller has gone as well.
                if self._rounds != mine and not task.uncancel():
                    return
                raise
            finally:
                self._waiting.discard(task)
            yield message

    def _answer_batch(self, batch: pb.Batch, call: Call) -> Answer:
        self._check_origin(batch.origin)
        answers = [self._begin(item, call) for item in batch.items]
        ready = [answer for answer in answers if isinstance(answer, pb.Answer)]
        if len(ready) < len(answers):
            return _gathered(answers)
        return _response(ready)

    def _begin(self, item: pb.Item, call: Call) -> pb.Answer | Coroutine[Any, Any, pb.Answer]:
        """Return an item's answer at once where the cache has it."""
        method = self._calls.unary.get(f"/{session_manager.SERVICE_NAME}/{item.method}")
        if method is None:
            return _failed(item, Unimplemented(f"mnemosyned: unknown method {item.method[:100]}"))
        if self._storage_now_us() > item.deadline_us + _CLOCK_ERROR_US:
            # This process stood still; the caller has long turned to the storage.
            return _failed(item, DeadlineExceeded())
        forwarded = _ForwardedCall(item, call.peer)
        try:
            answer = method.handle(item.message, forwarded)
        except Exception as exc:  # noqa: BLE001  # the root of a call: becomes its status
            return _failed(item, exc)
        if isinstance(answer, bytes):
            return pb.Answer(message=answer)
        return _finish(item, answer, forwarded)

    def _invalidate(self, message: bytes, _: Call) -> bytes:
        request = parsed(pb.InvalidateRequest, message)
        self._check_origin(request.origin)
        self._drop(None if request.everything else request.tokens)
        return pb.InvalidateResponse().SerializeToString()

    def _leave(self, message: bytes, call: Call) -> bytes:
        request, name = parsed(pb.LeaveRequest, message), self._gossip().swim.me.name
        if request.node != name:
            raise NotOurCluster(f"mnemosyned: this node is {name}, and the call is for another one")
        log.info("asked_to_leave", extra={"peer": call.peer})
        self._stop()
        return pb.LeaveResponse().SerializeToString()

    def _check_origin(self, origin: pb.Origin) -> None:
        objection = self._gossip().objection(origin)
        if objection:
            raise NotOurCluster(f"mnemosyned: {objection}")


class _ForwardedCall:
    """Call of a client that came in elsewhere."""

    __slots__ = ("_item", "certificate_names", "deadline", "peer")

    certificate_names: tuple[str, ...]  # the client showed one to the node that forwards, if at all

    def __init__(self, item: pb.Item, peer: str) -> None:
        self._item = item
        self.peer = peer
        self.deadline = Deadline.in_s(
            item.timeout_ms / _MS_PER_S, not_after_us=item.deadline_us - _CLOCK_ERROR_US
        )
        self.certificate_names = ()

    def metadata(self, key: str) -> str | None:
        if key not in {"request_id", "traceparent", "tracestate"}:
            return None
        return getattr(self._item, key) or None


def _guarded(name: str, answer: UnaryHandler, trust: PeerAuth) -> UnaryHandler:
    def guarded(message: bytes, call: Call) -> Answer:
        _check(trust, call.metadata(METADATA_KEY), name, message, call)
        return answer(message, call)

    return guarded


def _check(trust: PeerAuth, signature: str | None, method: str, body: bytes, call: Call) -> None:
    if not trust.knows(call.certificate_names):
        with _refusing_strangers():
            trust.check(signature, method, body, peer=call.peer, now_ms=time.time_ns() // 1_000_000)


@contextmanager
def _refusing_strangers() -> Iterator[None]:
    try:
        yield
    except UnauthenticatedPeer as exc:
        raise Unauthenticated(f"mnemosyned: {exc}") from None


async def _gathered(answers: list[pb.Answer | Coroutine[Any, Any, pb.Answer]]) -> bytes:
    waiting = [answer for answer in answers if isinstance(answer, Coroutine)]
    finished = iter(await asyncio.gather(*waiting))
    whole = [next(finished) if isinstance(answer, Coroutine) else answer for answer in answers]
    return _response(whole)


def _response(answers: list[pb.Answer]) -> bytes:
    size_bytes = 0
    for answer in answers:
        size_bytes += len(answer.message)
        if size_bytes > _MAX_RESPONSE_BYTES:
            answer.CopyFrom(_TOO_MUCH)
    return pb.ForwardResponse(answers=answers).SerializeToString()


_TOO_MUCH: Final = pb.Answer(
    code=StatusCode.UNAVAILABLE.value[0], text="mnemosyned: the batch's answers are too large together"
)


async def _finish(item: pb.Item, answer: Coroutine[Any, Any, bytes], call: _ForwardedCall) -> pb.Answer:
    try:
        return pb.Answer(message=await answer_in_time(answer, call))
    except Exception as exc:  # noqa: BLE001  # the root of a call: becomes its status
        return _failed(item, exc)


def _failed(item: pb.Item, exc: Exception) -> pb.Answer:
    failure = failure_of(exc)
    fields = {"method": item.method[:100], "code": failure.code.name, "request_id": item.request_id[:200]}
    if failure.is_bug:
        log.error("forwarded_call_failed", extra=fields, exc_info=exc)
    else:
        log.debug("forwarded_call_failed", extra=fields | {"error": failure.text})
    return pb.Answer(code=failure.code.value[0], text=failure.text)
