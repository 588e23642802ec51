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

from aio.deadline import Deadline
from aio.units import NS_PER_US, US_PER_S
from mnemosyned.errors import InvalidArgument, MalformedMessage, SessionNotFound
from mnemosyned.sessions import bag
from mnemosyned.sessions.model import Criteria, NewSession
from mnemosyned.sessions.service import SessionService
from mnemosyned.sessions.token import TOKEN_ENTROPY_BYTES, generate_token
from mnemosyned.transport.call import Call
from mnemosyned.transport.methods import MethodTable, UnaryHandler

SERVICE_NAME: Final = "mnemosynerpc.SessionManager"

_TRUE: Final = BoolValue(value=True).SerializeToString()
_FALSE: Final = BoolValue(value=False).SerializeToString()
# What a Timestamp may hold: the years 1 to 9999.
_TIMESTAMP_SECONDS: Final = range(-62_135_596_800, 253_402_300_800)
_TIMESTAMP_NANOS: Final = range(1_000_000_000)

Request = TypeVar("Request", bound=Message)


Answer: TypeAlias = bytes | Coroutine[Any, Any, bytes]


Handle: TypeAlias = Callable[[SessionService, Any, Call], Answer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rpc:
    """One RPC, from a parsed request to a serialized response; a router decides where it is handled.

    `token` reads the token whose owner should handle the call. An RPC without one is handled where it
    arrives.
    """

    name: str
    request_type: Callable[[], Message]
    handle: Handle
    handle_uncached: Handle  # for a token that another node owns
    retry: Handle  # the same, when an earlier try may have done the work already
    token: Callable[[Any], str] | None = None
    is_write: bool = False


class Router(Protocol):
    """Decides where a call is handled."""

    def handle(self, rpc: Rpc, request: Message, call: Call) -> Answer:
        """Handle the call on this node or on another one."""
        ...


class LocalRouter:
    """The router of a node without peers: its own service handles every call."""

    def __init__(self, service: SessionService) -> None:
        self._service = service

    def handle(self, rpc: Rpc, request: Message, call: Call) -> Answer:
        """See Router."""
        return rpc.handle(self._service, request, call)


def add_to(table: MethodTable, router: Router) -> None:
    """Serve the RPCs under their names, and two of them under their older names."""
    for name, rpc in RPCS.items():
        table.add_unary(SERVICE_NAME, name, _handler(rpc, router))
    table.add_unary(SERVICE_NAME, "Create", _handler(RPCS["Start"], router))
    table.add_unary(SERVICE_NAME, "SetData", _handler(RPCS["SetValue"], router))
    table.add_unary(SERVICE_NAME, "Context", _context(router))


def _handler(rpc: Rpc, router: Router) -> UnaryHandler:
    if rpc.name == "Start":

        def start(message: bytes, call: Call) -> Answer:
            request = parsed(StartRequest, message)
            if request.HasField("session") and not request.session.access_token:
                # Chosen where the call enters, so that its owner is known and a retry is the same call.
                request.session.access_token = generate_token(os.urandom(TOKEN_ENTROPY_BYTES))
            return router.handle(rpc, request, call)

        return start
    return lambda message, call: router.handle(rpc, parsed(rpc.request_type, message), call)


def _context(router: Router) -> UnaryHandler:
    def context(_message: bytes, call: Call) -> Answer:
        value = call.metadata("authorization") or ""
        scheme, _, rest = value.partition(" ")
        token = rest.strip() if scheme.lower() == "bearer" else value
        if not token:
            raise InvalidArgument("mnemosyned: missing access token in metadata")
        # The two responses are the same on the wire.
        return router.handle(RPCS["Get"], GetRequest(access_token=token), call)

    return context


def _get(service: SessionService, request: GetRequest, _: Call) -> Answer:
    return service.get(request.access_token)


def _get_uncached(service: SessionService, request: GetRequest, _: Call) -> Answer:
    return service.get_uncached(request.access_token)


def _exists(service: SessionService, request: ExistsRequest, _: Call) -> Answer:
    is_there = service.exists_cached(request.access_token)
    if is_there is None:
        return _exists_stored(service, request)
    return _TRUE if is_there else _FALSE


async def _exists_stored(service: SessionService, request: ExistsRequest) -> bytes:
    return _TRUE if await service.exists(request.access_token) else _FALSE


async def _exists_uncached(service: SessionService, request: ExistsRequest, _: Call) -> bytes:
    return _TRUE if await service.exists_uncached(request.access_token) else _FALSE


async def _start(service: SessionService, request: StartRequest, call: Call) -> bytes:
    deadline = call.deadline
    return await service.start(_new_session(service, request, deadline), deadline)


async def _start_uncached(service: SessionService, request: StartRequest, call: Call) -> bytes:
    deadline = call.deadline
    return await service.start_uncached(_new_session(service, request, deadline), deadline)


async def _retry_start(service: SessionService, request: StartRequest, call: Call) -> bytes:
    deadline = call.deadline
    return await service.retry_start(_new_session(service, request, deadline), deadline)


def _new_session(service: SessionService, request: StartRequest, deadline: Deadline) -> NewSession:
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
        ttl_us=service.lifetime.idle_us,
        not_after_us=deadline.not_after_us,
    )


async def _abandon(service: SessionService, request: AbandonRequest, call: Call) -> bytes:
    await service.abandon(request.access_token, call.deadline)
    return _TRUE


async def _retry_abandon(service: SessionService, request: AbandonRequest, call: Call) -> bytes:
    # The earlier try may have ended the session.
    with suppress(SessionNotFound):
        await _abandon(service, request, call)
    return _TRUE


async def _set_value(service: SessionService, request: SetValueRequest, call: Call) -> bytes:
    values = await service.set_value(request.access_token, request.key, request.value, call.deadline)
    return SetValueResponse(bag=values).SerializeToString()


async def _list(service: SessionService, request: ListRequest, _: Call) -> bytes:
    query = request.query
    criteria = Criteria(
        refresh_token=query.refresh_token or None,
        expires_after_us=_instant_us(query, "expire_at_from"),
        expires_before_us=_instant_us(query, "expire_at_to"),
    )
    return await service.list(criteria, offset=request.offset, limit=request.limit)


async def _delete(service: SessionService, request: DeleteRequest, _: Call) -> bytes:
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
            request_type=StartRequest,
            handle=_start,
            handle_uncached=_start_uncached,
            retry=_retry_start,
            token=_session_token,
            is_write=True,
        ),
        Rpc(
            name="Get",
            request_type=GetRequest,
            handle=_get,
            handle_uncached=_get_uncached,
            retry=_get_uncached,
            token=_own_token,
        ),
        Rpc(
            name="Exists",
            request_type=ExistsRequest,
            handle=_exists,
            handle_uncached=_exists_uncached,
            retry=_exists_uncached,
            token=_own_token,
        ),
        Rpc(
            name="Abandon",
            request_type=AbandonRequest,
            handle=_abandon,
            handle_uncached=_abandon,
            retry=_retry_abandon,
            token=_own_token,
            is_write=True,
        ),
        Rpc(
            name="SetValue",
            request_type=SetValueRequest,
            handle=_set_value,
            handle_uncached=_set_value,
            retry=_set_value,
            token=_own_token,
            is_write=True,
        ),
        Rpc(name="List", request_type=ListRequest, handle=_list, handle_uncached=_list, retry=_list),
        Rpc(
            name="Delete",
            request_type=DeleteRequest,
            handle=_delete,
            handle_uncached=_delete,
            retry=_delete,
            is_write=True,
        ),
    )
}


def parsed(request_type: Callable[[], Request], message: bytes) -> Request:
    """Parse a request.

    Raises:
        MalformedMessage: the bytes are no such message; strings must be UTF-8.
    """
    request = request_type()
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
    return timestamp.seconds * US_PER_S + timestamp.nanos // NS_PER_US
