"""Where a call of a clustered node is handled: by the token's owner, otherwise from the storage.

    client ── call ──> entry node ── is the entry node the owner? ── yes ──> its cache, then the storage
                           | no
                           |── its mirror of the owner's copy (sessions/mirrors.py)
                           |── forwarded, hop limit 1 ──> owner: its cache, then the storage
                           |       (no answer within 250 ms, or half of the caller's remaining time)
                           └── the storage, past the cache

A node whose own storage does not answer asks other members in its place. A write then first waits until its
own storage can no longer do it.

An owner that does not answer costs a call some milliseconds, never its answer, because all nodes share one
storage. What is read here from the storage for another node's token never enters this node's cache. Besides
the owner, only those nodes keep a copy to which the owner has granted a mirror: so the owner knows who must
drop one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from google.protobuf.message import Message

from aio.around import Around
from aio.deadline import Deadline
from aio.expiry import Expiry
from aio.later import Later, Outcome
from cluster.errors import ClusterError, PeerSkipped
from cluster.forward import Forwarder
from cluster.peerpb import peer_pb2 as pb
from cluster.routing import UNCACHED, Forward, route
from cluster.timing import LEAST_TRY_S, MOST_TRY_S, TRY_S
from cluster.view import View
from http2.status import StatusCode
from mnemosyned.api.own_try import Limit, OwnTry
from mnemosyned.api.rpc import Gate, Response, Rpc, new_token
from mnemosyned.errors import DeadlineExceeded, StorageUnavailable
from mnemosyned.sessions.mirrors import Grant
from mnemosyned.transport.call import Call, Encoded
from mnemosyned.transport.status import error_of

if TYPE_CHECKING:
    from cache.read_through import Fill
    from mnemosyned.sessions.encoded import EncodedSession
    from mnemosyned.sessions.mirrors import Mirrors
    from mnemosyned.sessions.service import SessionService

_NO_ANSWER: Final = "mnemosyned: storage: no answer in time"
# Members that a call is sent to, one after the other.
_MOST_ASKED: Final = 2
# New tokens that are drawn for one of this node's own. A draw costs a thirtieth of a hop, and one of as many
# as there are nodes succeeds: with more nodes than that it does not pay.
_MOST_DRAWN: Final = 12
_MOST_NODES: Final = 32
_ENCODED: Final = (bytes, tuple)
# Statuses by which a node says that it could not do the work. Another one perhaps can.
_UNABLE: Final = frozenset(code.value for code in (StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED))


class ClusterRouter:
    """The router for calls of clients: handles calls for own tokens, and forwards the others.

    A call without a token (List, Delete) concerns no owner. It is handled here, on the storage.
    """

    def __init__(
        self,
        service: SessionService,
        forwarder: Forwarder,
        *,
        view: Callable[[], View],
        gate: Gate,
        mirrors: Mirrors,
        is_away: Callable[[], bool],
        trace_context: Callable[[Call], Mapping[str, str]],
    ) -> None:
        """Route by what `view` returns at the moment of each call.

        `trace_context` returns the W3C headers that the owner's part of a call continues.
        """
        self._service = service
        self._forwarder = forwarder
        self._view = view
        self._gate = gate
        self._mirrors = mirrors
        self._is_away = is_away
        self._turn = 0
        self._expiry = Expiry(Limit.expire)
        # Calls that wait for this node's storage.
        self._laters: set[Later[Encoded]] = set()
        self._waiting: set[asyncio.Task[Any]] = set()
        self._leaving: set[asyncio.Task[Any]] = set()  # those that no longer shall
        self._trace_context = trace_context

    def handle(self, rpc: Rpc, request: Message, call: Call) -> Response:
        """See Router."""
        token = rpc.token(request) if rpc.token is not None else ""
        view = self._view()
        if call.owner is not None and token:
            call.owner = view.public_by_name.get(view.ring.owner(token), "")
        # Also a request whose token is missing: the service has the error that the contract wants.
        place = route(view, token, hops_left=1) if token else UNCACHED
        if isinstance(place, Forward):
            return self._handle_foreign(view, place.owner, rpc, request, call, token=token)
        own = OwnTry(call, self._expiry) if rpc.is_write and view.address_by_name else call
        if place.fill_cache and self._gate.is_open():
            response = rpc.handle(self._service, request, own)
        else:
            if token and not place.fill_cache:
                self._gate.refuse_ring()
            response = rpc.handle_uncached(self._service, request, own)
        # As in transport/call.py, faster than asking for a Coroutine.
        if isinstance(response, bytes) or isinstance(response, tuple) or not view.address_by_name:  # noqa: SIM101
            return response
        here = _Here(rpc, request, call, own)
        if isinstance(response, Later):
            return self._later_here_or_elsewhere(here, response)
        return Around(response, partial(self._here_or_elsewhere, here))

    def new_token(self) -> str:
        """See Router.

        A session that this node owns is started without a hop.
        """
        view, token = self._view(), new_token()
        if view.routed and len(view.ring.nodes) <= _MOST_NODES:
            for _ in range(_MOST_DRAWN - 1):
                if view.owns(token):
                    break
                token = new_token()
        return token

    def _handle_foreign(
        self, view: View, owner: str, rpc: Rpc, request: Message, call: Call, *, token: str
    ) -> Response:
        """Handle a call for another node's token: by a mirror, or by the owner."""
        now_us = 0 if rpc.mirrored is None else self._mirrors.open_at(view, token, owner)
        if now_us:
            mirror = self._mirrors.cache.peek(token, now_us=now_us)
            if mirror is not None and rpc.mirrored is not None:
                return rpc.mirrored(self._service, token, mirror)
        if self._is_away():
            return self._elsewhere(rpc, request, call, first=owner)
        return self._forward(view, owner, rpc, request, call, token=token, asked_us=now_us)

    def _later_here_or_elsewhere(self, here: _Here, response: Later[Encoded]) -> Response:
        """Do what `_here_or_elsewhere` does, without a task while all is well."""
        if self._is_away() and self._members():
            response.cancel()
            return self._elsewhere(here.rpc, here.request, here.call)
        limit = here.own.limited(partial(_give_up, response)) if isinstance(here.own, OwnTry) else None
        self._laters.add(response)
        return response.through(partial(self._answered_here, here, response, limit))

    def _answered_here(
        self, here: _Here, response: Later[Encoded], limit: Limit | None, outcome: Outcome[Encoded]
    ) -> Outcome[Encoded]:
        self._laters.discard(response)
        if limit is not None:
            limit.leave = None
        if isinstance(outcome, _ENCODED):
            return outcome
        if isinstance(outcome, DeadlineExceeded | StorageUnavailable):
            return self._after_failure(here, outcome)
        if not isinstance(outcome, BaseException):
            # It is done, and waits for other nodes' copies.
            return Around(outcome, partial(self._begun_here, here))
        return outcome

    async def _here_or_elsewhere(self, here: _Here, response: Coroutine[Any, Any, Encoded]) -> Encoded:
        """Return what this node's storage answers; without one, what that of another member does."""
        if self._is_away() and self._members():
            response.close()
            return await self._elsewhere(here.rpc, here.request, here.call)
        return await self._begun_here(here, response)

    async def _begun_here(self, here: _Here, response: Coroutine[Any, Any, Encoded]) -> Encoded:
        try:
            return await self._unless_left(response, here.own)
        except (DeadlineExceeded, StorageUnavailable) as exc:
            failure = exc
        return await self._after_failure(here, failure)

    async def _after_failure(self, here: _Here, failure: DeadlineExceeded | StorageUnavailable) -> Encoded:
        """Return what another try answers after the one of this node's storage. Raises the failure."""
        rpc, request, call, own = here
        if isinstance(failure, DeadlineExceeded):
            left_s = _deadline(rpc, call).left_s()
            if not rpc.is_write or (left_s is not None and left_s < LEAST_TRY_S):
                raise failure
            # The storage is slow: it refused the try as late, and has not done it. The caller may have time.
            return await self._here(rpc, request, call, is_retry=False)
        if not (isinstance(failure, _Left) or self._members()):
            raise failure
        if isinstance(own, OwnTry) and failure.is_under_way:
            # Otherwise this node's delayed write could be done after the retry, and so after the answer.
            await asyncio.sleep(max(0.0, own.until_s - time.monotonic()))
        return await self._elsewhere(rpc, request, call, is_retry=rpc.is_write)

    async def _unless_left(self, response: Coroutine[Any, Any, Encoded], own: Call) -> Encoded:
        """Await what this node's storage answers. Raises _Left when it is not waited for."""
        task = asyncio.current_task()
        assert task is not None
        self._waiting.add(task)
        limit = own.limited(partial(self._leave, task)) if isinstance(own, OwnTry) else None
        try:
            return await response
        except asyncio.CancelledError:
            # By `_leave`; or by the caller too, which counts.
            if task not in self._leaving or task.uncancel():
                raise
            raise _Left(_NO_ANSWER) from None
        finally:
            self._waiting.discard(task)
            self._leaving.discard(task)
            if limit is not None:
                limit.leave = None

    def leave_storage(self) -> None:
        """Have the calls that wait for this node's storage ask another member: it does not answer."""
        if self._members():
            for task in list(self._waiting):
                self._leave(task)
            for response in list(self._laters):
                _give_up(response)

    def _leave(self, task: asyncio.Task[Any]) -> None:
        if task in self._waiting:
            self._waiting.discard(task)
            self._leaving.add(task)
            task.cancel()

    def _members(self) -> list[str]:
        """Return the members of the ring besides this node, another one first each time."""
        view = self._view()
        names = [name for name in view.ring.nodes if name in view.address_by_name]
        self._turn += 1
        turn = self._turn % len(names) if names else 0
        return names[turn:] + names[:turn]

    async def _elsewhere(
        self, rpc: Rpc, request: Message, call: Call, *, first: str = "", is_retry: bool = False
    ) -> Encoded:
        """Return what another member answers, `first` if it is given: this node's storage does not.

        There is nothing to fall back on. The first member that is asked therefore gets a part of the time,
        and the next one all that is left. `is_retry` tells that an earlier try may have done the work.
        """
        members = [name for name in (first, *self._members()) if name and self._forwarder.may_ask(name)]
        names = list(dict.fromkeys(members))[:_MOST_ASKED]
        if rpc.token is not None and len(names) == 1:
            # A short try shares its batch with others, which costs less. It nearly always suffices.
            names *= 2
        deadline = _deadline(rpc, call)
        left_s = deadline.left_s()
        if rpc.is_write and left_s is not None and left_s <= 0:
            # It lay in the socket of this process while that stood still: nobody would do it.
            raise DeadlineExceeded
        item = self._item(rpc, request, call)
        for number, name in enumerate(names, start=1):
            if is_retry:
                item.method, item.retried_method = "", rpc.name
            if number == len(names):
                try_s = deadline.whole_s(MOST_TRY_S)
            else:
                try_s = deadline.share_s(MOST_TRY_S if rpc.token is None else TRY_S)
            answer = await self._ask(name, rpc, item, deadline, try_s=try_s)
            if not isinstance(answer, _Unanswered):
                return answer
            is_retry |= rpc.is_write and answer is not _Unanswered.UNSEEN
        # No member can. This node's storage may answer again.
        return await self._here(rpc, request, call, is_retry=is_retry)

    def _forward(
        self, view: View, owner: str, rpc: Rpc, request: Message, call: Call, *, token: str, asked_us: int
    ) -> Response:
        """Return the owner's response, or handle the call here; with `asked_us`, a mirror may be kept."""
        left_s = call.deadline.left_s()
        if left_s is not None and left_s <= 0:
            raise DeadlineExceeded
        item = self._item(rpc, request, call)
        try:
            answer = self._forwarder.ask(owner, item, is_write=rpc.is_write, deadline=_deadline(rpc, call))
        except PeerSkipped:
            return self._here(rpc, request, call, is_retry=False)
        # It is sent after this step.
        if asked_us and rpc.returns_session:
            item.mirror_for = view.me
            fill = self._mirrors.cache.begin_fill(token)
            answer = answer.through(partial(self._keep, fill, owner, asked_us))
        return answer.through(partial(self._forwarded, rpc, request, call, item))

    def _keep(
        self, fill: Fill[EncodedSession], owner: str, asked_us: int, outcome: Outcome[pb.Answer]
    ) -> Outcome[pb.Answer]:
        """Keep what the owner has answered, if it grants a mirror."""
        with fill:
            if isinstance(outcome, pb.Answer) and outcome.keep_us and not outcome.code:
                grant = Grant(outcome.keep_us, outcome.instance, outcome.expires_at_us)
                self._mirrors.keep(fill, owner, outcome.message, grant, asked_us=asked_us)
        return outcome

    def _forwarded(
        self, rpc: Rpc, request: Message, call: Call, item: pb.Item, outcome: Outcome[pb.Answer]
    ) -> Outcome[Encoded]:
        """Return the owner's response, or a coroutine that handles the call here."""
        answer = _taken(item, outcome)
        if isinstance(answer, bytes):
            return answer
        return self._instead(rpc, request, call, item, answer)

    async def _instead(
        self, rpc: Rpc, request: Message, call: Call, item: pb.Item, known: _Unanswered
    ) -> Encoded:
        """Handle a call here that its owner has not answered."""
        await self._until_over(rpc, item, known, _deadline(rpc, call))
        return await self._here(rpc, request, call, is_retry=known is not _Unanswered.UNSEEN)

    async def _here(self, rpc: Rpc, request: Message, call: Call, *, is_retry: bool) -> Encoded:
        """Handle the call past the cache; a retry accepts that the work may be done already."""
        return await _awaited((rpc.retry if is_retry else rpc.handle_uncached)(self._service, request, call))

    def _item(self, rpc: Rpc, request: Message, call: Call) -> pb.Item:
        return pb.Item(
            method=rpc.name,
            message=request.SerializeToString(),
            request_id=call.metadata("request_id") or call.metadata("x-request-id") or "",
            **self._trace_context(call),  # type: ignore[arg-type]  # its keys are two of the texts
        )

    async def _ask(
        self, name: str, rpc: Rpc, item: pb.Item, deadline: Deadline, *, try_s: float
    ) -> bytes | _Unanswered:
        """Return the answer of a node, or what is known if it gives none and nothing follows any more."""
        outcome: pb.Answer | ClusterError
        try:
            outcome = await self._forwarder.ask(
                name, item, is_write=rpc.is_write, deadline=deadline, try_s=try_s
            )
        except ClusterError as exc:
            outcome = exc
        answer = _taken(item, outcome)
        if isinstance(answer, _Unanswered):
            await self._until_over(rpc, item, answer, deadline)
        return answer

    async def _until_over(self, rpc: Rpc, item: pb.Item, known: _Unanswered, deadline: Deadline) -> None:
        """Return when the node that was asked does the work no more: at once for a read.

        Raises:
            StorageUnavailable: that would take all the time that the caller has, and leave none for a retry.
        """
        if rpc.is_write and known is _Unanswered.UNKNOWN:
            left_s = deadline.left_s()
            if left_s is not None and self._forwarder.expires_in_s(item) > left_s - LEAST_TRY_S:
                raise StorageUnavailable("mnemosyned: storage: unavailable; the change may have been made")
            # Otherwise the node's delayed write could be done after the retry, and so after the answer.
            await self._forwarder.wait_until_expired(item)


class _Left(StorageUnavailable):
    """A call no longer waits for this node's storage, which is in doubt but may do the work."""


def _give_up(response: Later[Encoded]) -> None:
    response.give_up(_Left(_NO_ANSWER))


class _Here(NamedTuple):
    """A call that this node's storage is asked for; `own` is the same call, with its limits for a write."""

    rpc: Rpc
    request: Message
    call: Call
    own: Call


class _Unanswered(Enum):
    """What is known of a call that a node has not answered."""

    UNSEEN = "unseen"  # it has not begun it
    UNKNOWN = "unknown"  # it may have done it, and does it no more


def _taken(item: pb.Item, outcome: Outcome[pb.Answer]) -> bytes | _Unanswered:
    """Return the answer of a node, or what is known if it gives none.

    PeerSkipped            the node has not seen the call     UNSEEN
    UNAVAILABLE and such   the node could not do the work     UNKNOWN
    another ClusterError   the outcome is not known           UNKNOWN
    another status         the node's answer is final         raised as that status
    """
    if isinstance(outcome, pb.Answer):
        if not outcome.code:
            return outcome.message
        if item.retried_method and outcome.code == StatusCode.UNIMPLEMENTED.value:
            # A node of the former release knows no retries.
            return _Unanswered.UNSEEN
        if outcome.code not in _UNABLE:
            raise error_of(outcome.code, outcome.text)
    elif isinstance(outcome, PeerSkipped):
        # Nothing was sent, so nothing can follow: a write need not wait.
        return _Unanswered.UNSEEN
    elif not isinstance(outcome, ClusterError):
        assert isinstance(outcome, BaseException)
        raise outcome
    return _Unanswered.UNKNOWN


def _deadline(rpc: Rpc, call: Call) -> Deadline:
    return call.deadline.of_write() if rpc.is_write else call.deadline


async def _awaited(response: Response) -> Encoded:
    return response if isinstance(response, bytes | tuple) else await response
