"""The Peer service: what other nodes of the cluster may ask of this node.

    method      | asked by                        | effect here
    ------------+---------------------------------+--------------------------------------------------
    Gossip      | cluster/gossip.py of a peer     | the membership protocol takes one packet
    Forward     | cluster/forward.py of a peer    | calls of clients, for tokens that this node owns
    Invalidate  | cluster/forward.py of a peer    | the copies of the named tokens are dropped
    Leave       | `mnemosyned cluster leave`      | this node drains and ends, as on SIGTERM

The service is on the same port as the SessionManager, so every client can reach it. Two checks stand before
each method:

- The guard: the caller is a node of this cluster (cluster/peer_auth.py). It has signed the call with the
  cluster's secret, or has shown a node's certificate.
- The origin: the caller's cluster and storage are those of this node, and the message is for this node.
  A signature does not show that, because a repeated message keeps its signature. Gossip checks the origin
  itself, so that a refusal reaches the other node as an answer.

A forwarded call
----------------
Peers send calls in batches over a stream. A stream costs half of what one call for each batch costs.

    entry node                           this node (the owner)
       |-- metadata: opening signature ----->|  _check, once for the stream
       |-- batch 1, seal 1 ----------------->|  the seal covers the number and the opening
       |                                     |    _begin: an item that the cache has is answered at once
       |                                     |    _gathered: the other items wait for the storage together
       |<-- answers 1, one for each item ----|
       |-- batch 2, seal 2 ----------------->|
       |                    ...              |
       |<-- trailers: OK --------------------|  between two batches: `close`

One batch is under way on a stream at a time. An item fails alone: its error becomes the status of its answer.
An error of the batch (a wrong seal, a wrong origin, bytes that are no message) ends the stream.

What the entry node has already done for an item, and this node therefore does not do:

- It has asked for the API key or the certificate of the client (api/auth.py).
- It has chosen the token of a Start, so that a repeated Start is the same call.

How a stream ends
-----------------
A batch under way is never cut off, because the entry node would then not know whether its writes were done.
A stream is therefore in one of two states:

- Waiting for a batch: its task is in `_waiting`, and is cancelled at once.
- Working on a batch: its task is not in `_waiting`. It looks at `_is_closed` before it waits again.

`close` ends all streams and lets no other begin to wait. A new certificate ends none: connections that are
open keep the one that they began with, and the peer that has the new one dials with it (cluster/peers.py).

Late items
----------
An item carries `deadline_us`, an instant on the storage's clock: from then on the entry node may do the work
itself. Two nodes' estimates of that clock differ by less than `CLOCK_ERROR_US`, hence two rules:

- An item that arrives after `deadline_us` plus that error is not begun. It was held up by a stalled process
  or network, and the entry node has already asked the storage.
- A write of an item is not done after `deadline_us` minus that error. The statement itself checks it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, Protocol

from aio.around import Around
from aio.later import Later, Outcome
from aio.rate_limit import LogRateLimiter, fields_of
from cluster.errors import MalformedPacket, UnauthenticatedPeer
from cluster.gossip import Gossip
from cluster.peer_auth import HELLO, METADATA_KEY, PeerAuth, PeerKey
from cluster.peerpb import peer_pb2 as pb
from cluster.signing import SERVICE_NAME
from cluster.wire import max_request_bytes
from http2.status import StatusCode
from mnemosyned.api import session_manager
from mnemosyned.api.forwarded import CLOCK_ERROR_US, Arrival, ForwardedCall
from mnemosyned.api.parsing import parsed
from mnemosyned.errors import (
    DeadlineExceeded,
    MalformedMessage,
    NotOurCluster,
    Unauthenticated,
    Unimplemented,
)
from mnemosyned.sessions.encoded import joined
from mnemosyned.transport.call import Call, Encoded, await_in_time, failure_of
from mnemosyned.transport.methods import MethodTable, UnaryHandler

log = logging.getLogger(__name__)

METHODS: Final = (HELLO, "Gossip", "Forward", "Invalidate", "Leave")
# What a proxy adds. Behind a proxy on this node's own host every caller seems to be on this host.
_PROXY_KEYS: Final = ("forwarded", "x-forwarded-for", "x-real-ip", "via")
# A table of many thousand members fits. A batch may also be one request of the largest size that a client may
# send, plus the fields of its item; `add_to` takes the larger of the two.
_MAX_MESSAGE_BYTES: Final = 8 * 1024**2
_MAX_HELLO_BYTES: Final = 1024
_ITEM_OVERHEAD_BYTES: Final = 64 * 1024
# Below the largest message that the entry node accepts, or the whole batch would fail. The entry node gets
# the answers beyond this limit from the storage.
_MAX_RESPONSE_BYTES: Final = 32 * 1024**2
_METHOD_PREFIX: Final = f"/{session_manager.SERVICE_NAME}/"
_BUGS: Final = LogRateLimiter(10)

_Handler = Callable[[bytes, Call], bytes | Coroutine[Any, Any, bytes]]


class Copies(Protocol):
    """What this node has of sessions besides the storage."""

    def drop(self, keys: Sequence[str] | None) -> int:
        """Drop the copies of these sessions, None: of all; return this process, as its lease names it."""
        ...

    async def have_ends_settled(self) -> bool:
        """Wait for what this node is ending now; tell whether all that it has ended is settled."""
        ...


class PeerService:
    """Gossip, forwarded calls, invalidations and the order to leave; one for each node, on its event loop."""

    def __init__(
        self,
        name: str,
        peer_auth: PeerAuth,
        gossip: Callable[[], Gossip],
        calls: MethodTable,
        *,
        storage_now_us: Callable[[], int],
        copies: Copies,
        stop: Callable[[], None],
    ) -> None:
        """Wire the service to the parts of the node of this name.

        - `peer_auth` decides who is a peer, and proves the answers.
        - `gossip` returns the membership. It is asked with each call, because the port listens before the
          membership begins; until then it raises StorageUnavailable.
        - `calls` handles forwarded calls. It is not the table of clients: nothing in it forwards again, and
          nothing in it asks for an API key.
        - `storage_now_us` is the storage's clock, in microseconds since the epoch.
        - `copies` are this node's.
        - `stop` begins the drain of this node, and returns at once.
        """
        self._name = name
        self._peer_auth = peer_auth
        self._gossip = gossip
        self._calls = calls
        self._storage_now_us = storage_now_us
        self._copies = copies
        self._stop = stop
        self._waiting: set[asyncio.Task[Any]] = set()  # tasks of the streams without a batch under way
        self._is_closed = False

    def add_to(self, table: MethodTable, *, max_message_bytes: int, max_members: int) -> None:
        """Add the methods to a table, behind the guard.

        `max_message_bytes` is the limit for clients, `max_members` the bound of a cluster.
        """
        limit = max(_MAX_MESSAGE_BYTES, max_message_bytes + _ITEM_OVERHEAD_BYTES)
        handlers: dict[str, tuple[_Handler, int]] = {
            "Gossip": (self._receive_packet, max_request_bytes(max_members)),
            "Invalidate": (self._invalidate, limit),
            "Leave": (self._leave, _MAX_HELLO_BYTES),
        }
        for name, (handle, max_bytes) in handlers.items():
            table.add_unary(SERVICE_NAME, name, self._guarded(name, handle), max_message_bytes=max_bytes)
        table.add_unary(SERVICE_NAME, HELLO, self._hello, max_message_bytes=_MAX_HELLO_BYTES)
        table.add_stream(SERVICE_NAME, "Forward", self._forward, max_message_bytes=limit)

    def close(self) -> None:
        """End the streams of forwarded calls, now and from now on, each when its batch is answered.

        A node that leaves calls it once the peers route by a ring without this node.
        """
        self._is_closed = True
        for task in self._waiting:
            task.cancel()

    def _guarded(self, method: str, handle: _Handler) -> UnaryHandler:
        """Return a handler that answers peers only, each with a proof."""

        def guarded(message: bytes, call: Call) -> bytes | Coroutine[Any, Any, bytes]:
            key = self._checked(method, message, call)
            answer = handle(message, call)
            signature = call.metadata(METADATA_KEY) or ""
            return (
                _sealed(answer, key, signature)
                if isinstance(answer, bytes)
                else later(answer, key, signature)
            )

        async def later(answer: Coroutine[Any, Any, bytes], key: PeerKey, signature: str) -> bytes:
            with _malformed_as_status():
                return _sealed(await answer, key, signature)

        return guarded

    def _checked(self, method: str, body: bytes, call: Call) -> PeerKey:
        """Return the key for the answer to a peer. Raises Unauthenticated if the caller is none."""
        if not self._peer_auth.demands_proof and any(map(call.metadata, _PROXY_KEYS)):
            raise Unauthenticated(
                "mnemosyned: this node has no -cluster.secret and takes no peers from a proxy"
            )
        try:
            return self._peer_auth.check(
                call.metadata(METADATA_KEY),
                method,
                body,
                certificate_names=call.certificate_names,
                peer=call.peer,
                now_ms=time.time_ns() // 1_000_000,
            )
        except UnauthenticatedPeer as exc:
            raise _as_status(exc) from None

    def _hello(self, message: bytes, call: Call) -> bytes:
        key = self._checked(HELLO, message, call)
        callee = parsed(pb.HelloRequest, message).callee
        if callee not in ("", self._name):
            # With a proof from here, the caller would send what is for that node.
            raise NotOurCluster(f"mnemosyned: this node is {self._name}, and the call is for another one")
        proof = self._peer_auth.proof(call.metadata(METADATA_KEY) or "", key)
        return pb.HelloResponse(process=self._peer_auth.process, proof=proof).SerializeToString()

    def _receive_packet(self, message: bytes, _: Call) -> bytes | Coroutine[Any, Any, bytes]:
        with _malformed_as_status():
            return self._gossip().answer(message)

    async def _forward(self, messages: AsyncIterator[bytes], call: Call) -> AsyncIterator[bytes]:
        # The opening signs an empty body, since no batch is there yet. It is accepted once, and each seal
        # covers it: without it a batch of another stream could be played back here.
        key = self._checked("Forward", b"", call)
        batches, answers = key.stream_macs(call.metadata(METADATA_KEY) or "")
        async for message in self._until_closed(messages):
            request = parsed(pb.ForwardRequest, message)
            # Before the batch is parsed: bytes of an unauthenticated peer should reach little code.
            try:
                batches.check(request.seal, request.batch)
            except UnauthenticatedPeer as exc:
                raise _as_status(exc) from None
            handled = self._handle_batch(parsed(pb.Batch, request.batch), call)
            answer = handled if isinstance(handled, bytes) else await handled
            yield pb.ForwardResponse(answers=answer, seal=answers.seal(answer)).SerializeToString()

    async def _until_closed(self, messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield the messages of a stream until the peer or `close` ends it."""
        task = asyncio.current_task()
        assert task is not None
        while not self._is_closed:
            self._waiting.add(task)
            try:
                message = await anext(messages)
            except StopAsyncIteration:
                return
            except asyncio.CancelledError:
                # By `close`, unless the engine has cancelled the task too, because the peer's
                # connection broke. `uncancel` takes one request back and returns how many are left. With
                # none left the stream ends cleanly; otherwise the cancellation must go on.
                if self._is_closed and not task.uncancel():
                    return
                raise
            finally:
                self._waiting.discard(task)
            yield message

    def _handle_batch(self, batch: pb.Batch, call: Call) -> bytes | Coroutine[Any, Any, bytes]:
        """Return the answers at once if the cache has all of them: that saves a task switch."""
        self._check_origin(batch.origin)
        answers = pb.Answers()
        add = answers.answers.add
        arrival = Arrival(self._storage_now_us(), time.monotonic(), call.peer)
        works = [self._begin(item, add(), arrival) for item in batch.items]
        waiting = [work for work in works if work is not None]
        return _gathered(waiting, answers) if waiting else _response(answers)

    def _begin(
        self, item: pb.Item, answer: pb.Answer, arrival: Arrival
    ) -> Later[None] | Coroutine[Any, Any, None] | None:
        """Fill an item's answer in if the cache has it, otherwise return what does so."""
        retried_name = item.retried_method
        name = retried_name or item.method
        method = self._calls.unary.get(_METHOD_PREFIX + name)
        if method is None:
            _fail(answer, item, Unimplemented(f"mnemosyned: unknown method {name[:100]}"))
            return None
        if arrival.storage_us > item.deadline_us + CLOCK_ERROR_US:
            # Begun now, a write could follow the one that the entry node has done itself.
            _fail(answer, item, DeadlineExceeded())
            return None
        forwarded = ForwardedCall(item, arrival, is_retry=bool(retried_name))
        try:
            response = method.handle(item.message, forwarded)
        except Exception as exc:  # noqa: BLE001  # the root of a call: becomes its status
            _fail(answer, item, exc)
            return None
        # As in transport/call.py, faster than asking for a Coroutine.
        if not (isinstance(response, bytes) or isinstance(response, tuple)):  # noqa: SIM101
            if isinstance(response, Later):
                return response.through(partial(_fill_in, item, answer, forwarded))
            return Around(response, partial(_finish, item, answer, forwarded))
        answer.message = joined(response)
        if (grant := forwarded.grant) is not None:
            answer.keep_us, answer.instance, answer.expires_at_us = grant
        return None

    def _invalidate(self, message: bytes, _: Call) -> bytes | Coroutine[Any, Any, bytes]:
        # Nothing is awaited between the parsing and the answer. When the answer is on the wire the copies are
        # gone and the gates of fills under way are closed: the writer may then acknowledge its write.
        request = parsed(pb.InvalidateRequest, message)
        self._check_origin(request.origin)
        answer = pb.InvalidateResponse(
            instance=self._copies.drop(None if request.everything else request.tokens)
        )
        return self._after_ends(answer) if request.await_ends else answer.SerializeToString()

    async def _after_ends(self, answer: pb.InvalidateResponse) -> bytes:
        answer.have_ends_settled = await self._copies.have_ends_settled()
        return answer.SerializeToString()

    def _leave(self, message: bytes, call: Call) -> bytes:
        if not self._peer_auth.demands_proof:
            raise Unauthenticated(
                "mnemosyned: this node has neither -cluster.secret nor -tls.peer-names: end it by SIGTERM"
            )
        # The command names its node, and not an origin: it knows no storage.
        if parsed(pb.LeaveRequest, message).node != self._name:
            raise NotOurCluster(f"mnemosyned: this node is {self._name}, and the call is for another one")
        log.info("asked_to_leave", extra={"peer": call.peer})
        self._stop()
        return pb.LeaveResponse().SerializeToString()

    def _check_origin(self, origin: pb.Origin) -> None:
        objection = self._gossip().objection(origin)
        if objection:
            raise NotOurCluster(f"mnemosyned: {objection}")


@contextmanager
def _malformed_as_status() -> Iterator[None]:
    try:
        yield
    except MalformedPacket as exc:
        raise MalformedMessage(f"mnemosyned: {exc}") from None


def _sealed(answer: bytes, key: PeerKey, signature: str) -> bytes:
    return pb.SealedAnswer(answer=answer, seal=key.seal(signature, answer)).SerializeToString()


def _as_status(exc: UnauthenticatedPeer) -> Unauthenticated:
    # `cluster` has errors of its own, since it may not import the daemon's. The text helps the people who run
    # the calling node; it says which setting to look at, and nothing of the secret.
    return Unauthenticated(f"mnemosyned: {exc}")


async def _gathered(waiting: list[Later[None] | Coroutine[Any, Any, None]], answers: pb.Answers) -> bytes:
    """Wait for all answers, which none of these raises; if the stream is cancelled, all of them are."""
    laters = [work for work in waiting if isinstance(work, Later)]
    others = [work for work in waiting if not isinstance(work, Later)]
    try:
        if len(others) == 1:
            # Without a task of its own, and the two turns of the loop that one takes.
            await others[0]
        elif others:
            # Together, so that the items share one batch of the storage.
            await asyncio.gather(*others)
        # These have begun.
        for later in laters:
            await later
    finally:
        for later in laters:
            later.close()
    return _response(answers)


def _response(answers: pb.Answers) -> bytes:
    """Return the answers in the sequence of their items, which is how the entry node tells them apart."""
    size_bytes = 0
    for answer in answers.answers:
        size_bytes += len(answer.message)
        if size_bytes > _MAX_RESPONSE_BYTES:
            # UNAVAILABLE sends the entry node to the storage (router.py). If the item was a write that is
            # done, the entry node's retry accepts that, as after a lost connection.
            answer.CopyFrom(_TOO_LARGE)
    return answers.SerializeToString()


_TOO_LARGE: Final = pb.Answer(
    code=StatusCode.UNAVAILABLE.value, text="mnemosyned: the batch's answers are too large together"
)


def _fill_in(
    item: pb.Item, answer: pb.Answer, call: ForwardedCall, outcome: Outcome[Encoded]
) -> Outcome[None]:
    """Fill an answer in that was not known at once, as a step of a Later."""
    if isinstance(outcome, bytes | tuple):
        answer.message = joined(outcome)
        return None
    if isinstance(outcome, Exception):
        _fail(answer, item, outcome)
        return None
    if isinstance(outcome, BaseException):
        raise outcome
    return Around(outcome, partial(_finish, item, answer, call))


async def _finish(
    item: pb.Item, answer: pb.Answer, call: ForwardedCall, response: Coroutine[Any, Any, Encoded]
) -> None:
    try:
        answer.message = joined(await await_in_time(response, call))
    except Exception as exc:  # noqa: BLE001  # the root of a call: becomes its status
        _fail(answer, item, exc)


def _fail(answer: pb.Answer, item: pb.Item, exc: Exception) -> None:
    # Only a bug is logged above DEBUG. What the client gets in the end is logged at the entry node, with the
    # client's address.
    failure = failure_of(exc)
    method = (item.retried_method or item.method)[:100]
    fields = {"method": method, "code": failure.code.name, "request_id": item.request_id[:200]}
    if failure.is_bug:
        left_out = _BUGS.take(time.monotonic())
        if left_out is not None:
            log.error("forwarded_call_failed", extra=fields | fields_of(left_out), exc_info=exc)
    else:
        log.debug("forwarded_call_failed", extra=fields | {"error": failure.text})
    answer.code, answer.text = failure.code.value, failure.text
