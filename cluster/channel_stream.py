"""A stream on which each message is answered before the next is sent, on a connection of a channel.

    open() ─> channel.ready() ─> the stream begins, on the connection that there is
    ask()  ─> one message leaves ... take_news(): the next message that comes is its answer
    finish() or cancel(): no message follows

Messages have no numbers, so an answer that nobody waits for would be taken for that of the next message.
Therefore any failure of an `ask` ends the stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aio.later import Later, Outcome, failed
from cluster.channel import Channel
from cluster.connection import Connection
from cluster.responses import MAX_MESSAGE_BYTES, CallFailed, ConnectionLost, failure_of
from http2.client import ClientStream
from http2.messages import HEADER_BYTES, announced_bytes, framed, only_message
from http2.outbox import Headers
from http2.status import StatusCode


class ChannelStream:
    """A stream on which each message is answered before the next is sent."""

    def __init__(self, channel: Channel, path: bytes, open_with: Callable[[Any], Headers]) -> None:
        """Open nothing yet.

        `open_with` gets what the introduction of the stream's connection returned, and returns the metadata.
        """
        self._channel = channel
        self._path = path
        self._open_with = open_with
        self._connection: Connection | None = None
        self._stream: ClientStream | None = None
        self._waiter: Later[bytes] | None = None
        self._received = bytearray()
        self._is_over = False

    @property
    def is_open(self) -> bool:
        """Whether the server waits for a message, as far as is known, on a connection that will stay."""
        return not self._is_over and (self._connection is None or not self._connection.http.is_retiring)

    async def open(self, *, timeout_s: float) -> None:
        """Open the stream, if it is not open yet. Raises as `ask` does."""
        if self._stream is not None:
            return
        try:
            connection = self._connection = await self._channel.ready(timeout_s)
        except BaseException:
            self.cancel()
            raise
        metadata = self._open_with(connection.introduction)
        self._stream = self._channel.open_on(connection, self._path, metadata, self)

    @property
    def is_begun(self) -> bool:
        """Whether it was opened."""
        return self._stream is not None

    def ask(self, message: bytes, *, timeout_s: float) -> Later[bytes]:
        """Send a message on an open stream, and return the next one that comes; a failure closes the stream.

        The Later fails with:
            CallFailed: the server has ended the stream with a status.
            ConnectionLost: no connection, or it broke, or the server has ended the stream.
            TimeoutError: no answer in time.
        """
        connection, stream = self._connection, self._stream
        if self._is_over or connection is None or stream is None:
            return failed(ConnectionLost("the stream is closed"))
        waiter: Later[bytes] = Later()
        answer = waiter.through(self._answered)
        self._waiter = waiter
        self._channel.expiry.add(waiter, timeout_s)
        try:
            connection.send(stream, framed(message), is_last=False)
        except Exception as exc:  # noqa: BLE001  # as if it had come later
            waiter.set_exception(exc)
        return answer

    def _answered(self, outcome: Outcome[bytes]) -> Outcome[bytes]:
        self._waiter = None
        if not isinstance(outcome, bytes):
            self.cancel()
        return outcome

    def take_news(self, stream: ClientStream) -> None:
        """See Work."""
        body = stream.take_body()
        has_ended = stream.is_complete or stream.reset_code is not None
        # Before the answer is given: it may bring the next message.
        self._is_over |= has_ended
        waiter = self._waiter
        if waiter is None or waiter.done():
            self._received += body
            return
        try:
            message = self._message_with(body)
        except CallFailed as exc:
            waiter.set_exception(exc)
            return
        if message is not None:
            waiter.set_result(message)
        elif has_ended:
            waiter.set_exception(failure_of(stream) or ConnectionLost("the server has ended the stream"))

    def _message_with(self, body: bytes | bytearray) -> bytes | None:
        """Return the message that these bytes complete; None: more must come. Raises CallFailed."""
        if not self._received:
            # Most answers come as a whole.
            message = only_message(body)
            if message is not None:
                return message
        self._received += body
        return _first_message(self._received)

    def finish(self) -> None:
        """Tell the server that no further message comes; what it says to that is not awaited."""
        self._is_over = True
        if self._connection is not None and self._stream is not None:
            self._connection.finish(self._stream)

    def cancel(self) -> None:
        """End the stream at once."""
        self._is_over = True
        if self._connection is not None and self._stream is not None:
            self._connection.cancel(self._stream)


def _first_message(received: bytearray) -> bytes | None:
    """Take the first message out of what has come; None: more must come. Raises CallFailed."""
    if len(received) < HEADER_BYTES:
        return None
    end = announced_bytes(received[:HEADER_BYTES])
    if received[0] or end > MAX_MESSAGE_BYTES:
        raise CallFailed(StatusCode.INTERNAL, "the answer is compressed or too large")
    if len(received) < end:
        return None
    message = bytes(received[HEADER_BYTES:end])
    del received[:end]
    return message
