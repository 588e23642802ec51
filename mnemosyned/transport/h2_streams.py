"""Calls of many messages on a stream of HTTP/2: their messages, and what works for them.

    Calls (h2_calls.py) ── `feed`: a part ──> StreamWork: the handler has a task, and waits for messages
                                    └───────> ExchangeWork: each is answered in the step in which it is
                                              complete, or later; there is no task

Messages wait until those before them are taken, within bounds. A client that does not read what was sent to
it is not answered further.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Final, Protocol

from aio.later import Later, Outcome
from mnemosyned.errors import DeadlineExceeded, MnemosyneError, Overloaded
from mnemosyned.transport.call import ClientGone, Failure, count_cancelled, fail
from mnemosyned.transport.exchange import BeginExchange, Exchange
from mnemosyned.transport.frame import FrameReader
from mnemosyned.transport.h2_call import Call
from mnemosyned.transport.methods import StreamMethod

_HIGH_WATER_BYTES: Final = 64 * 1024  # held of one streaming answer, before its handler waits
_MAX_QUEUED_BYTES: Final = 1024 * 1024  # of the messages of one call that its handler has not taken
_MAX_QUEUED: Final = 1000  # such messages


class Streaming:
    """The work of a call of many messages."""

    def __init__(self, call: Call, reader: FrameReader) -> None:
        self._call = call
        self._reader = reader
        self._messages: deque[bytes] = deque()
        self._queued_bytes = 0
        self._counted_bytes = 0
        self._error: MnemosyneError | None = None
        self._is_last = False

    def feed(self, body: bytes) -> None:
        """Take a part of the request in, and its end if the call is complete."""
        self._is_last = is_last = self._call.is_complete
        if self._call.is_refused:
            # Parts of it were dropped, so what follows is no frame any more.
            self._error = Overloaded("mnemosyned: too many requests are incomplete")
        if self._error is None:
            try:
                self._enqueue(self._reader.feed(body))
                if is_last:
                    self._reader.end()
            except MnemosyneError as exc:
                self._error = exc
        self._count()

    def wake(self) -> None:
        """Take note that nothing is held of the answer any more."""
        raise NotImplementedError

    def cancel(self) -> None:
        """Stop the handler."""
        raise NotImplementedError

    def _next(self) -> bytes | None:
        """Return the next message; None: there is none yet, or no more. Raises what is wrong with it."""
        if self._messages:
            message = self._messages.popleft()
            self._queued_bytes -= len(message)
            self._count()
            return message
        if self._error is not None:
            raise self._error
        return None

    @property
    def _must_wait(self) -> bool:
        """Whether the client has too much to read already."""
        return self._call.connection.unsent_of(self._call) > _HIGH_WATER_BYTES

    def _count(self) -> None:
        held_bytes = self._queued_bytes + self._reader.held_bytes
        if held_bytes != self._counted_bytes:
            self._call.connection.count(self._call, held_bytes - self._counted_bytes)
            self._counted_bytes = held_bytes

    def _enqueue(self, messages: list[bytes]) -> None:
        self._messages.extend(messages)
        self._queued_bytes += sum(map(len, messages))
        # A single message may be as large as its method allows.
        if len(self._messages) > _MAX_QUEUED or (
            len(self._messages) > 1 and self._queued_bytes > _MAX_QUEUED_BYTES
        ):
            self._messages.clear()
            self._queued_bytes = 0
            raise Overloaded("mnemosyned: too many messages are not answered")


class StreamWork(Streaming):
    """A call whose handler has a task."""

    def __init__(self, call: Call, reader: FrameReader) -> None:
        super().__init__(call, reader)
        self.task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._emptied = asyncio.Event()

    def feed(self, body: bytes) -> None:
        """See Streaming."""
        super().feed(body)
        self._news.set()

    async def messages(self) -> AsyncIterator[bytes]:
        """Yield the messages as they come. Raises what is wrong with the next one."""
        while True:
            while (message := self._next()) is not None:
                yield message
            if self._is_last:
                return
            self._news.clear()
            await self._news.wait()

    async def send(self, message: bytes) -> None:
        """Send a message, and wait until the client has taken most of what was sent before."""
        if self._call.is_reset:
            raise ClientGone
        self._call.connection.send_part(self._call, message)
        while self._must_wait:
            self._emptied.clear()
            await self._emptied.wait()

    def wake(self) -> None:
        """See Streaming."""
        self._emptied.set()

    def cancel(self) -> None:
        """See Streaming."""
        if self.task is not None:
            self.task.cancel()


class Sender(Protocol):
    """What sends the answers of an exchange, and its end; they leave with what else this step sends."""

    def send_part(self, call: Call, message: bytes) -> None:
        """Answer with one message of several, or hold it."""
        ...

    def end_stream(self, call: Call, failure: Failure | None) -> None:
        """End the answer."""
        ...


class ExchangeWork(Streaming):
    """A call of an exchange (exchange.py)."""

    def __init__(self, method: StreamMethod, call: Call, reader: FrameReader, sender: Sender) -> None:
        super().__init__(call, reader)
        self._method = method
        self._sender = sender
        self._exchange: Exchange | None = None
        self._under_way: Later[bytes] | None = None
        self._is_answering = False
        self._is_finishing = False
        self._is_over = False
        self._timer: asyncio.TimerHandle | None = None
        self._started_s = time.perf_counter()

    def begin(self, begin: BeginExchange) -> None:
        """Begin, before any message; only once. What goes wrong here and later becomes the call's status."""
        self._method.stats.begin()
        try:
            self._exchange = begin(self._call, self._finish)
            left_s = self._call.deadline.left_s()
            if left_s is not None:
                self._timer = asyncio.get_running_loop().call_later(left_s, self._be_late)
        except Exception as exc:  # noqa: BLE001  # the root of a call
            self._end(exc)

    def feed(self, body: bytes) -> None:
        """See Streaming."""
        if not self._is_over:
            super().feed(body)
            self._answer()

    def wake(self) -> None:
        """See Streaming."""
        self._answer()
        self._call.connection.flush_soon()

    def cancel(self) -> None:
        """See Streaming."""
        if not self._is_over:
            self._close()
            count_cancelled(self._method, self._call, self._started_s)

    def _be_late(self) -> None:
        self._end(DeadlineExceeded())
        self._call.connection.flush_soon()

    def _finish(self) -> None:
        self._is_finishing = True
        self._answer()
        self._call.connection.flush_soon()

    def _answer(self) -> None:
        """Answer the messages that have come, until one takes longer or the client has too much to read."""
        if self._exchange is None or self._is_answering:
            # In the second case by `_take`, in a loop that goes on.
            return
        self._is_answering = True
        try:
            while self._may_take and (message := self._next()) is not None:
                answer = self._exchange.answer(message)
                if isinstance(answer, bytes):
                    self._sender.send_part(self._call, answer)
                else:
                    self._under_way = answer
                    answer.then(self._take)
        except Exception as exc:  # noqa: BLE001  # as in `begin`
            self._end(exc)
        finally:
            self._is_answering = False
        if self._under_way is None and (self._is_finishing or self._is_taken):
            self._end(None)

    @property
    def _is_taken(self) -> bool:
        """Whether the client sends no more, and nothing of what it has sent waits."""
        return self._is_last and not self._messages and self._error is None

    @property
    def _may_take(self) -> bool:
        return self._under_way is None and not (self._is_over or self._is_finishing or self._must_wait)

    def _take(self, outcome: Outcome[bytes]) -> None:
        """Send an answer that was not known at once, and go on with the next message."""
        if self._is_over:
            return
        self._under_way = None
        if isinstance(outcome, bytes):
            self._sender.send_part(self._call, outcome)
        else:
            assert isinstance(outcome, Exception)
            self._end(outcome)
        self._answer()
        self._call.connection.flush_soon()

    def _end(self, exc: Exception | None) -> None:
        """End the answer, once; count and log it as in call.py."""
        if self._is_over:
            return
        self._close()
        failure = None
        if exc is None:
            self._method.stats.end_ok(time.perf_counter() - self._started_s)
        else:
            failure = fail(self._method, self._call, exc, self._started_s)
        self._sender.end_stream(self._call, failure)

    def _close(self) -> None:
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()
        if self._under_way is not None:
            self._under_way.close()
        if self._exchange is not None:
            self._exchange.close()
