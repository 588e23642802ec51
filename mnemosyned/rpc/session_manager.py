"""The SessionManager service: protobuf messages to use cases and back."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

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

from mnemosyned import bag
from mnemosyned.errors import InvalidArgument, MalformedMessage
from mnemosyned.rpc.methods import Call, MethodTable, UnaryAnswer
from mnemosyned.service import SessionService
from mnemosyned.session import TOKEN_ENTROPY_BYTES, Criteria, NewSession, ValueChange, generate_token

SERVICE_NAME: Final = "mnemosynerpc.SessionManager"

_TRUE: Final = BoolValue(value=True).SerializeToString()
_FALSE: Final = BoolValue(value=False).SerializeToString()
_US_PER_S: Final = 1_000_000
_NS_PER_US: Final = 1000
# What a Timestamp may hold: the years 1 to 9999.
_TIMESTAMP_SECONDS: Final = range(-62_135_596_800, 253_402_300_800)
_TIMESTAMP_NANOS: Final = range(1_000_000_000)

Request = TypeVar("Request", bound=Message)


def add_to(table: MethodTable, service: SessionService) -> None:
    """Serve the use cases under their names, the older ones included."""
    rpcs = _SessionManager(service)
    for name, answer in rpcs.answers().items():
        table.add_unary(SERVICE_NAME, name, answer)


class _SessionManager:
    """One method per RPC, from serialized request to serialized response."""

    def __init__(self, service: SessionService) -> None:
        self._service = service

    def answers(self) -> dict[str, UnaryAnswer]:
        return {
            "Start": self.start,
            "Get": self.get,
            "Context": self.context,
            "List": self.list,
            "Exists": self.exists,
            "Abandon": self.abandon,
            "SetValue": self.set_value,
            "Delete": self.delete,
            "Create": self.start,
            "SetData": self.set_value,
        }

    def get(self, message: bytes, _: Call) -> bytes | Coroutine[Any, Any, bytes]:
        return self._service.get(parsed(GetRequest, message).access_token)

    def context(self, _message: bytes, call: Call) -> bytes | Coroutine[Any, Any, bytes]:
        value = call.metadata("authorization") or ""
        scheme, _, rest = value.partition(" ")
        token = rest.strip() if scheme.lower() == "bearer" else value
        if not token:
            raise InvalidArgument("mnemosyned: missing access token in metadata")
        return self._service.get(token)

    def exists(self, message: bytes, _: Call) -> bytes | Coroutine[Any, Any, bytes]:
        token = parsed(ExistsRequest, message).access_token
        return _TRUE if self._service.is_cached(token) else self._exists(token)

    async def _exists(self, token: str) -> bytes:
        return _TRUE if await self._service.exists(token) else _FALSE

    async def start(self, message: bytes, _: Call) -> bytes:
        request = parsed(StartRequest, message)
        if not request.HasField("session"):
            raise InvalidArgument("mnemosyned: missing session")
        session = request.session
        if not session.subject_id:
            raise InvalidArgument("mnemosyned: missing subject accessToken")
        new = NewSession(
            access_token=session.access_token or generate_token(os.urandom(TOKEN_ENTROPY_BYTES)),
            subject_id=session.subject_id,
            subject_client=session.subject_client,
            refresh_token=session.refresh_token,
            bag=bag.encode(session.bag),
        )
        return await self._service.start(new)

    async def abandon(self, message: bytes, _: Call) -> bytes:
        await self._service.abandon(parsed(AbandonRequest, message).access_token)
        return _TRUE

    async def set_value(self, message: bytes, _: Call) -> bytes:
        request = parsed(SetValueRequest, message)
        change = ValueChange(access_token=request.access_token, key=request.key, value=request.value)
        return SetValueResponse(bag=await self._service.set_value(change)).SerializeToString()

    async def list(self, message: bytes, _: Call) -> bytes:
        request = parsed(ListRequest, message)
        query = request.query
        criteria = Criteria(
            refresh_token=query.refresh_token or None,
            expires_after_us=_instant_us(query, "expire_at_from"),
            expires_before_us=_instant_us(query, "expire_at_to"),
        )
        return await self._service.list(criteria, offset=request.offset, limit=request.limit)

    async def delete(self, message: bytes, _: Call) -> bytes:
        request = parsed(DeleteRequest, message)
        criteria = Criteria(
            access_token=request.access_token or None,
            refresh_token=request.refresh_token or None,
            subject_id=request.subject_id or None,
            expires_after_us=_instant_us(request, "expire_at_from"),
            expires_before_us=_instant_us(request, "expire_at_to"),
        )
        return Int64Value(value=await self._service.delete(criteria)).SerializeToString()


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
