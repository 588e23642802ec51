"""The SessionManager service: from a protobuf message to a use case, and from its result to a message.

    engine ── bytes ──> handler ── request, Rpc ──> router ── one of three ──> use case (sessions/service.py)
                       (`_handler`)                (`Router`) (`Rpc.handle` …)

- The handler parses the request, and chooses a token for a Start that brings none.
- The router decides on which node the call is handled. `LocalRouter` serves a node without peers;
  api/router.py has the two routers of a clustered node.
- The `Rpc` says how a parsed request becomes a use case. It has three forms of it, and the router chooses:

    form             | chosen when                                        | differs in
    -----------------+----------------------------------------------------+-----------------------------------
    handle           | this node owns the token, or no token is concerned | may use and fill the caches
    handle_uncached  | another node owns the token, but this node handles | reads from the storage and leaves
                     | the call, and no other node has begun it           | no copy here
    retry            | the owner was asked, and its outcome is unknown    | as handle_uncached, and accepts
                     |                                                    | that the work may be done already

Why no copy in the second form: a write goes to the token's owner, which tells this node nothing. A copy here
would stay as it is until it expires.

What "done already" means depends on the RPC:

- Get, Exists: reads have no effect that counts, so a retry is `handle_uncached`.
- Start: if the token is in use by a session with the same content, that is this call's own session.
- Abandon: a session that is not found was ended by the first try, so the retry succeeds.
- SetValue: setting the same value twice is setting it once.
- List, Delete: no owner, so no retry. A Delete that a client repeats counts only what is left.

To add an RPC: add its messages to the .proto file, a use case to the service, an entry to `RPCS`, and a role
to api/auth.py if it needs less than admin.

Errors of the caller are raised here with the exact texts of the contract, odd ones included: clients of the
Go daemon compare them.
"""

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
from mnemosyned.transport.call import Call, Encoded
from mnemosyned.transport.methods import MethodTable, UnaryHandler

SERVICE_NAME: Final = "mnemosynerpc.SessionManager"

_TRUE: Final = BoolValue(value=True).SerializeToString()
_FALSE: Final = BoolValue(value=False).SerializeToString()
# What a Timestamp may hold: the years 1 to 9999. Protobuf parses any 64-bit value, and what is outside would
# fail later, in the storage, as an error that does not name the field.
_TIMESTAMP_SECONDS: Final = range(-62_135_596_800, 253_402_300_800)
_TIMESTAMP_NANOS: Final = range(1_000_000_000)

Request = TypeVar("Request", bound=Message)
# A serialized response: at once where a cache has it, otherwise by a coroutine. At once saves that
# coroutine and the time-out around it.
Response: TypeAlias = Encoded | Coroutine[Any, Any, Encoded]
Handle: TypeAlias = Callable[[SessionService, Any, Call], Response]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rpc:
    """One RPC, from a parsed request to a serialized response; a router decides where it is handled.

    `token` reads the token whose owner should handle the call. An RPC without one is handled where it
    arrives. `is_write` tells the router that a repeated try must wait until the first cannot be done any
    more. The three forms of handling are explained at the top of this module.
    """

    name: str
    request_type: Callable[[], Message]
    handle: Handle
    handle_uncached: Handle
    retry: Handle
    token: Callable[[Any], str] | None = None
    is_write: bool = False


class Router(Protocol):
    """Decides where a call is handled."""

    def handle(self, rpc: Rpc, request: Message, call: Call) -> Response:
        """Handle the call on this node or on another one.

        Raises:
            MnemosyneError: at once, or by the coroutine; `transport/status.py` has its gRPC status.
        """
        ...


class LocalRouter:
    """The router of a node without peers: its own service handles every call, through the caches."""

    def __init__(self, service: SessionService) -> None:
        self._service = service

    def handle(self, rpc: Rpc, request: Message, call: Call) -> Response:
        """See Router."""
        return rpc.handle(self._service, request, call)


def add_to(table: MethodTable, router: Router) -> None:
    """Add the RPCs to a table: under their names, and two of them also under the Go daemon's older names."""
    for name, rpc in RPCS.items():
        table.add_unary(SERVICE_NAME, name, _handler(rpc, router))
    table.add_unary(SERVICE_NAME, "Create", _handler(RPCS["Start"], router))
    table.add_unary(SERVICE_NAME, "SetData", _handler(RPCS["SetValue"], router))
    table.add_unary(SERVICE_NAME, "Context", _context(router))


def _handler(rpc: Rpc, router: Router) -> UnaryHandler:
    if rpc.name == "Start":

        def start(message: bytes, call: Call) -> Response:
            request = parsed(StartRequest, message)
            if request.HasField("session") and not request.session.access_token:
                # Chosen where the call enters the cluster: the token decides which node owns the session. A
                # retry then has the same token, so that it finds what the first try has stored.
                request.session.access_token = generate_token(os.urandom(TOKEN_ENTROPY_BYTES))
            return router.handle(rpc, request, call)

        return start
    return lambda message, call: router.handle(rpc, parsed(rpc.request_type, message), call)


def _context(router: Router) -> UnaryHandler:
    # A Get whose token comes in the metadata. The owner sees a Get, since metadata is not forwarded.
    def context(_message: bytes, call: Call) -> Response:
        value = call.metadata("authorization") or ""
        scheme, _, rest = value.partition(" ")
        token = rest.strip() if scheme.lower() == "bearer" else value
        if not token:
            raise InvalidArgument("mnemosyned: missing access token in metadata")
        # GetResponse and ContextResponse are the same on the wire: field 1, the session.
        return router.handle(RPCS["Get"], GetRequest(access_token=token), call)

    return context


def _get(service: SessionService, request: GetRequest, _: Call) -> Response:
    return service.get(request.access_token)


def _get_uncached(service: SessionService, request: GetRequest, _: Call) -> Response:
    return service.get_uncached(request.access_token)


def _exists(service: SessionService, request: ExistsRequest, _: Call) -> Response:
    # None is "no cache knows", which only the storage can answer.
    is_there = service.exists_cached(request.access_token)
    if is_there is None:
        return _exists_stored(service, request)
    return _TRUE if is_there else _FALSE


async def _exists_stored(service: SessionService, request: ExistsRequest) -> bytes:
    return _TRUE if await service.exists(request.access_token) else _FALSE


async def _exists_uncached(service: SessionService, request: ExistsRequest, _: Call) -> bytes:
    return _TRUE if await service.exists_uncached(request.access_token) else _FALSE


async def _start(service: SessionService, request: StartRequest, call: Call) -> Encoded:
    deadline = call.deadline
    return await service.start(_new_session(service, request, deadline), deadline)


async def _start_uncached(service: SessionService, request: StartRequest, call: Call) -> Encoded:
    deadline = call.deadline
    return await service.start_uncached(_new_session(service, request, deadline), deadline)


async def _retry_start(service: SessionService, request: StartRequest, call: Call) -> Encoded:
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
        # Of this node's configuration, also for a forwarded call. Nodes with different `-ttl` differ here.
        ttl_us=service.lifetime.idle_us,
        not_after_us=deadline.not_after_us,
    )


async def _abandon(service: SessionService, request: AbandonRequest, call: Call) -> bytes:
    await service.abandon(request.access_token, call.deadline)
    return _TRUE


async def _retry_abandon(service: SessionService, request: AbandonRequest, call: Call) -> bytes:
    # The earlier try may have ended the session. The price: an Abandon of a token that never existed succeeds
    # when it is a retry, and is NOT_FOUND otherwise.
    with suppress(SessionNotFound):
        await _abandon(service, request, call)
    return _TRUE


async def _set_value(service: SessionService, request: SetValueRequest, call: Call) -> bytes:
    values = await service.set_value(request.access_token, request.key, request.value, call.deadline)
    return SetValueResponse(bag=values).SerializeToString()


async def _list(service: SessionService, request: ListRequest, _: Call) -> bytes:
    # An empty text is "no criterion": proto3 does not tell it from a field that is not set.
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


# Abandon, SetValue, List and Delete have one form for two or three: their use cases go to the storage in any
# case, and drop the copies of this node and of others (sessions/coherence.py).
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
        MalformedMessage: the bytes are no such message; strings must be UTF-8. The text names the type of
            the message and quotes nothing, since a token may be in the bytes.
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
    """Return a Timestamp field in microseconds since the epoch, rounded down; None if it is not set."""
    if not message.HasField(name):
        return None
    timestamp: Timestamp = getattr(message, name)
    if timestamp.seconds not in _TIMESTAMP_SECONDS or timestamp.nanos not in _TIMESTAMP_NANOS:
        raise InvalidArgument(f"mnemosyned: {name} is not a valid timestamp")
    return timestamp.seconds * US_PER_S + timestamp.nanos // NS_PER_US
