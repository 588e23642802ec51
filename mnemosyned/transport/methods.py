"""The method table: what a gRPC engine serves, without saying how."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from aio.rate_limit import LogRateLimiter
from mnemosyned.transport.call import Call, MethodStats

# Returns the response at once where it can: that saves a task switch on the hot path.
UnaryHandler = Callable[[bytes, Call], bytes | Coroutine[Any, Any, bytes]]
StreamHandler = Callable[[AsyncIterator[bytes], Call], AsyncIterator[bytes]]


@dataclass(frozen=True, slots=True, eq=False)
class UnaryMethod:
    """One message in, one message out; both serialized."""

    path: str
    handle: UnaryHandler
    stats: MethodStats
    max_message_bytes: int | None = None  # of a request; None: as the engine's options say
    log_limiter: LogRateLimiter = field(default_factory=LogRateLimiter)


@dataclass(frozen=True, slots=True, eq=False)
class StreamMethod:
    """Messages in, messages out."""

    path: str
    handle: StreamHandler
    stats: MethodStats
    max_message_bytes: int | None = None  # of each request; None: as the engine's options say
    log_limiter: LogRateLimiter = field(default_factory=LogRateLimiter)


@dataclass(frozen=True, slots=True)
class MethodTable:
    """Methods by path, as `/package.Service/Method`."""

    unary: dict[str, UnaryMethod] = field(default_factory=dict)
    streams: dict[str, StreamMethod] = field(default_factory=dict)

    def add_unary(
        self, service: str, name: str, handle: UnaryHandler, *, max_message_bytes: int | None = None
    ) -> None:
        """Serve a unary method."""
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

    def stats(self) -> list[MethodStats]:
        """Return the stats of all methods."""
        unary = [method.stats for method in self.unary.values()]
        return unary + [method.stats for method in self.streams.values()]
