"""The SessionManager service: protobuf messages to use cases and back."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias, TypeVar

from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.protobuf.wrappers_pb2 import BoolValue, Int64Value
from mnemosynerpc.session_pb2 import (
    AbandonRequest,
    DeleteRequest,
    ExistsRequest,
    GetRequest,
    ListRequest,
    SetValueRequest,
    SetValueResponse,
    StartRequest,
)

from mnemosyned.errors import InvalidArgument, MalformedMessage, SessionNotFound
from mnemosyned.sessions import bag
from mnemosyned.sessions.model import (
    TOKEN_ENTROPY_BYTES,
    Abandonment,
    Criteria,
    NewSession,
    ValueChange,
    generate_token,
)
from mnemosyned.sessions.service import SessionService
from mnemosyned.transport.methods import Call, MethodTable, UnaryAnswer

SERVICE_NAME: Final = "mnemosynerpc.SessionManager"

_TRUE: Final = BoolValue(value=True).SerializeToString()
_FALSE: Final = BoolValue(value=False).SerializeToString()
_US_PER_S: Final = 1_000_000
_NS_PER_US: Final = 1000
# What a Timestamp may hold: the years 1 to 9999.
_TIMESTAMP_SECONDS: Final = range(-62_135_596_800, 253_402_300_800)
_TIMESTAMP_NANOS: Final = range(1_000_000_000)

Request = TypeVar("Request", bound=Message)


Answer: TypeAlias = bytes | Coroutine[Any, Any, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rpc:
    """One RPC, from request to serialized response; which service answers is another's choice.

    `token` reads the token whose owner should answer; without it the call is answered where it
    arrives. `again` answers when an earlier try may have done the work already. Both take the call's
    `not_after_us` last.
    """

    name: str
    kind: Callable[[], Message]
    answer: Callable[[SessionService, Any, int], Answer]
    token: Callable[[Any], str] | None = None
    is_write: bool = False
    again: Callable[[SessionService, Any, int], Answer]


class Router(Protocol):
    """Who chooses where a call is answered."""

    def answer(self, rpc: Rpc, request: Message, call: Call) -> Answer:
        """Answer here or elsewhere."""
        ...


def add_to(table: MethodTable, router: Router) -> None:
    """Serve the RPCs under their names, the older ones included."""
    for name, rpc in RPCS.items():
        table.add_unary(SERVICE_NAME, name, _answer(rpc, router))
    table.add_unary(SERVICE_NAME, "Create", _answer(RPCS["Start"], router))
    table.add_unary(SERVICE_NAME, "SetData", _answer(RPCS["SetValue"], router))
    table.add_unary(SERVICE_NAME, "Context", _context(router))


class Here:
    """Router of a node without others: everything is answered by its own service."""

    def __init__(self, service: SessionService) -> None:
        self._service = service

    def answer(self, rpc: Rpc, request: Message, call: Call) -> Answer:
        """See Router."""
        return rpc.answer(self._service, request, call.deadline.not_after_us)


def _answer(rpc: Rpc, router: Router) -> UnaryAnswer:
    if rpc.name == "Start":

        def start(message: bytes, call: Call) -> Answer:
            request = parsed(StartRequest, message)
            if request.HasField("session") and not request.session.access_token:
                # Chosen where the call enters, so that its owner is known and a second try is the same call.
                request.session.access_token = generate_token(os.urandom(TOKEN_ENTROPY_BYTES))
            return router.answer(rpc, request, call)

        return start
    return lambda message, call: router.answer(rpc, parsed(rpc.kind, message), call)


def _context(router: Router) -> UnaryAnswer:
    def context(_message: bytes, call: Call) -> Answer:
        value = call.metadata("authorization") or ""
        scheme, _, rest = value.partition(" ")
        token = rest.strip() if scheme.lower() == "bearer" else value
        if not token:
            raise InvalidArgument("mnemosyned: missing access token in metadata")
        # The two responses are the same on the wire.
        return router.answer(RPCS["Get"], GetRequest(access_token=token), call)

    return context


def _get(service: SessionService, request: GetRequest, _: int) -> Answer:
    return service.get(request.access_token)


def _exists(service: SessionService, request: ExistsRequest, _: int) -> Answer:
    is_there = service.exists_cached(request.access_token)
    if is_there is None:
        return _asked_exists(service, request)
    return _TRUE if is_there else _FALSE


async def _asked_exists(service: SessionService, request: ExistsRequest) -> bytes:
    return _TRUE if await service.exists(request.access_token) else _FALSE


async def _start(service: SessionService, request: StartRequest, not_after_us: int) -> bytes:
    return await service.start(_new_session(service, request, not_after_us))


async def _start_again(service: SessionService, request: StartRequest, not_after_us: int) -> bytes:
    return await service.start_again(_new_session(service, request, not_after_us))


def _new_session(service: SessionService, request: StartRequest, not_after_us: int) -> NewSession:
    if not request.HasField("session"):
        raise InvalidArgument("mnemosyned: missing session")
    session = request.session
    if not session.subject_id:
        raise InvalidArgument("mnemosyned: missing subject accessToken")
    return NewSession(
        access_token=session.access_token,
        subject_id=session.subject_id,
        subject_client=session.subject_client,
        refresh_token=session.refresh_token,
        bag=bag.encode(service.bag_limits.checked(session.bag)),
        not_after_us=not_after_us,
    )


async def _abandon(service: SessionService, request: AbandonRequest, not_after_us: int) -> bytes:
    await service.abandon(Abandonment(access_token=request.access_token, not_after_us=not_after_us))
    return _TRUE


async def _abandon_again(service: SessionService, request: AbandonRequest, not_after_us: int) -> bytes:
    # Absent is what the first try may have made it.
    with suppress(SessionNotFound):
        await _abandon(service, request, not_after_us)
    return _TRUE


async def _set_value(service: SessionService, request: SetValueRequest, not_after_us: int) -> bytes:
    change = ValueChange(
        access_token=request.access_token,
        key=request.key,
        value=request.value,
        not_after_us=not_after_us,
    )
    return SetValueResponse(bag=await service.set_value(change)).SerializeToString()


async def _list(service: SessionService, request: ListRequest, _: int) -> bytes:
    query = request.query
    criteria = Criteria(
        refresh_token=query.refresh_token or None,
        expires_after_us=_instant_us(query, "expire_at_from"),
        expires_before_us=_instant_us(query, "expire_at_to"),
    )
    return await service.list(criteria, offset=request.offset, limit=request.limit)


async def _delete(service: SessionService, request: DeleteRequest, _: int) -> bytes:
    criteria = Criteria(
        access_token=request.access_token or None,
        refresh_token=request.refresh_token or None,
        subject_id=request.subject_id or None,
        expires_after_us=_instant_us(request, "expire_at_from"),
        expires_before_us=_instant_us(request, "expire_at_to"),
    )
    return Int64Value(value=await service.delete(criteria)).SerializeToString()


def _own_token(request: Any) -> str:  # noqa: ANN401  # any request with a token
    return str(request.access_token)


def _session_token(request: StartRequest) -> str:
    return request.session.access_token


RPCS: Final = {
    rpc.name: rpc
    for rpc in (
        Rpc(
            name="Start",
            kind=StartRequest,
            answer=_start,
            token=_session_token,
            is_write=True,
            again=_start_again,
        ),
        Rpc(name="Get", kind=GetRequest, answer=_get, token=_own_token, again=_get),
        Rpc(name="Exists", kind=ExistsRequest, answer=_exists, token=_own_token, again=_exists),
        Rpc(
            name="Abandon",
            kind=AbandonRequest,
            answer=_abandon,
            token=_own_token,
            is_write=True,
            again=_abandon_again,
        ),
        Rpc(
            name="SetValue",
            kind=SetValueRequest,
            answer=_set_value,
            token=_own_token,
            is_write=True,
            again=_set_value,
        ),
        Rpc(name="List", kind=ListRequest, answer=_list, again=_list),
        Rpc(name="Delete", kind=DeleteRequest, answer=_delete, is_write=True, again=_delete),
    )
}


def parsed(kind: Callable[[], Request], message: bytes) -> Request:
    """Parse a request.

    Raises:
        MalformedMessage: the bytes are no such message; strings must be UTF-8.
    """
    request = kind()
    try:
        request.ParseFromString(message)
    except DecodeError:
        raise MalformedMessage(
            f"mnemosyned: the request is not a valid {request.DESCRIPTOR.full_name}"
        ) from None
    return request


def _instant_us(message: Message, name: str) -> int | None:
    if not message.HasField(name):
        return None
    timestamp: Timestamp = getattr(message, name)
    if timestamp.seconds not in _TIMESTAMP_SECONDS or timestamp.nanos not in _TIMESTAMP_NANOS:
        raise InvalidArgument(f"mnemosyned: {name} is not a valid timestamp")
    return timestamp.seconds * _US_PER_S + timestamp.nanos // _NS_PER_US
