"""Where a call of a clustered node is handled: by the token's owner, otherwise from the storage.

    client ── call ──> entry node ── is the entry node the owner? ── yes ──> its cache, then the storage
                           | no
                           |── forwarded, hop limit 1 ──> owner: its cache, then the storage
                           |       (no answer within 250 ms, or half of the caller's remaining time)
                           └── the storage, past the cache

An owner that does not answer costs a call some milliseconds, never its answer, because all nodes share one
storage. What is handled here for another node's token never enters this node's cache: only the owner keeps
copies, so only the owner must drop them.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Final

from google.protobuf.message import Message

from cluster.errors import ClusterError, PeerSkipped
from cluster.forward import Forwarder
from cluster.peerpb import peer_pb2 as pb
from cluster.routing import Forward, Local, route
from cluster.view import View
from http2.status import StatusCode
from mnemosyned.api.session_manager import Response, Rpc
from mnemosyned.transport.call import Call, Encoded
from mnemosyned.transport.status import error_of

if TYPE_CHECKING:
    from mnemosyned.sessions.service import SessionService

# Statuses by which an owner says that it could not do the work. This node perhaps can.
_OWNER_UNABLE: Final = frozenset(
    code.value for code in (StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED)
)


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
        trace_context: Callable[[Call], Mapping[str, str]],
    ) -> None:
        """Route by what `view` returns at the moment of each call.

        `trace_context` returns the W3C headers that the owner's part of a call continues.
        """
        self._service = service
        self._forwarder = forwarder
        self._view = view
        self._trace_context = trace_context

    def handle(self, rpc: Rpc, request: Message, call: Call) -> Response:
        """See Router."""
        token = rpc.token(request) if rpc.token is not None else ""
        if not token:
            # Also a request whose token is missing: the service has the error that the contract wants.
            return rpc.handle(self._service, request, call)
        place = route(self._view(), token, hops_left=1)
        if isinstance(place, Forward):
            return self._forward(place.owner, token, rpc, request, call)
        return _handle_here(place, self._service, rpc, request, call)

    async def _forward(self, owner: str, token: str, rpc: Rpc, request: Message, call: Call) -> Encoded:
        """Return the owner's response, or handle the call here.

            PeerSkipped            the owner has not seen the call    handle_uncached, at once
            UNAVAILABLE and such   the owner could not do the work    retry
            another ClusterError   the outcome is not known           retry
            another status         the owner's answer is final        raised as that status

        `handle_uncached` is the plain use case. `retry` accepts that the owner may have done the work.
        """
        item = pb.Item(
            method=rpc.name,
            message=request.SerializeToString(),
            request_id=call.metadata("request_id") or call.metadata("x-request-id") or "",
            **self._trace_context(call),  # type: ignore[arg-type]  # its keys are two of the texts
        )
        written = token if rpc.is_write else None
        try:
            answer = await self._forwarder.ask(owner, item, written=written, deadline=call.deadline)
        except PeerSkipped:
            # Nothing was sent, so nothing can follow: a write need not wait.
            return await _awaited(rpc.handle_uncached(self._service, request, call))
        except ClusterError:
            pass
        else:
            if not answer.code:
                return answer.message
            if answer.code not in _OWNER_UNABLE:
                raise error_of(answer.code, answer.text)
        if rpc.is_write:
            # Otherwise the owner's delayed write could be done after the retry, and so after the answer.
            await self._forwarder.wait_until_expired(item)
        return await _awaited(rpc.retry(self._service, request, call))


class OwnerRouter:
    """The router for calls that a peer has forwarded: handles them here, also if another node owns the token.

    It forwards nothing, so that two nodes that disagree on the ring cannot send a call to and fro. If this
    node does not own the token by its own ring, it handles the call past the cache.
    """

    def __init__(self, service: SessionService, *, view: Callable[[], View]) -> None:
        self._service = service
        self._view = view

    def handle(self, rpc: Rpc, request: Message, call: Call) -> Response:
        """See Router."""
        token = rpc.token(request) if rpc.token is not None else ""
        place = route(self._view(), token, hops_left=0)
        assert isinstance(place, Local)
        return _handle_here(place, self._service, rpc, request, call)


def _handle_here(place: Local, service: SessionService, rpc: Rpc, request: Message, call: Call) -> Response:
    handle = rpc.handle if place.fill_cache else rpc.handle_uncached
    return handle(service, request, call)


async def _awaited(response: Response) -> Encoded:
    return await response if isinstance(response, Coroutine) else response
