"""gRPC over HTTP/2 without the HTTP/2: frames, time-outs, texts of statuses. Pure.

https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md

A message travels in a frame of gRPC's own (http2/messages.py). Responses are sent uncompressed: most are
below a kilobyte.

Most requests are one whole uncompressed frame in one piece. `only_message` takes that short way and says None
to everything else, which `FrameReader` then reads, and names the fault of.

Limits: a frame announces its length before its payload comes, so a message that is too large is refused when
five bytes of it are there. A compressed message is unpacked to at most one byte more than the limit: a few
kilobytes can unpack to gigabytes. Unpacking is in steps (aio/steps.py), because 4 MiB take 4 to 20 ms.
"""

from __future__ import annotations

import re
import zlib
from functools import lru_cache
from typing import Final

from aio.steps import STEP_BYTES, Steps, finished
from http2.messages import HEADER_BYTES, only_message
from mnemosyned.errors import InvalidArgument, MalformedMessage, MessageTooLarge, Unimplemented

ACCEPTED_ENCODINGS: Final = b"identity,deflate,gzip"

_IS_COMPRESSED: Final = 1
_WBITS_BY_ENCODING: Final = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}
_WBITS_OF_BOTH: Final = 32 + zlib.MAX_WBITS  # zlib looks which one it is
_PACKED_BEGINS: Final = frozenset({b"\x1f\x8b", b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda"})
_LEAST_PACKED_BYTES: Final = 8  # of an empty message
_TIMEOUT: Final = re.compile(rb"([0-9]{1,8})([HMSmun])")
_SECONDS_BY_UNIT: Final = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
# What `grpc-message` must percent-encode: all but printable ASCII, and the percent sign itself.
_UNSAFE: Final = re.compile(rb"[^ -$&-~]")


def timeout_s(value: bytes) -> float:
    """Read a `grpc-timeout` header, such as `250m` for 250 milliseconds; return seconds.

    Raises:
        InvalidArgument: it is not one to eight digits and a unit of gRPC's.
    """
    match = _TIMEOUT.fullmatch(value)
    if match is None:
        raise InvalidArgument("mnemosyned: malformed grpc-timeout")
    return int(match[1]) * _SECONDS_BY_UNIT[match[2]]


# Clients round their time-outs, so that few values come again and again.
@lru_cache(maxsize=4096)
def has_time(value: bytes) -> bool:
    """Tell whether a `grpc-timeout` header can be read, and is longer than zero."""
    match = _TIMEOUT.fullmatch(value)
    return match is not None and int(match[1]) > 0


def status_message(text: str) -> bytes:
    """Percent-encode the text of a status for `grpc-message`."""
    return _UNSAFE.sub(lambda match: b"%%%02X" % match[0][0], text.encode())


class OverLimit(Exception):
    """What is unpacked is longer than it may be."""


def unpacking(packed: bytes, wbits: int, *, max_bytes: int) -> Steps[bytes]:
    """Unpack what zlib has packed; `wbits` as in zlib.

    Raises:
        OverLimit: it unpacks to more than `max_bytes`.
        MalformedMessage: it is damaged, or cut short.
    """
    unpacker = zlib.decompressobj(wbits)
    unpacked: list[bytes] = []
    left_bytes = max_bytes
    rest, at, has_more = b"", 0, True
    while has_more:
        if at:
            yield
        # In small pieces of both: what zlib leaves of its input is a copy.
        if not rest:
            rest, at = packed[at : at + STEP_BYTES], at + STEP_BYTES
        try:
            part = unpacker.decompress(rest, STEP_BYTES)
        except zlib.error:
            raise MalformedMessage("mnemosyned: a compressed message is damaged") from None
        rest = unpacker.unconsumed_tail
        left_bytes -= len(part)
        if left_bytes < 0:
            raise OverLimit
        unpacked.append(part)
        has_more = not unpacker.eof and bool(rest or at < len(packed) or len(part) == STEP_BYTES)
    if not unpacker.eof:
        raise MalformedMessage("mnemosyned: a compressed message is cut short")
    return b"".join(unpacked)


def is_packed(message: bytes) -> bool:
    """Tell whether bytes that should be a message are one that is still compressed.

    0x1f begins gzip and no message of protobuf. 0x78 begins what zlib calls deflate, and in protobuf a field
    with the number 15, which no message of ours has; a check of five bits follows (RFC 1950).
    """
    begin = message[:2]
    return begin in _PACKED_BEGINS and len(message) >= _LEAST_PACKED_BYTES


def unpacking_message(packed: bytes, *, max_bytes: int) -> Steps[bytes]:
    """Unpack such a message.

    Raises:
        MessageTooLarge: it unpacks to more than `max_bytes`.
        MalformedMessage: it is damaged.
    """
    try:
        return (yield from unpacking(packed, _WBITS_OF_BOTH, max_bytes=max_bytes))
    except OverLimit:
        raise too_large(max_bytes) from None


def too_large(max_bytes: int) -> MessageTooLarge:
    """Return the error for a message over a limit."""
    return MessageTooLarge(f"mnemosyned: message is larger than {max_bytes} bytes")


class FrameReader:
    """Cuts a stream of bytes into messages, in whatever pieces the bytes arrive.

    `encoding` is the stream's `grpc-encoding`, empty if it has none. One reader serves one stream; after an
    error it is of no further use.

    Raises:
        MessageTooLarge: a frame announces, or unpacks to, more than `max_message_bytes`.
        MalformedMessage: the bytes are no frames, or a compressed message is damaged.
        Unimplemented: the encoding is none of `ACCEPTED_ENCODINGS`.
    """

    def __init__(self, *, encoding: bytes, max_message_bytes: int) -> None:
        self._encoding = encoding
        self._max_message_bytes = max_message_bytes
        self._buffer = bytearray()

    @property
    def held_bytes(self) -> int:
        """How much of a message that is not complete is held."""
        return len(self._buffer)

    def feed(self, body: bytes) -> list[bytes]:
        """Take bytes in; return the messages that they complete. Raises as the class says."""
        if not self._buffer and len(body) <= self._max_message_bytes:
            # Most messages come as a whole.
            message = only_message(body)
            if message is not None:
                return [message]
        self._buffer += body
        messages = []
        while (framed := self._next()) is not None:
            messages.append(finished(self._unpacking(*framed)))
        return messages

    def reading_only(self, body: bytes | bytearray) -> Steps[bytes]:
        """Return the message of a body that is complete and has exactly one. Raises as the class says."""
        self._buffer += body
        only = self._next()
        if only is not None and self._next() is not None:
            only = None
        self.end()
        if only is None:
            raise Unimplemented("mnemosyned: the method takes exactly one message")
        return (yield from self._unpacking(*only))

    def end(self) -> None:
        """Take note that no more bytes follow.

        Raises:
            MalformedMessage: the stream ends within a frame.
        """
        if self._buffer:
            raise MalformedMessage("mnemosyned: the request ends within a message")

    def _next(self) -> tuple[bool, bytes] | None:
        """Return the next payload, and whether it is compressed."""
        if len(self._buffer) < HEADER_BYTES:
            return None
        size_bytes = int.from_bytes(self._buffer[1:HEADER_BYTES], "big")
        if size_bytes > self._max_message_bytes:
            raise self._too_large()
        end = HEADER_BYTES + size_bytes
        if len(self._buffer) < end:
            return None
        flag, payload = self._buffer[0], bytes(self._buffer[HEADER_BYTES:end])
        del self._buffer[:end]
        if flag not in (0, _IS_COMPRESSED):
            raise MalformedMessage("mnemosyned: unknown flag in a message's prefix")
        return bool(flag), payload

    def _unpacking(self, is_compressed: bool, payload: bytes) -> Steps[bytes]:  # noqa: FBT001  # of the frame
        if not is_compressed:
            return payload
        wbits = _WBITS_BY_ENCODING.get(self._encoding)
        if wbits is None:
            if self._encoding in {b"", b"identity"}:
                raise MalformedMessage("mnemosyned: a compressed message without grpc-encoding")
            raise Unimplemented("mnemosyned: unknown grpc-encoding; use identity, deflate or gzip")
        try:
            return (yield from unpacking(payload, wbits, max_bytes=self._max_message_bytes))
        except OverLimit:
            raise self._too_large() from None

    def _too_large(self) -> MessageTooLarge:
        return too_large(self._max_message_bytes)
