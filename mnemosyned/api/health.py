"""The standard service `grpc.health.v1.Health`, by which balancers decide whether to send calls here.

https://github.com/grpc/grpc/blob/master/doc/health-checking.md

    NOT_SERVING ──── the storage is open, and the cluster is joined ────> SERVING
         ^                                                                   |
         └──────────── `close`, the first step of a drain <──────────────────┘   final

All services share one state, because one storage and one cluster are behind all of them. It stays SERVING
while the storage is down, because no other node could serve either: a balancer that takes every node out
leaves its clients without even an error. The admin port's `/healthr` reports the storage (daemon.py).

    asked for        | Check               | Watch
    -----------------+---------------------+------------------------------------------------
    "" or a service  | its state           | its state, then each change
    another name     | NOT_FOUND           | SERVICE_UNKNOWN, on a stream that stays open

Watchers
--------
A watcher waits for an event that the next change sets. Each change makes a fresh event, so that a watcher
that waits later waits for the change after it. A watcher that is slow to read may miss a change that was
taken back in between. It never misses the last one, because it takes the event before it reads the state.

`close` ends the streams of watchers after a last NOT_SERVING. A drain waits for calls in flight, and a stream
that never ends would hold it for the whole of `-drain.timeout`.
"""

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

from mnemosyned.api.parsing import parsed
from mnemosyned.errors import Unimplemented, UnknownService
from mnemosyned.transport.call import Call
from mnemosyned.transport.methods import MethodTable
from mnemosyned.transport.places import StreamPlaces

SERVICE_NAME: Final = "grpc.health.v1.Health"
_MAX_MESSAGE_BYTES: Final = 16 * 1024


class Health:
    """One state for the server as a whole ("") and for each of the named services; at first NOT_SERVING.

    On the event loop alone: it has no lock.
    """

    def __init__(self, services: frozenset[str], places: StreamPlaces) -> None:
        """`places` bound the watchers: a client has one on each connection, a proxy those of several."""
        self._services = services | {""}
        self._is_serving = False
        self._is_closed = False
        self._changed = asyncio.Event()
        self._places = places

    def add_to(self, table: MethodTable) -> None:
        """Serve Check, List and Watch."""
        # A name of a service, of any client: it needs no room for more.
        limit = _MAX_MESSAGE_BYTES
        table.add_unary(SERVICE_NAME, "Check", self._check, max_message_bytes=limit)
        table.add_unary(SERVICE_NAME, "List", self._list, max_message_bytes=limit)
        table.add_stream(SERVICE_NAME, "Watch", self._watch, max_message_bytes=limit)

    def set_serving(self, is_serving: bool) -> None:  # noqa: FBT001  # the state itself
        """Change the state and wake the watchers; nothing happens once closed.

        A drain may overtake the start: a SIGTERM comes while the node still joins its cluster. The late
        `set_serving(True)` must not undo the drain.
        """
        if not self._is_closed and is_serving != self._is_serving:
            self._is_serving = is_serving
            self._announce()

    def close(self) -> None:
        """Be NOT_SERVING from now on, and end the streams of watchers."""
        self._is_serving = False
        self._is_closed = True
        self._announce()

    def _announce(self) -> None:
        # Set and replaced, not set and cleared: the watchers of the old event all wake, in their own time.
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

    async def _watch(self, messages: AsyncIterator[bytes], call: Call) -> AsyncIterator[bytes]:
        with self._places.take(call):
            async for response in self._watched(messages):
                yield response

    async def _watched(self, messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        request = parsed(HealthCheckRequest, await only(messages))
        last = b""
        while True:
            # All three before the yield, at which the client may take its time. A change during that sets
            # the event that this watcher already holds, so that the wait below returns at once.
            changed, is_closed = self._changed, self._is_closed
            response = self._response(request.service)
            if response != last:
                # Only what differs: a state that was changed and changed back needs no message.
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
        Unimplemented: the stream has no message, or more than one. That is gRPC's status for a wrong
            cardinality.
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
