"""One call from message to answer or status, the same on every engine: counted, timed, logged."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from grpc import StatusCode

from aio.rate_limit import LogRateLimiter
from mnemosyned.errors import DeadlineExceeded, MnemosyneError
from mnemosyned.transport.methods import Call, ClientGone, StreamMethod, UnaryMethod
from mnemosyned.transport.status import GRPC_STATUS

log = logging.getLogger(__name__)

_REFUSALS: Final = LogRateLimiter()
# Enough for any known form of identifier; a log line is no place for more.
_MAX_REQUEST_ID: Final = 200

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


@dataclass(frozen=True, slots=True)
class Failure:
    """A status other than OK and its text."""

    code: StatusCode
    text: str
    is_bug: bool = False


async def invoke_unary(method: UnaryMethod, message: bytes, call: Call) -> bytes | Failure:
    """Return the response, or why there is none; only a cancellation is raised."""
    method.stats.begin()
    started_s = time.perf_counter()
    try:
        answer = method.handle(message, call)
        if not isinstance(answer, bytes):
            answer = await answer_in_time(answer, call)
    except asyncio.CancelledError:
        _count_cancelled(method, call, started_s)
        raise
    except Exception as exc:  # noqa: BLE001  # the root of a call: becomes its status
        return fail(method, call, exc, started_s)
    elapsed_s = time.perf_counter() - started_s
    method.stats.end_ok(elapsed_s)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("rpc", extra=_fields(method, call, StatusCode.OK, elapsed_s))
    return answer


async def invoke_stream(
    method: StreamMethod,
    messages: AsyncIterator[bytes],
    call: Call,
    send: Callable[[bytes], Awaitable[None]],
) -> Failure | None:
    """Send the responses; return why the stream ended early, if it did.

    Raises:
        ClientGone: by the messages; counted as cancelled.
    """
    method.stats.begin()
    started_s = time.perf_counter()
    try:
        async with in_time(call.deadline.left_s()):
            async for answer in method.handle(messages, call):
                await send(answer)
    except (asyncio.CancelledError, ClientGone):
        _count_cancelled(method, call, started_s)
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
    if failure.code in _CALLERS_FAULT:
        _log_within_budget(method, call, failure.code, elapsed_s, error=failure.text)
        return failure
    fields = _fields(method, call, failure.code, elapsed_s)
    if failure.is_bug:
        log.error("rpc_failed", extra=fields, exc_info=exc)
    else:
        log.warning("rpc_failed", extra=fields | {"error": failure.text})
    return failure


def refuse(path: str, call: Call, exc: MnemosyneError) -> Failure:
    """Log a call to no method of ours. Not counted: its path is no closed label set."""
    failure = failure_of(exc)
    left_out = _REFUSALS.take(time.perf_counter())
    if left_out is not None:
        fields: dict[str, object] = {"method": path[:200], "peer": call.peer, "error": failure.text}
        log.info("rpc_refused", extra=fields | _left_out(left_out))
    return failure


@asynccontextmanager
async def in_time(seconds: float | None) -> AsyncIterator[None]:
    """Raise DeadlineExceeded, and cancel the work inside, when the seconds have passed."""
    deadline = asyncio.timeout(seconds)
    try:
        async with deadline:
            yield
    except TimeoutError:
        if deadline.expired():
            raise DeadlineExceeded from None
        raise


async def answer_in_time(answer: Coroutine[Any, Any, bytes], call: Call) -> bytes:
    """Wait for an answer until the caller's deadline. Raises DeadlineExceeded, and what it raises."""
    try:
        seconds = call.deadline.left_s()
        if seconds is not None and seconds <= 0:
            # Begun, it might be done before the loop looks at its timers.
            raise DeadlineExceeded
    except MnemosyneError:
        answer.close()
        raise
    if seconds is None:
        return await answer
    # Not `in_time`: a generator around each call that waits costs a tenth of it.
    deadline = asyncio.timeout(seconds)
    try:
        async with deadline:
            return await answer
    except TimeoutError:
        if deadline.expired():
            raise DeadlineExceeded from None
        raise


def _count_cancelled(method: UnaryMethod | StreamMethod, call: Call, started_s: float) -> None:
    elapsed_s = time.perf_counter() - started_s
    method.stats.end(StatusCode.CANCELLED.name, elapsed_s)
    _log_within_budget(method, call, StatusCode.CANCELLED, elapsed_s)


def _log_within_budget(
    method: UnaryMethod | StreamMethod, call: Call, code: StatusCode, elapsed_s: float, **more: str
) -> None:
    left_out = method.log_limiter.take(time.perf_counter())
    if left_out is not None:
        log.info("rpc_failed", extra=_fields(method, call, code, elapsed_s) | more | _left_out(left_out))


def _left_out(count: int) -> dict[str, object]:
    return {"left_out": count} if count else {}


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
    return fields


def failure_of(exc: Exception) -> Failure:
    """Return an error as a status; what is no error of ours is a bug, whose text stays here."""
    code = GRPC_STATUS.get(type(exc)) if isinstance(exc, MnemosyneError) else None
    if code is None:
        return Failure(StatusCode.INTERNAL, "mnemosyned: internal error", is_bug=True)
    return Failure(code, str(exc))
