"""What a call is, and what becomes of it, the same on every engine: counted, timed, logged.

An engine makes a `Call`, finds its method in the table (`methods.py`), and has `invoke_unary` or
`invoke_stream` turn it into a response or a `Failure`. Every exception ends here:

    the handler raises       | status                     | log
    -------------------------+----------------------------+------------------------------------------------
    nothing                  | OK                         | `rpc` at DEBUG
    SessionNotFound          | NOT_FOUND                  | `rpc_failed` at DEBUG: the normal answer to a
                             |                            | session that has ended
    NotJoined                | UNAVAILABLE                | `rpc_failed` at DEBUG: nodes that start together
                             |                            | call each other early
    an error of the caller   | as in status.py            | `rpc_failed` at INFO, at most 100 a second
    another error of ours    | as in status.py            | `rpc_failed` at WARNING, at most 10 a second
    any other exception      | INTERNAL, without its text | `rpc_failed` at ERROR, at most 10 a second, with
                             |                            | the traceback
    CancelledError           | none is sent               | `rpc_failed` at INFO, as CANCELLED

All are limited (`methods.py`): a client can cause any number of them, also UNAVAILABLE by what it overloads.
A log line costs more than the call. How many were left out is told by the next line, or by `tell_left_out`.

The hot path. A cached Get enters `invoke_unary`, its handler, and nothing else of this module. Therefore:

- `handle` may return bytes, and then no coroutine is made and no time-out is set.
- Counts are plain integers, which Prometheus reads when it scrapes.
- The fields of a log line are collected only if the line is written.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from bisect import bisect_left
from collections import Counter as CountByLabel
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, TypeVar

from aio import later
from aio.deadline import Deadline
from aio.later import Later
from aio.rate_limit import LogRateLimiter, fields_of
from http2.status import StatusCode
from mnemosyned.errors import DeadlineExceeded, MnemosyneError, NotJoined
from mnemosyned.transport.status import GRPC_STATUS

if TYPE_CHECKING:
    from mnemosyned.transport.methods import StreamMethod, UnaryMethod

log = logging.getLogger(__name__)

T = TypeVar("T")

_REFUSALS: Final = LogRateLimiter()
_RPC_BUCKETS_S: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
# Characters. Enough for any usual form of identifier; the client chooses it, so it needs a bound.
_MAX_REQUEST_ID: Final = 200

# W3C Trace Context: version, trace, the caller's span, flags.
_TRACEPARENT: Final = re.compile("00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
# Metadata by which a client asks for its token's owner, whatever the value; and the trailer that says it.
OWNER_KEY: Final = "mnemosyned-owner"
# Without the path: it may contain a token, and this text reaches the logs of clients and proxies.
UNKNOWN_METHOD: Final = "mnemosyned: unknown method"

# What a client can cause as often as it likes; a deadline is its own choice.
_CALLERS_FAULT: Final = frozenset({
    StatusCode.UNAUTHENTICATED,
    StatusCode.PERMISSION_DENIED,
    StatusCode.FAILED_PRECONDITION,
    StatusCode.INVALID_ARGUMENT,
    StatusCode.NOT_FOUND,
    StatusCode.ALREADY_EXISTS,
    StatusCode.UNIMPLEMENTED,
    StatusCode.RESOURCE_EXHAUSTED,
    StatusCode.DEADLINE_EXCEEDED,
})  # fmt: skip


class Call(Protocol):
    """What a method may know of its call besides the message.

    `owner` is None if the caller does not ask where its token's owner is (`OWNER_KEY`). Otherwise it is
    empty, until a router writes the owner's public address there, which the engine sends as a trailer.
    """

    owner: str | None

    @property
    def peer(self) -> str:
        """The caller's address."""
        ...

    @property
    def deadline(self) -> Deadline:
        """Until when the caller waits.

        Raises:
            InvalidArgument: the caller's deadline cannot be read.
        """
        ...

    @property
    def certificate_names(self) -> tuple[str, ...]:
        """The names in the caller's certificate, if it has shown one that an authority of ours signed."""
        ...

    def metadata(self, key: str) -> str | None:
        """Return the first value of a metadata key, in lower case; None if the caller sent none."""
        ...


class ClientGone(Exception):
    """The client disconnected before its request was complete, and waits for no answer."""


class MethodStats:
    """What one gRPC method has done; times in seconds.

    Each `begin` is followed by one `end` or `end_ok`. All of them run on the event loop. The admin port reads
    from another thread: a number that is one call old does no harm there.
    """

    __slots__ = ("_buckets", "by_code", "duration_s", "in_flight", "labels", "ok")

    def __init__(self, service: str, handler: str, cardinality: str) -> None:
        self.labels = (service, handler, cardinality)
        self.in_flight = 0
        self.ok = 0  # apart from `by_code`: an attribute costs a third of a dictionary's update
        self.by_code: CountByLabel[str] = CountByLabel()
        self.duration_s = 0.0
        self._buckets = [0] * (len(_RPC_BUCKETS_S) + 1)

    def begin(self) -> None:
        """Count a call in."""
        self.in_flight += 1

    def end_ok(self, elapsed_s: float) -> None:
        """Count a call out that succeeded."""
        self.in_flight -= 1
        self.ok += 1
        self.duration_s += elapsed_s
        self._buckets[bisect_left(_RPC_BUCKETS_S, elapsed_s)] += 1

    def end(self, code: str, elapsed_s: float) -> None:
        """Count a call out with its gRPC status name, as `NOT_FOUND`."""
        self.end_ok(elapsed_s)
        if code != "OK":
            self.ok -= 1
            self.by_code[code] += 1

    def requests_by_code(self) -> dict[str, int]:
        """Return how many calls ended with which status."""
        return {"OK": self.ok, **self.by_code} if self.ok else dict(self.by_code)

    def cumulative_buckets(self) -> list[tuple[str, float]]:
        """Return (upper bound in seconds, calls at most that long), as Prometheus wants them."""
        total = 0
        rows: list[tuple[str, float]] = []
        bounds = [*map(str, _RPC_BUCKETS_S), "+Inf"]
        for bound, count in zip(bounds, self._buckets, strict=True):
            total += count
            rows.append((bound, total))
        return rows


@dataclass(frozen=True, slots=True)
class Failure:
    """A status other than OK and its text."""

    code: StatusCode
    text: str
    is_bug: bool = False


# A serialized message. A long one may come in pieces, which are then shared with the cache and not copied.
Encoded: TypeAlias = bytes | tuple[bytes, ...]
Outcome: TypeAlias = Encoded | Failure
_ENCODED: Final = (bytes, tuple)


def invoke_unary(
    method: UnaryMethod, message: bytes, call: Call
) -> Outcome | Later[Outcome] | Coroutine[Any, Any, Outcome]:
    """Return the response or why there is none, or what does later; only that raises, its cancellation.

    A response that the handler returns at once is sent even if the deadline has passed: it costs less than
    asking what time it is. A coroutine must be awaited, and a Later taken or cancelled: the call counts as in
    flight until it ends. A Later knows the deadline, and a coroutine that it ends in is kept to it.
    """
    method.stats.begin()
    started_s = time.perf_counter()
    try:
        response = method.handle(message, call)
    except Exception as exc:  # noqa: BLE001  # the root of a call: becomes its status
        return fail(method, call, exc, started_s)
    # Not `isinstance(response, Coroutine)`: a check against an abstract class is slower than the rest.
    if isinstance(response, bytes) or isinstance(response, tuple):  # noqa: SIM101  # faster than both at once
        elapsed_s = time.perf_counter() - started_s
        method.stats.end_ok(elapsed_s)
        if log.isEnabledFor(logging.DEBUG):
            _log_success(method, call, elapsed_s)
        return response
    if isinstance(response, Later):
        return response.through(partial(_ended, method, call, started_s))
    return _awaited(method, call, response, started_s)


def _ended(
    method: UnaryMethod, call: Call, started_s: float, outcome: later.Outcome[Encoded]
) -> later.Outcome[Outcome]:
    """Count a call out that was answered by a Later, unless it goes on."""
    if isinstance(outcome, _ENCODED):
        elapsed_s = time.perf_counter() - started_s
        method.stats.end_ok(elapsed_s)
        if log.isEnabledFor(logging.DEBUG):
            _log_success(method, call, elapsed_s)
        return outcome
    if isinstance(outcome, Exception):
        return fail(method, call, outcome, started_s)
    if isinstance(outcome, BaseException):
        count_cancelled(method, call, started_s)
        return outcome
    return _awaited(method, call, outcome, started_s)


async def _awaited(
    method: UnaryMethod, call: Call, response: Coroutine[Any, Any, Encoded], started_s: float
) -> Outcome:
    try:
        encoded = await await_in_time(response, call)
    except asyncio.CancelledError:
        count_cancelled(method, call, started_s)
        raise
    except Exception as exc:  # noqa: BLE001  # the root of a call: becomes its status
        return fail(method, call, exc, started_s)
    elapsed_s = time.perf_counter() - started_s
    method.stats.end_ok(elapsed_s)
    if log.isEnabledFor(logging.DEBUG):
        _log_success(method, call, elapsed_s)
    return encoded


def _log_success(method: UnaryMethod, call: Call, elapsed_s: float) -> None:
    log.debug("rpc", extra=_fields(method, call, StatusCode.OK, elapsed_s))


async def invoke_stream(
    method: StreamMethod,
    messages: AsyncIterator[bytes],
    call: Call,
    send: Callable[[bytes], Awaitable[None]],
) -> Failure | None:
    """Send the responses; return why the stream ended early, if it did.

    Raises:
        ClientGone: `messages` or `send` found the client disconnected; counted as cancelled.
    """
    method.stats.begin()
    started_s = time.perf_counter()
    try:
        async with in_time(call.deadline.left_s()):
            async for response in method.handle(messages, call):
                await send(response)
    except (asyncio.CancelledError, ClientGone):
        count_cancelled(method, call, started_s)
        raise
    except Exception as exc:  # noqa: BLE001  # the root of a call: becomes its status
        return fail(method, call, exc, started_s)
    method.stats.end_ok(time.perf_counter() - started_s)
    return None


def fail(method: UnaryMethod | StreamMethod, call: Call, exc: Exception, started_s: float) -> Failure:
    """Count and log a call that has begun and failed."""
    elapsed_s = time.perf_counter() - started_s
    failure = failure_of(exc)
    method.stats.end(failure.code.name, elapsed_s)
    level = logging.DEBUG if isinstance(exc, NotJoined) else _level_of(failure)
    if log.isEnabledFor(level):
        left_out = method.log_limiters[level].take(time.perf_counter())
        if left_out is not None:
            fields = _fields(method, call, failure.code, elapsed_s) | fields_of(left_out)
            fields |= {} if failure.is_bug else {"error": failure.text}
            log.log(level, "rpc_failed", extra=fields, exc_info=exc if failure.is_bug else None)
    return failure


def _level_of(failure: Failure) -> int:
    if failure.is_bug:
        return logging.ERROR
    if failure.code is StatusCode.NOT_FOUND:
        return logging.DEBUG
    return logging.INFO if failure.code in _CALLERS_FAULT else logging.WARNING


def tell_left_out(methods: Iterable[UnaryMethod | StreamMethod], now_s: float) -> None:
    """Log how many lines of failed calls were left out, where no later line has told it for a second."""
    for method in methods:
        for level, limiter in method.log_limiters.items():
            left_out = limiter.take_rest(now_s)
            if left_out:
                log.log(level, "rpc_failed_left_out", extra={"method": method.path, "left_out": left_out})
    refusals = _REFUSALS.take_rest(now_s)
    if refusals:
        log.info("rpc_refused_left_out", extra={"left_out": refusals})


def refuse(call: Call, exc: MnemosyneError) -> Failure:
    """Log a call to no method of ours. Not counted: clients choose the paths, so labels would have no bound.

    The path is not in the log, because it may contain a token. All such calls share one limit of log lines.
    """
    failure = failure_of(exc)
    left_out = _REFUSALS.take(time.perf_counter())
    if left_out is not None:
        fields: dict[str, object] = {"peer": call.peer, "error": failure.text}
        log.info("rpc_refused", extra=fields | fields_of(left_out))
    return failure


@asynccontextmanager
async def in_time(seconds: float | None) -> AsyncIterator[None]:
    """Raise DeadlineExceeded, and cancel the work inside, when the seconds have passed; None: never."""
    deadline = asyncio.timeout(seconds)
    try:
        async with deadline:
            yield
    except TimeoutError:
        # Otherwise the work raised a TimeoutError of its own, which is not the caller's deadline.
        if deadline.expired():
            raise DeadlineExceeded from None
        raise


async def await_in_time(response: Coroutine[Any, Any, T], call: Call) -> T:
    """Wait for a response until the caller's deadline.

    The coroutine is always used up: awaited, or closed if it is not even begun.

    Raises:
        DeadlineExceeded: the deadline has passed; the work is cancelled.
        InvalidArgument: the deadline cannot be read.
        MnemosyneError: the work raised it.
    """
    try:
        seconds = call.deadline.left_s()
        if seconds is not None and seconds <= 0:
            # A timer fires only when the loop comes round to it. Begun now, the work could be done before.
            raise DeadlineExceeded
    except MnemosyneError:
        response.close()
        raise
    if seconds is None:
        return await response
    # Not `in_time`: a generator around each call that waits costs a tenth of it.
    deadline = asyncio.timeout(seconds)
    try:
        async with deadline:
            return await response
    except TimeoutError:
        if deadline.expired():
            raise DeadlineExceeded from None
        raise


def count_cancelled(method: UnaryMethod | StreamMethod, call: Call, started_s: float) -> None:
    """Count and log a call that has begun, and whose client waits no more."""
    elapsed_s = time.perf_counter() - started_s
    method.stats.end(StatusCode.CANCELLED.name, elapsed_s)
    left_out = method.log_limiters[logging.INFO].take(time.perf_counter())
    if left_out is not None:
        fields = _fields(method, call, StatusCode.CANCELLED, elapsed_s) | fields_of(left_out)
        log.info("rpc_failed", extra=fields)


def _fields(
    method: UnaryMethod | StreamMethod, call: Call, code: StatusCode, elapsed_s: float
) -> dict[str, object]:
    fields: dict[str, object] = {
        "method": method.path,
        "code": code.name,
        "elapsed_ms": round(elapsed_s * 1000, 3),
        "peer": call.peer,
    }
    request_id = call.metadata("request_id") or call.metadata("x-request-id")
    if request_id is not None:
        fields["request_id"] = request_id[:_MAX_REQUEST_ID]
    trace = _TRACEPARENT.fullmatch(call.metadata("traceparent") or "")
    if trace is not None:
        fields |= {"trace_id": trace[1], "span_id": trace[2], "trace_sampled": bool(int(trace[3], 16) & 1)}
    return fields


def failure_of(exc: Exception) -> Failure:
    """Return an error as a status; any exception but ours is a bug, and becomes INTERNAL without its text.

    The text of a bug may hold a token. The table is asked by exact type: a test proves that it is complete.
    """
    code = GRPC_STATUS.get(type(exc)) if isinstance(exc, MnemosyneError) else None
    if code is None:
        return Failure(StatusCode.INTERNAL, "mnemosyned: internal error", is_bug=True)
    return Failure(code, str(exc))
