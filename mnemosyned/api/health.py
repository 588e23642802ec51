"""The standard grpc.health.v1.Health service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from grpc_health.v1.health_pb2 import (  # type: ignore[attr-defined]  # newer than their stubs
    HealthCheckRequest,
    HealthCheckResponse,
    HealthListRequest,
    HealthListResponse,
)

from mnemosyned.api.session_manager import parsed
from mnemosyned.errors import Unimplemented, UnknownService
from mnemosyned.transport.call import Call
from mnemosyned.transport.methods import MethodTable

SERVICE_NAME: Final = "grpc.health.v1.Health"


class Health:
    """One state for the server as a whole ("") and for each service named.

    Starts NOT_SERVING. Watchers are told each change; `close` tells them NOT_SERVING and ends their
    streams, so that a drain need not wait for them.
    """

    def __init__(self, services: frozenset[str]) -> None:
        self._services = services | {""}
        self._is_serving = False
        self._is_closed = False
        self._changed = asyncio.Event()

    def add_to(self, table: MethodTable) -> None:
        """Serve Check, List and Watch."""
        table.add_unary(SERVICE_NAME, "Check", self._check)
        table.add_unary(SERVICE_NAME, "List", self._list)
        table.add_stream(SERVICE_NAME, "Watch", self._watch)

    def set_serving(self, is_serving: bool) -> None:  # noqa: FBT001  # the state itself
        """Change the state, unless closed."""
        if not self._is_closed and is_serving != self._is_serving:
            self._is_serving = is_serving
            self._announce()

    def close(self) -> None:
        """NOT_SERVING from now on."""
        self._is_serving = False
        self._is_closed = True
        self._announce()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _check(self, message: bytes, _: Call) -> bytes:
        request = parsed(HealthCheckRequest, message)
        if request.service not in self._services:
            raise UnknownService
        return self._response(request.service)

    def _list(self, message: bytes, _: Call) -> bytes:
        parsed(HealthListRequest, message)
        statuses = {name: HealthCheckResponse.FromString(self._response(name)) for name in self._services}
        response: bytes = HealthListResponse(statuses=statuses).SerializeToString()
        return response

    async def _watch(self, messages: AsyncIterator[bytes], _: Call) -> AsyncIterator[bytes]:
        request = parsed(HealthCheckRequest, await only(messages))
        last = b""
        while True:
            # All three before the yield: the state may change while the client takes its time.
            changed, is_closed = self._changed, self._is_closed
            response = self._response(request.service)
            if response != last:
                yield response
                last = response
            if is_closed:
                return
            await changed.wait()

    def _response(self, service: str) -> bytes:
        if service not in self._services:
            return HealthCheckResponse(status=HealthCheckResponse.SERVICE_UNKNOWN).SerializeToString()
        status = HealthCheckResponse.SERVING if self._is_serving else HealthCheckResponse.NOT_SERVING
        return HealthCheckResponse(status=status).SerializeToString()


async def only(messages: AsyncIterator[bytes]) -> bytes:
    """Return the one message of a stream.

    Raises:
        Unimplemented: there is none, or another, which is how gRPC calls a wrong cardinality.
    """
    first: bytes | None = None
    async for message in messages:
        if first is not None:
            break
        first = message
    else:
        if first is not None:
            return first
    raise Unimplemented("mnemosyned: the method takes exactly one message")
