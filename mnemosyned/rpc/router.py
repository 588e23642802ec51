"""Where a call of a clustered node is answered: by the token's owner, else from the storage.

An owner that cannot be asked costs a call some milliseconds, never its answer: all nodes share one
storage. What is answered here for another node's token never enters this node's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.message import Message
from grpc import StatusCode

from cluster.errors import ClusterError, PeerSkipped
from cluster.forward import Forwarder
from cluster.peerpb import peer_pb2 as pb
from cluster.routing import Forward, Local, route
from cluster.view import View
from mnemosyned.errors import Overloaded
from mnemosyned.rpc.methods import Call
from mnemosyned.rpc.session_manager import Answer, Rpc
from mnemosyned.rpc.status import error_of

if TYPE_CHECKING:
    from mnemosyned.service import SessionService

# The owner could not do it, and this node perhaps can.
_OWNER_IN_TROUBLE: Final = frozenset(
    code.value[0] for code in (StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED)
)


class Services:
    """The same sessions twice: through this node's cache, and past it."""

    def __init__(self, owned: SessionService, passing: SessionService, forwarder: Forwarder) -> None:
        self.owned = owned
        self._passing = passing
        self._forwarder = forwarder

    def answer(self, place: Local, rpc: Rpc, request: Message) -> Answer:
        """Answer here, as the place says."""
        if place.fill_cache:
            return rpc.answer(self.owned, request)
        return self.pass_by(rpc, request, rpc.answer)

    async def pass_by(self, rpc: Rpc, request: Message, do: Callable[[SessionService, Any], Answer]) -> bytes:
        """Answer from the storage for a token that is another's.

        Who owns it is then in doubt, so after a write no copy anywhere is to be trusted.
        """
        try:
            answer = do(self._passing, request)
            return answer if isinstance(answer, bytes) else await answer
        finally:
            if rpc.is_write and rpc.token is not None:
                await self._forwarder.invalidate_everywhere([rpc.token(request)])


class ClusterRouter:
    """Router by the ring."""

    def __init__(
        self,
        services: Services,
        forwarder: Forwarder,
        view: Callable[[], View],
        trace_context: Callable[[Call], Mapping[str, str]],
    ) -> None:
        """`trace_context` returns the W3C headers that the owner's part of a call continues."""
        self._services = services
        self._forwarder = forwarder
        self._view = view
        self._trace_context = trace_context

    def answer(self, rpc: Rpc, request: Message, call: Call) -> Answer:
        """See Router."""
        token = rpc.token(request) if rpc.token is not None else ""
        if not token:
            return rpc.answer(self._services.owned, request)
        place = route(self._view(), token, hops_left=1)
        if isinstance(place, Forward):
            return self._forward(place.owner, rpc, request, call)
        return self._services.answer(place, rpc, request)

    async def _forward(self, owner: str, rpc: Rpc, request: Message, call: Call) -> bytes:
        item = pb.Item(
            method=rpc.name,
            message=request.SerializeToString(),
            request_id=call.metadata("request_id") or call.metadata("x-request-id") or "",
            **self._trace_context(call),  # type: ignore[arg-type]  # its keys are two of the texts
        )
        try:
            answer = await self._forwarder.ask(
                owner, item, is_write=rpc.is_write, time_left_s=call.time_left_s()
            )
        except PeerSkipped:
            return await self._services.pass_by(rpc, request, rpc.answer)
        except (ClusterError, Overloaded):
            return await self._services.pass_by(rpc, request, rpc.again)
        if answer.code in _OWNER_IN_TROUBLE:
            return await self._services.pass_by(rpc, request, rpc.again)
        if answer.code:
            raise error_of(answer.code, answer.text)
        return answer.message


class OwnerRouter:
    """Router of calls that a peer has forwarded: they are answered here, whoever owns the token."""

    def __init__(self, services: Services, view: Callable[[], View]) -> None:
        self._services = services
        self._view = view

    def answer(self, rpc: Rpc, request: Message, _: Call) -> Answer:
        """See Router."""
        token = rpc.token(request) if rpc.token is not None else ""
        place = route(self._view(), token, hops_left=0)
        assert isinstance(place, Local)
        return self._services.answer(place, rpc, request)


def carried(call: Call, names: Iterable[str] = ("traceparent", "tracestate")) -> dict[str, str]:
    """Return the caller's own trace context, for a node that makes no spans."""
    return {name: value for name in names if (value := call.metadata(name))}
