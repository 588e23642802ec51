"""Where a call is handled that another node has forwarded: here, in the cache or past it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from google.protobuf.message import Message

from cluster.routing import CACHED, route
from cluster.view import View
from mnemosyned.api.forwarded import ForwardedCall
from mnemosyned.api.rpc import Gate, Response, Rpc, new_token
from mnemosyned.transport.call import Call

if TYPE_CHECKING:
    from mnemosyned.sessions.mirrors import Mirrors
    from mnemosyned.sessions.service import SessionService

_ENCODED: Final = (bytes, tuple)


class OwnerRouter:
    """The router for calls that a peer has forwarded: handles them here, also if another node owns the token.

    It forwards nothing, so that two nodes that disagree on the ring cannot send a call to and fro. If this
    node does not own the token by its own ring, it handles the call past the cache.
    """

    def __init__(
        self, service: SessionService, *, view: Callable[[], View], gate: Gate, mirrors: Mirrors
    ) -> None:
        self._service = service
        self._view = view
        self._gate = gate
        self._mirrors = mirrors

    def handle(self, rpc: Rpc, request: Message, call: Call) -> Response:
        """See Router."""
        token = rpc.token(request) if rpc.token is not None else ""
        fills_cache = route(self._view(), token, hops_left=0) is CACHED
        if token and not fills_cache:
            self._gate.refuse_ring()
        assert isinstance(call, ForwardedCall)
        if call.is_retry:
            return rpc.retry(self._service, request, call)
        if not (fills_cache and self._gate.is_open()):
            return rpc.handle_uncached(self._service, request, call)
        response = rpc.handle(self._service, request, call)
        if call.mirror_for and rpc.returns_session and isinstance(response, _ENCODED):
            # At once is from the copy, which nothing has dropped since it was read (rule 17).
            call.grant = self._mirrors.grant(token, call.mirror_for)
        return response

    def new_token(self) -> str:
        """See Router. The entry node has chosen a token, unless it is of an early release."""
        return new_token()
