"""An exchange: a stream on which each message is answered before the next one is taken.

A stream of another kind has a task and generators, which each message passes: for a batch of one cached Get
they cost as much as the batch. An engine that can (h2_streams.py) asks an exchange in the step in which a
message is complete. `as_stream` makes a stream of it, for the engine that cannot.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from aio.later import Later
from mnemosyned.transport.call import Call

if TYPE_CHECKING:
    from mnemosyned.transport.methods import StreamHandler


class Exchange(Protocol):
    """What answers the messages of one stream."""

    def answer(self, message: bytes) -> bytes | Later[bytes]:
        """Return the answer to a message; until it is known, no other message is taken.

        A Later gets its outcome from no coroutine. What is raised, or the Later fails with, ends the stream.
        """
        ...

    def close(self) -> None:
        """Take note that the stream has ended: no message comes any more."""
        ...


# Gets the call, and what ends its stream with OK: at once, or after the answer that is under way. What it
# raises ends the stream before any message.
BeginExchange: TypeAlias = Callable[[Call, Callable[[], None]], Exchange]


def as_stream(begin: BeginExchange) -> StreamHandler:
    """Return a handler that has each message of a stream answered."""

    async def handle(messages: AsyncIterator[bytes], call: Call) -> AsyncIterator[bytes]:
        taking = _Taking(messages)
        exchange = begin(call, taking.finish)
        try:
            while (message := await taking.next()) is not None:
                answer = exchange.answer(message)
                yield answer if isinstance(answer, bytes) else await answer
        finally:
            exchange.close()

    return handle


class _Taking:
    """The messages of a stream, until this side ends it."""

    def __init__(self, messages: AsyncIterator[bytes]) -> None:
        self._messages = messages
        self._waiting: asyncio.Task[Any] | None = None
        self._is_finished = False

    def finish(self) -> None:
        if not self._is_finished and self._waiting is not None:
            self._waiting.cancel()
        self._is_finished = True

    async def next(self) -> bytes | None:
        """Return the next message; None: no other is taken."""
        if self._is_finished:
            return None
        task = self._waiting = asyncio.current_task()
        assert task is not None
        try:
            return await anext(self._messages)
        except StopAsyncIteration:
            return None
        except asyncio.CancelledError:
            # By `finish`, unless the engine has cancelled the task too, because the client's connection
            # broke. `uncancel` takes one request back and returns how many are left. With none left the
            # stream ends cleanly; otherwise the cancellation must go on.
            if self._is_finished and not task.uncancel():
                return None
            raise
        finally:
            self._waiting = None
