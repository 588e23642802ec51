"""The SessionManager service: from a protobuf message to a use case, and from its result to a message.

    engine ── bytes ──> handler ── request, Rpc ──> router ── one of three ──> use case (sessions/service.py)
                       (`_handler`)                (`Router`) (`Rpc.handle` …)

- The handler parses the request, and gives a Start that brings no token a new one of the router's.
- The router decides on which node the call is handled: `LocalRouter` (rpc.py) for a node without peers, those
  of router.py and owner_router.py for a clustered node.
- The `Rpc` (rpc.py) says how a parsed request becomes a use case, in three forms.

To add an RPC: add its messages to the .proto file, a use case to the service, an entry to `RPCS`, and a role
to api/auth.py if it needs less than admin.

Errors of the caller are raised here with the exact texts of the contract, odd ones included: clients of the
Go daemon compare them.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, Final, cast

from google.protobuf.message import Message
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

from aio.around import Around
from aio.deadline import Deadline
from aio.later import Later, Outcome
from aio.slices import SlicesFull, in_slices
from aio.steps import STEP_BYTES, STEP_ITEMS, Steps
from aio.units import NS_PER_US, US_PER_S
from mnemosyned.api.parsing import AT_ONCE_BYTES, parsed, parsing
from mnemosyned.api.rpc import Response, Router, Rpc
from mnemosyned.errors import InvalidArgument, Overloaded, SessionNotFound
from mnemosyned.sessions.encoded import EncodedSession
from mnemosyned.sessions.model import Criteria, NewSession
from mnemosyned.sessions.service import SessionService
from mnemosyned.transport.call import Call, Encoded
from mnemosyned.transport.methods import MethodTable, UnaryHandler

SERVICE_NAME: Final = "mnemosynerpc.SessionManager"

_TRUE: Final = BoolValue(value=True).SerializeToString()
_FALSE: Final = BoolValue(value=False).SerializeToString()
# What a Timestamp may hold: the years 1 to 9999. Protobuf parses any 64-bit value, and what is outside would
# fail later, in the storage, as an error that does not name the field.
_TIMESTAMP_SECONDS: Final = range(-62_135_596_800, 253_402_300_800)
_TIMESTAMP_NANOS: Final = range(1_000_000_000)


def add_to(table: MethodTable, router: Router, *, max_entries: int) -> None:
    """Add the RPCs to a table: under their names, and two of them also under the Go daemon's older names.

    A request with a bag of more than `max_entries` is refused before it is parsed as a whole.
    """
    for name, rpc in RPCS.items():
        table.add_unary(SERVICE_NAME, name, _handler(rpc, router, max_entries))
    table.add_unary(SERVICE_NAME, "Create", _handler(RPCS["Start"], router, max_entries))
    table.add_unary(SERVICE_NAME, "SetData", _handler(RPCS["SetValue"], router, max_entries))
    table.add_unary(SERVICE_NAME, "Context", _context(router))


def _handler(rpc: Rpc, router: Router, max_entries: int) -> UnaryHandler:
    request_type = rpc.request_type
    prepare = partial(_give_token, router) if rpc.name == "Start" else None

    def handle(message: bytes, call: Call) -> Response:
        if len(message) > AT_ONCE_BYTES:
            return handle_large(message, call)
        request = parsed(request_type, message)
        if prepare is not None:
            prepare(request)
        return router.handle(rpc, request, call)

    async def handle_large(message: bytes, call: Call) -> Encoded:
        steps = parsing(request_type, message, max_entries=max_entries)
        try:
            request = await in_slices(steps, size_bytes=len(message))
        except SlicesFull:
            raise Overloaded("mnemosyned: too many large requests are waiting") from None
        del message, steps  # not in memory twice, while the call waits
        if prepare is not None:
            prepare(request)
        response = router.handle(rpc, request, call)
        return response if isinstance(response, bytes | tuple) else await response

    return handle


def _give_token(router: Router, request: Any) -> None:  # noqa: ANN401  # a StartRequest
    """Choose a token if the request has none, where the call enters the cluster.

    A retry then has the same token, so that it finds what the first try has stored.
    """
    if request.HasField("session") and not request.session.access_token:
        request.session.access_token = router.new_token()


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


def _get(service: SessionService, request: GetRequest, call: Call) -> Response:
    response = service.get(request.access_token)
    return _in_time(service, response, call) if isinstance(response, Later) else response


def _get_uncached(service: SessionService, request: GetRequest, call: Call) -> Response:
    return _in_time(service, service.get_uncached(request.access_token), call)


def _in_time(service: SessionService, response: Later[Encoded], call: Call) -> Later[Encoded]:
    service.bound(response, call.deadline)
    return response


def _is_there(_service: SessionService, _token: str, _: EncodedSession) -> Encoded:
    return _TRUE


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


def _start(service: SessionService, request: StartRequest, call: Call) -> Response:
    return _started_by(service.start, service, request, call)


def _start_uncached(service: SessionService, request: StartRequest, call: Call) -> Response:
    return _started_by(service.start_uncached, service, request, call)


def _started_by(
    start: Callable[[NewSession], Later[Encoded]], service: SessionService, request: StartRequest, call: Call
) -> Response:
    stored = _stored_bag(service, request)
    if stored is None:
        return _start_large(start, service, request, call)
    return _in_time(service, start(_new_session(service, request, stored, call.deadline)), call)


async def _start_large(
    start: Callable[[NewSession], Later[Encoded]], service: SessionService, request: StartRequest, call: Call
) -> Encoded:
    stored = await in_slices(service.bag_limits.encoding(request.session.bag))
    return await start(_new_session(service, request, stored, call.deadline))


async def _retry_start(service: SessionService, request: StartRequest, call: Call) -> Encoded:
    stored = _stored_bag(service, request)
    if stored is None:
        stored = await in_slices(service.bag_limits.encoding(request.session.bag))
    return await service.retry_start(_new_session(service, request, stored, call.deadline))


def _stored_bag(service: SessionService, request: StartRequest) -> bytes | None:
    """Check a new session, and return the stored form of its bag; None: it is large."""
    if not request.HasField("session"):
        raise InvalidArgument("mnemosyned: missing session")
    if not request.session.subject_id:
        raise InvalidArgument("mnemosyned: missing subject accessToken")
    return service.bag_limits.encoded_at_once(request.session)


def _new_session(
    service: SessionService, request: StartRequest, stored: bytes, deadline: Deadline
) -> NewSession:
    session = request.session
    return NewSession(
        access_token=session.access_token,
        subject_id=session.subject_id,
        subject_client=session.subject_client,
        refresh_token=session.refresh_token,
        bag=stored,
        # Of this node's configuration, also for a forwarded call. Nodes with different `-ttl` differ here.
        ttl_us=service.lifetime.idle_us,
        not_after_us=service.not_after_us(deadline),
    )


def _abandon(service: SessionService, request: AbandonRequest, call: Call) -> Response:
    ended = service.abandon(request.access_token, call.deadline).map(_is_done)
    return _in_time(service, ended, call)


def _is_done(_: None) -> Encoded:
    return _TRUE


async def _retry_abandon(service: SessionService, request: AbandonRequest, call: Call) -> bytes:
    # The earlier try may have ended the session. The price: an Abandon of a token that never existed succeeds
    # when it is a retry, and is NOT_FOUND otherwise.
    with suppress(SessionNotFound):
        await service.abandon(request.access_token, call.deadline)
    return _TRUE


def _set_value(service: SessionService, request: SetValueRequest, call: Call) -> Response:
    changed = service.set_value(request.access_token, request.key, request.value, call.deadline)
    return _in_time(service, changed.through(_bag_encoded), call)


def _set_value_uncached(service: SessionService, request: SetValueRequest, call: Call) -> Response:
    changed = service.set_value_uncached(request.access_token, request.key, request.value, call.deadline)
    return _in_time(service, changed.through(_bag_encoded), call)


def _bag_encoded(outcome: Outcome[dict[str, str]]) -> Outcome[Encoded]:
    """Return the response with a bag: at once if it is small, as nearly all are."""
    if isinstance(outcome, BaseException):
        return outcome
    if not isinstance(outcome, dict):
        return Around(outcome, _bag_encoded_later)
    steps = _bag_response(outcome)
    try:
        next(steps)
    except StopIteration as end:
        return cast("bytes", end.value)
    return in_slices(steps)


async def _bag_encoded_later(changing: Coroutine[Any, Any, dict[str, str]]) -> Encoded:
    return await in_slices(_bag_response(await changing))


def _bag_response(values: dict[str, str]) -> Steps[bytes]:
    """Encode a SetValueResponse; its field is a map, so it is one part of the bag after the other."""
    parts: list[bytes] = []
    part: dict[str, str] = {}
    size = 0
    for key, value in values.items():
        part[key] = value
        size += len(key) + len(value)
        if len(part) >= STEP_ITEMS or size > STEP_BYTES:
            yield
            parts.append(SetValueResponse(bag=part).SerializeToString())
            part, size = {}, 0
    parts.append(SetValueResponse(bag=part).SerializeToString())
    return b"".join(parts)


async def _list(service: SessionService, request: ListRequest, _: Call) -> bytes:
    # An empty text is "no criterion": proto3 does not tell it from a field that is not set.
    query = request.query
    criteria = Criteria(
        refresh_token=query.refresh_token or None,
        expires_after_us=_instant_us(query, "expire_at_from"),
        expires_before_us=_instant_us(query, "expire_at_to"),
    )
    return await service.pages.page(
        criteria,
        offset=request.offset,
        limit=request.limit,
        max_bytes=request.max_bytes,
        token=request.page_token if request.HasField("page_token") else None,
    )


async def _delete(
    service: SessionService, request: DeleteRequest, call: Call, *, is_retry: bool = False
) -> bytes:
    criteria = Criteria(
        access_token=request.access_token or None,
        refresh_token=request.refresh_token or None,
        subject_id=request.subject_id or None,
        expires_after_us=_instant_us(request, "expire_at_from"),
        expires_before_us=_instant_us(request, "expire_at_to"),
    )
    deleted = await service.delete(criteria, lambda: call.deadline, is_retry=is_retry)
    return Int64Value(value=deleted).SerializeToString()


async def _retry_delete(service: SessionService, request: DeleteRequest, call: Call) -> bytes:
    return await _delete(service, request, call, is_retry=True)


def _own_token(request: Any) -> str:  # noqa: ANN401  # any request with a token
    return str(request.access_token)


def _session_token(request: StartRequest) -> str:
    return request.session.access_token


# Abandon, List and Delete have one form for two or three: their use cases go to the storage in any case, and
# drop the copies of this node and of others (sessions/coherence.py). So does SetValue, but it may leave one.
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
            mirrored=SessionService.get_mirrored,
            returns_session=True,
        ),
        Rpc(
            name="Exists",
            request_type=ExistsRequest,
            handle=_exists,
            handle_uncached=_exists_uncached,
            retry=_exists_uncached,
            token=_own_token,
            mirrored=_is_there,
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
            handle_uncached=_set_value_uncached,
            retry=_set_value_uncached,
            token=_own_token,
            is_write=True,
        ),
        Rpc(name="List", request_type=ListRequest, handle=_list, handle_uncached=_list, retry=_list),
        Rpc(
            name="Delete",
            request_type=DeleteRequest,
            handle=_delete,
            handle_uncached=_delete,
            retry=_retry_delete,
            is_write=True,
        ),
    )
}


def _instant_us(message: Message, name: str) -> int | None:
    """Return a Timestamp field in microseconds since the epoch, rounded down; None if it is not set."""
    if not message.HasField(name):
        return None
    timestamp: Timestamp = getattr(message, name)
    if timestamp.seconds not in _TIMESTAMP_SECONDS or timestamp.nanos not in _TIMESTAMP_NANOS:
        raise InvalidArgument(f"mnemosyned: {name} is not a valid timestamp")
    return timestamp.seconds * US_PER_S + timestamp.nanos // NS_PER_US
