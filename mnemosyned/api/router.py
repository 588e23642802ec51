"""Where a call of a clustered node is answered: by the token's owner, else from the storage.

An owner that cannot be asked costs a call some milliseconds, never its answer: all nodes share one
storage. What is answered here for another node's token never enters this node's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.message import Message
from grpc import StatusCode

from cluster.errors import ClusterError, PeerSkipped
from cluster.forward import Forwarder
from cluster.peerpb import peer_pb2 as pb
from cluster.routing import Forward, Local, route
from cluster.view import View
from mnemosyned.api.session_manager import Answer, Rpc
from mnemosyned.transport.methods import Call
from mnemosyned.transport.status import error_of

if TYPE_CHECKING:
    from mnemosyned.sessions.service import SessionService

# The owner could not do it, and this node perhaps can.
_OWNER_IN_TROUBLE: Final = frozenset(
    code.value[0] for code in (StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED)
)


class Services:
    """The same sessions twice: through this node's cache, and past it."""

    def __init__(
        self,
        owned: SessionService,
        passing: SessionService,
        forwarder: Forwarder,
        view: Callable[[], View],
    ) -> None:
        self.owned = owned
        self.view = view
        self._passing = passing
        self._forwarder = forwarder

    def answer(self, place: Local, rpc: Rpc, request: Message, call: Call) -> Answer:
        """Answer here, as the place says; it was chosen by the current view."""
        if not place.fill_cache:
            return self.pass_by(rpc, request, call, rpc.answer)
        answer = rpc.answer(self.owned, request, call.deadline.not_after_us)
        if isinstance(answer, bytes) or not rpc.is_write:
            return answer
        return self._written(answer, self.view(), rpc, request, call)

    async def _written(
        self, answer: Coroutine[Any, Any, bytes], view: View, rpc: Rpc, request: Message, call: Call
    ) -> bytes:
        try:
            return await answer
        finally:
            # Whoever else is owner, by another view or by a former one, may have read it before.
            if view.former or self.view() is not view:
                await self._drop_everywhere(rpc, request, call)

    async def pass_by(
        self, rpc: Rpc, request: Message, call: Call, do: Callable[[SessionService, Any, int], Answer]
    ) -> bytes:
        """Answer from the storage for a token that is another's.

        Who owns it is then in doubt, so after a write no copy anywhere is to be trusted.
        """
        try:
            answer = do(self._passing, request, call.deadline.not_after_us)
            return answer if isinstance(answer, bytes) else await answer
        finally:
            if rpc.is_write:
                await self._drop_everywhere(rpc, request, call)

    async def _drop_everywhere(self, rpc: Rpc, request: Message, call: Call) -> None:
        if rpc.token is not None:
            tokens = [rpc.token(request)]
            await self._forwarder.invalidate_everywhere(tokens, deadline=call.deadline)


class ClusterRouter:
    """Router by the ring."""

    def __init__(
        self,
        services: Services,
        forwarder: Forwarder,
        trace_context: Callable[[Call], Mapping[str, str]],
    ) -> None:
        """`trace_context` returns the W3C headers that the owner's part of a call continues."""
        self._services = services
        self._forwarder = forwarder
        self._trace_context = trace_context

    def answer(self, rpc: Rpc, request: Message, call: Call) -> Answer:
        """See Router."""
        token = rpc.token(request) if rpc.token is not None else ""
        if not token:
            return rpc.answer(self._services.owned, request, call.deadline.not_after_us)
        place = route(self._services.view(), token, hops_left=1)
        if isinstance(place, Forward):
            return self._forward(place.owner, token, rpc, request, call)
        return self._services.answer(place, rpc, request, call)

    async def _forward(self, owner: str, token: str, rpc: Rpc, request: Message, call: Call) -> bytes:
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
            return await self._services.pass_by(rpc, request, call, rpc.answer)
        except ClusterError:
            pass
        else:
            if not answer.code:
                return answer.message
            if answer.code not in _OWNER_IN_TROUBLE:
                raise error_of(answer.code, answer.text)
        if rpc.is_write:
            # Begun earlier, this might come before what the owner is still about to do.
            await self._forwarder.wait_until_expired(item)
        return await self._services.pass_by(rpc, request, call, rpc.again)


class OwnerRouter:
    """Router of calls that a peer has forwarded: they are answered here, whoever owns the token."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def answer(self, rpc: Rpc, request: Message, call: Call) -> Answer:
        """See Router."""
        token = rpc.token(request) if rpc.token is not None else ""
        place = route(self._services.view(), token, hops_left=0)
        assert isinstance(place, Local)
        return self._services.answer(place, rpc, request, call)


def carried(call: Call, names: Iterable[str] = ("traceparent", "tracestate")) -> dict[str, str]:
    """Return the caller's own trace context, for a node that makes no spans."""
    return {name: value for name in names if (value := call.metadata(name))}
