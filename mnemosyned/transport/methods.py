"""The method table: what a gRPC engine serves, without saying how.

Services add their methods to a table; an engine serves the table. Neither knows the other, so that one test
suite can run each service on each engine.

    session_manager.add_to ┐                                        ┌ h2
    health.add_to          ├──> MethodTable ── guard, traces ──>    ┤
    PeerService.add_to     ┘    (path -> handler, stats, limit)     └ grpcio

A node of a cluster has two tables (assembly.py): what the port serves, and what a forwarded call may call.
Handlers are wrapped by adding a method once more under its name: api/auth.py and traces.py do that before the
engine starts. The stats of the wrapped method start at zero, so they are collected after all wrapping.

A handler gets and returns serialized messages. It raises a MnemosyneError, which becomes a gRPC status;
anything else that it raises is a bug.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from aio.later import Later
from aio.rate_limit import LogRateLimiter
from mnemosyned.transport.call import Call, Encoded, MethodStats
from mnemosyned.transport.exchange import BeginExchange, as_stream

# Returns the response at once where it can: that saves a task switch on the hot path. A Later saves one too,
# where the response comes with a batch, of the storage or from another node. All others return a coroutine.
UnaryHandler = Callable[[bytes, Call], Encoded | Later[Encoded] | Coroutine[Any, Any, Encoded]]
StreamHandler = Callable[[AsyncIterator[bytes], Call], AsyncIterator[bytes]]


def _new_limiters() -> dict[int, LogRateLimiter]:
    # One for each level, so that callers with errors of their own do not hide those of the daemon, and an
    # outage hides no bug. Ten lines say as much of an outage as ten thousand.
    return {
        logging.DEBUG: LogRateLimiter(),
        logging.INFO: LogRateLimiter(),
        logging.WARNING: LogRateLimiter(10),
        logging.ERROR: LogRateLimiter(10),
    }


@dataclass(frozen=True, slots=True, eq=False)
class UnaryMethod:
    """One message in, one message out; both serialized.

    Compared by identity (`eq=False`): two methods with equal fields still count their own calls.
    """

    path: str
    handle: UnaryHandler
    stats: MethodStats
    max_message_bytes: int | None = None  # of a request; None: as the engine's options say
    log_limiters: Mapping[int, LogRateLimiter] = field(default_factory=_new_limiters)  # by level


@dataclass(frozen=True, slots=True, eq=False)
class StreamMethod:
    """Messages in, messages out. One with `begin` is an exchange; an engine may answer it without a task."""

    path: str
    handle: StreamHandler
    stats: MethodStats
    max_message_bytes: int | None = None  # of each request; None: as the engine's options say
    begin: BeginExchange | None = None
    log_limiters: Mapping[int, LogRateLimiter] = field(default_factory=_new_limiters)  # by level


@dataclass(frozen=True, slots=True)
class MethodTable:
    """Methods by path, as `/package.Service/Method`; complete before an engine starts with it."""

    unary: dict[str, UnaryMethod] = field(default_factory=dict)
    streams: dict[str, StreamMethod] = field(default_factory=dict)

    def add_unary(
        self, service: str, name: str, handle: UnaryHandler, *, max_message_bytes: int | None = None
    ) -> None:
        """Serve a unary method, instead of the one that the path has, if it has one."""
        path = f"/{service}/{name}"
        stats = MethodStats(service, name, "unary")
        self.unary[path] = UnaryMethod(path, handle, stats, max_message_bytes)

    def add_stream(
        self, service: str, name: str, handle: StreamHandler, *, max_message_bytes: int | None = None
    ) -> None:
        """Serve a method that streams in either direction or both."""
        path = f"/{service}/{name}"
        stats = MethodStats(service, name, "stream")
        self.streams[path] = StreamMethod(path, handle, stats, max_message_bytes)

    def add_exchange(
        self, service: str, name: str, begin: BeginExchange, *, max_message_bytes: int | None = None
    ) -> None:
        """Serve a method that answers each message of a stream before the next one."""
        path = f"/{service}/{name}"
        stats = MethodStats(service, name, "stream")
        self.streams[path] = StreamMethod(path, as_stream(begin), stats, max_message_bytes, begin)

    def methods(self) -> list[UnaryMethod | StreamMethod]:
        """Return all methods."""
        return [*self.unary.values(), *self.streams.values()]

    def stats(self) -> list[MethodStats]:
        """Return the stats of all methods, for RpcCollector."""
        return [method.stats for method in self.methods()]
