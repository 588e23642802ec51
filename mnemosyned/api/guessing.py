"""Guesses: callers that ask for tokens which are unknown, or with API keys which are.

    client ── call ──> watch ──> guard (auth.py) ──> handler ──> router
                         |  an answer by which the caller learns about a token or a key of its choice
                         v
                  guess_counter.py, by caller ──> over -guess.threshold: a line of the log
                                             └──> over -guess.limit: answered late

What counts, and nothing else does:

    answer                                        | of
    ----------------------------------------------+----------------------------------------------------------
    NOT_FOUND                                     | Get, Context, SetValue, Abandon
    ALREADY_EXISTS                                | Start with a token of the caller's choice
    OK, and "no" or "none"                        | Exists; Delete and List by a token or a refresh token
    UNAUTHENTICATED                               | any method, if the call has an API key

A Start that succeeds does not count: it tells that its token was unknown, but it makes a session, and callers
may choose their tokens. A call that is cancelled or too late does not count, since it tells nothing.

Who is the caller
-----------------
1. The API key, if the guard has let the call in by it. A key that is not checked names no caller, or a
   guesser would be another caller with each call.
2. The first name in the certificate, which TLS has verified.
3. The address (security/caller_address.py).

Calls are counted where they enter the cluster, as they are guarded there. The table of forwarded calls is not
watched, so no call counts twice. Each node counts for itself.

The delay
---------
Known tokens are answered as ever, so a guesser finds a known one as fast as before. The delay slows down
guessers that wait for their answers, and makes others see RESOURCE_EXHAUSTED.

An answer that waits holds a place among the calls of its connection. Therefore few answers wait, of one
caller and of all. Further ones are RESOURCE_EXHAUSTED at once.

The hot path
------------
A cached Get that is found costs one function call more, about 60 ns. Names and counts are made only when an
answer counts.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from mnemosynerpc.session_pb2 import DeleteRequest, ListRequest

from aio.around import Around
from aio.later import Later, Outcome
from aio.rate_limit import LogRateLimiter
from http2.status import StatusCode
from mnemosyned.api.auth import KEY_METADATA
from mnemosyned.api.session_manager import SERVICE_NAME
from mnemosyned.errors import MnemosyneError, SessionAlreadyExists, SessionNotFound, Unauthenticated
from mnemosyned.security.caller_address import network_of
from mnemosyned.security.guess_counter import GuessCounter
from mnemosyned.transport.call import Call, Encoded
from mnemosyned.transport.methods import MethodTable, UnaryHandler
from mnemosyned.transport.status import error_of

if TYPE_CHECKING:
    from mnemosyned.security.api_keys import Callers
    from mnemosyned.security.config import GuessConfig

log = logging.getLogger(__name__)

DELAY_S: Final = 1.0
# Answers that wait, of one caller and in all. A connection has 128 places for calls, and behind a proxy all
# of these answers may be on one connection: it must have places left for other calls.
_MAX_WAITING_OF_CALLER: Final = 8
_MAX_WAITING: Final = 64
_MAX_NAME: Final = 253  # characters of a name in a certificate, as many as a host name may have

# The kind of caller, and what tells it from others of its kind.
Caller: TypeAlias = tuple[str, str | int]
_TELLING: Final = (SessionNotFound, SessionAlreadyExists, Unauthenticated)


@dataclass(slots=True)
class GuessCounts:
    """What has been counted since the start, for GuessCollector."""

    tokens: int = 0  # answers that count, by what they tell about
    keys: int = 0
    exceeded_by_kind: dict[str, int] = field(
        default_factory=lambda: {"key": 0, "certificate": 0, "address": 0}
    )
    late: int = 0
    refused: int = 0


class GuessWatch:
    """Counts the guesses of all callers of a node."""

    def __init__(
        self,
        config: GuessConfig,
        callers: Callable[[], Callers] | None,
        *,
        max_streams: int,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`callers` are those that the guard knows; None: there is no guard.

        `max_streams` is how many calls a connection has at once.
        """
        self.counts = GuessCounts()
        self._limit = config.limit or math.inf
        # A caller is never slowed down without a line that says so.
        self._threshold = min(config.threshold, self._limit)
        self._window_s = config.window_s
        self._known_callers = callers
        self._now_s = now_s
        self._counter: GuessCounter[Caller] = GuessCounter(config.window_s)
        self._lines = LogRateLimiter()
        self._max_waiting_of_caller = min(_MAX_WAITING_OF_CALLER, max_streams // 16)
        self._max_waiting = min(_MAX_WAITING, max_streams // 2)
        self._waiting: Counter[Caller] = Counter()
        self._waiting_count = 0

    def watch(self, table: MethodTable) -> None:
        """Replace each method of the SessionManager in the table by one whose answers are counted."""
        for path, method in list(table.unary.items()):
            _, service, name = path.split("/")
            if service == SERVICE_NAME:
                watched = self._watched(method.handle, _ASKS_FOR_TOKEN.get(name, _never))
                table.add_unary(service, name, watched, max_message_bytes=method.max_message_bytes)

    def callers(self) -> int:
        """Return how many callers have guessed in the current window."""
        return self._counter.callers(now_s=self._now_s())

    def _watched(self, handle: UnaryHandler, asks_for_token: Callable[[bytes], bool]) -> UnaryHandler:
        """Return a handler that counts; `asks_for_token` tells if an empty answer to a request counts."""
        # A large SetValue must not be in memory twice while it waits.
        keeps_message = asks_for_token is not _never

        def watched(message: bytes, call: Call) -> Encoded | Later[Encoded] | Coroutine[Any, Any, Encoded]:
            try:
                response = handle(message, call)
            except _TELLING as exc:
                late = self.counted(call, exc)
                if late is None:
                    raise
                return late
            # As in transport/call.py, faster than asking for both at once.
            if isinstance(response, bytes) or isinstance(response, tuple):  # noqa: SIM101
                if response or not asks_for_token(message):
                    return response
                return self.counted(call, response) or response
            # No inner function: the variables that it shares would cost each call, also a cached Get.
            kept = message if keeps_message else b""
            if isinstance(response, Later):
                return response.through(partial(self._ended, asks_for_token, kept, call))
            return Around(response, partial(self._finish, asks_for_token, kept, call))

        return watched

    def counted(self, call: Call, answer: Encoded | MnemosyneError) -> Coroutine[Any, Any, Encoded] | None:
        """Count an answer; return what gives it late, or None if it is given at once."""
        caller = self._over_limit(call, answer)
        if caller is None:
            return None
        # Before there is a task for it: refusals must be cheap.
        self._check_waiting(caller)
        return self._delayed(caller, call, answer)

    def _over_limit(self, call: Call, answer: Encoded | MnemosyneError) -> Caller | None:
        """Count an answer if it counts; return its caller if that is over the limit."""
        is_refused = isinstance(answer, Unauthenticated)
        if not is_refused:
            self.counts.tokens += 1
        elif call.metadata(KEY_METADATA) is None:
            return None
        else:
            self.counts.keys += 1
        now_s = self._now_s()
        caller = self._caller_of(call, is_refused=is_refused)
        count = self._counter.count(caller, now_s=now_s)
        if count <= self._threshold:
            return None
        if self._counter.may_report(caller, now_s=now_s):
            self._report(caller, call, count, now_s)
        return caller if count > self._limit else None

    def _caller_of(self, call: Call, *, is_refused: bool) -> Caller:
        if self._known_callers is not None and not is_refused:
            key = call.metadata(KEY_METADATA)
            if key is not None:
                # Its hash by Python, not the key: the key must not stay in memory for a window.
                return "key", hash(key)
        names = call.certificate_names
        return ("certificate", names[0]) if names else ("address", network_of(call.peer))

    def _report(self, caller: Caller, call: Call, count: int, now_s: float) -> None:
        kind, name = caller
        self.counts.exceeded_by_kind[kind] += 1
        left_out = self._lines.take(now_s)
        if left_out is None:
            return
        fields: dict[str, object] = {
            "caller": self._name_of(call) if kind == "key" else str(name)[:_MAX_NAME]
        }
        fields |= {"caller_kind": kind, "unknown": count, "within_s": self._window_s}
        log.warning("caller_guesses", extra=fields | ({"left_out": left_out} if left_out else {}))

    def _name_of(self, call: Call) -> str:
        key = call.metadata(KEY_METADATA)
        assert self._known_callers is not None
        assert key is not None
        line = self._known_callers().line_of(key)
        return "a key that -auth.keys has no more" if line is None else f"line {line} of -auth.keys"

    def _check_waiting(self, caller: Caller) -> None:
        is_full = self._waiting_count >= self._max_waiting
        if is_full or self._waiting[caller] >= self._max_waiting_of_caller:
            self.counts.refused += 1
            # The error that has this status: it is about messages, and its text is not.
            raise error_of(
                StatusCode.RESOURCE_EXHAUSTED.value,
                "mnemosyned: too many unknown tokens or API keys from this caller; try again later",
            ) from None

    def _ended(
        self,
        asks_for_token: Callable[[bytes], bool],
        message: bytes,
        call: Call,
        outcome: Outcome[Encoded],
    ) -> Outcome[Encoded]:
        """Return the outcome of a call that had to wait, or what gives it late; a step of a Later."""
        if isinstance(outcome, Coroutine):
            return Around(outcome, partial(self._finish, asks_for_token, message, call))
        if isinstance(outcome, BaseException):
            return (self.counted(call, outcome) or outcome) if isinstance(outcome, _TELLING) else outcome
        if outcome or not asks_for_token(message):
            return outcome
        return self.counted(call, outcome) or outcome

    async def _finish(
        self,
        asks_for_token: Callable[[bytes], bool],
        message: bytes,
        call: Call,
        work: Coroutine[Any, Any, Encoded],
    ) -> Encoded:
        """Return the answer of a call that must wait, late where it tells too much."""
        try:
            response = await work
        except _TELLING as exc:
            late = self.counted(call, exc)
            if late is None:
                raise
        else:
            if response or not asks_for_token(message):
                return response
            late = self.counted(call, response)
            if late is None:
                return response
        return await late

    async def _delayed(self, caller: Caller, call: Call, answer: Encoded | MnemosyneError) -> Encoded:
        # Once more: several may have been made since, and begin only now.
        self._check_waiting(caller)
        self._waiting[caller] += 1
        self._waiting_count += 1
        self.counts.late += 1
        try:
            await asyncio.sleep(call.deadline.share_s(DELAY_S))
        finally:
            self._waiting_count -= 1
            self._waiting[caller] -= 1
            if not self._waiting[caller]:
                del self._waiting[caller]
        if not isinstance(answer, MnemosyneError):
            return answer
        try:
            raise answer
        finally:
            # Otherwise this frame and the traceback would keep each other.
            del answer


def _never(_: bytes) -> bool:
    return False


def _deletes_by_token(message: bytes) -> bool:
    request = DeleteRequest.FromString(message)
    return bool(request.access_token or request.refresh_token)


def _lists_by_token(message: bytes) -> bool:
    return bool(ListRequest.FromString(message).query.refresh_token)


# By method. An empty message is what "no", "none" and 0 are on the wire.
_ASKS_FOR_TOKEN: Final[dict[str, Callable[[bytes], bool]]] = {
    "Exists": lambda _: True,
    "Delete": _deletes_by_token,
    "List": _lists_by_token,
}
