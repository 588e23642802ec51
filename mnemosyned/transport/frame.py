"""gRPC over HTTP/2 without the HTTP/2: frames, time-outs, texts of statuses. Pure.

https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md

A message travels in a frame of gRPC's own (http2/messages.py). Responses are sent uncompressed: most are
below a kilobyte.

Most requests are one whole uncompressed frame in one piece. `only_message` takes that short way and says None
to everything else, which `FrameReader` then reads, and names the fault of.

Limits: a frame announces its length before its payload comes, so a message that is too large is refused when
five bytes of it are there. A compressed message is unpacked to at most one byte more than the limit: a few
kilobytes can unpack to gigabytes.
"""

from __future__ import annotations

import re
import zlib
from typing import Final

from http2.messages import HEADER_BYTES
from mnemosyned.errors import MalformedMessage, MessageTooLarge, Unimplemented

ACCEPTED_ENCODINGS: Final = b"identity,deflate,gzip"

_IS_COMPRESSED: Final = 1
_WBITS_BY_ENCODING: Final = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}
_TIMEOUT: Final = re.compile(rb"([0-9]{1,8})([HMSmun])")
_SECONDS_BY_UNIT: Final = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
# What `grpc-message` must percent-encode: all but printable ASCII, and the percent sign itself.
_UNSAFE: Final = re.compile(rb"[^ -$&-~]")


def timeout_s(value: bytes) -> float:
    """Read a `grpc-timeout` header, such as `250m` for 250 milliseconds; return seconds.

    Raises:
        MalformedMessage: it is not one to eight digits and a unit of gRPC's.
    """
    match = _TIMEOUT.fullmatch(value)
    if match is None:
        raise MalformedMessage("mnemosyned: malformed grpc-timeout")
    return int(match[1]) * _SECONDS_BY_UNIT[match[2]]


def status_message(text: str) -> bytes:
    """Percent-encode the text of a status for `grpc-message`."""
    return _UNSAFE.sub(lambda match: b"%%%02X" % match[0][0], text.encode())


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
        self._buffer += body
        messages = []
        while (message := self._next()) is not None:
            messages.append(message)
        return messages

    def end(self) -> None:
        """Take note that no more bytes follow.

        Raises:
            MalformedMessage: the stream ends within a frame.
        """
        if self._buffer:
            raise MalformedMessage("mnemosyned: the request ends within a message")

    def _next(self) -> bytes | None:
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
        if not flag:
            return payload
        if flag != _IS_COMPRESSED:
            raise MalformedMessage("mnemosyned: unknown flag in a message's prefix")
        return self._unpacked(payload)

    def _unpacked(self, payload: bytes) -> bytes:
        wbits = _WBITS_BY_ENCODING.get(self._encoding)
        if wbits is None:
            if self._encoding in {b"", b"identity"}:
                raise MalformedMessage("mnemosyned: a compressed message without grpc-encoding")
            raise Unimplemented("mnemosyned: unknown grpc-encoding; use identity, deflate or gzip")
        # Not `zlib.decompress`, which knows no limit. One byte over the limit shows that there is more.
        unpacker = zlib.decompressobj(wbits)
        try:
            message = unpacker.decompress(payload, self._max_message_bytes + 1)
        except zlib.error:
            raise MalformedMessage("mnemosyned: a compressed message is damaged") from None
        if len(message) > self._max_message_bytes:
            raise self._too_large()
        if not unpacker.eof:
            raise MalformedMessage("mnemosyned: a compressed message is cut short")
        return message

    def _too_large(self) -> MessageTooLarge:
        return MessageTooLarge(f"mnemosyned: message is larger than {self._max_message_bytes} bytes")
