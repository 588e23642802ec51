"""What a server has answered to a call: a message, or the error that the caller gets.

A response of gRPC is headers, messages and trailers. The status is in the trailers, or in the headers if
there is nothing else. What it means for the call:

    one whole message, and OK                               | the message
    another status than OK                                  | CallFailed with that status
    no status, so no response of gRPC                       | CallFailed, UNKNOWN
    OK without one whole message, or a compressed one       | CallFailed, INTERNAL
    a message that is announced as too large                | CallFailed, RESOURCE_EXHAUSTED or INTERNAL
    the server reset the stream, or the connection broke    | ConnectionLost
"""

from __future__ import annotations

import asyncio
from typing import Final
from urllib.parse import unquote_to_bytes

from http2.client import ClientStream
from http2.messages import announced_bytes, only_message
from http2.status import StatusCode, parse_status

MAX_MESSAGE_BYTES: Final = 64 * 1024**2


class CallFailed(Exception):
    """The server has answered with another status than OK."""

    def __init__(self, code: StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code


class ConnectionLost(Exception):
    """There was no connection, or it ended before the answer; the text is for people."""


class UnaryResponse:
    """The work (http2/client.py) of a stream that has one answer: gives it to a future when it is whole."""

    def __init__(self, answer: asyncio.Future[bytes], max_bytes: int) -> None:
        """Take no answer that is, or is announced to be, larger than `max_bytes`."""
        self._answer = answer
        self._max_bytes = max_bytes

    def take_news(self, stream: ClientStream) -> None:
        """See Work."""
        if self._answer.done():
            return
        if stream.is_complete or stream.reset_code is not None:
            failure = failure_of(stream)
            message = only_message(stream.body)
            if failure is not None:
                self._answer.set_exception(failure)
            elif message is None:
                self._answer.set_exception(CallFailed(StatusCode.INTERNAL, "the answer is no message"))
            else:
                self._answer.set_result(message)
        elif announced_bytes(stream.body) > self._max_bytes:
            self._answer.set_exception(CallFailed(StatusCode.RESOURCE_EXHAUSTED, "the answer is too large"))


def failure_of(stream: ClientStream) -> CallFailed | ConnectionLost | None:
    """Return with what a stream has ended, unless that was OK."""
    if stream.reset_code is not None:
        return ConnectionLost(f"the stream was reset with code {stream.reset_code}")
    # An answer that is a failure alone has its status in the only block of headers.
    fields = dict(stream.headers) | dict(stream.trailers)
    if b"grpc-status" not in fields:
        return CallFailed(StatusCode.UNKNOWN, f"no answer of gRPC, but HTTP {stream.status}")
    code = parse_status(fields[b"grpc-status"])
    if code is StatusCode.OK:
        return None
    return CallFailed(code, unquote_to_bytes(fields.get(b"grpc-message", b"")).decode(errors="replace"))
