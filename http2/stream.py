"""A request and its answer, as a server's connection keeps them; and the bounds of one connection. Pure.

server.py has the states of a stream, and what happens beyond each bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from http2.core import MAX_STREAMS, Request

# What a request costs besides its body, about, while it is not complete or waits: its headers, what works for
# it, and its state in the library.
STREAM_BYTES: Final = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Bounds of one connection; times in seconds."""

    max_streams: int = MAX_STREAMS  # at once; at most MAX_STREAMS
    max_header_bytes: int = 32 * 1024  # of one request; the library's own bound is twice that
    max_request_bytes: int = 64 * 1024**2  # of requests that are not complete
    max_unsent_bytes: int = 1024**2  # held bytes of answers, beyond which no further request is begun
    preface_s: float = 10.0
    frame_s: float = 30.0  # from the beginning of a frame, or of a block of headers, to its end
    body_s: float = 60.0  # between two parts of one request
    idle_s: float = 600.0  # without a stream
    send_s: float = 20.0  # in which the peer must take something of what waits for it
    max_age_s: float = float("inf")
    grace_s: float = 10.0  # from the second GOAWAY of a connection that is too old to its end


class Stream:
    """One request and its answer. The protocol class derives from it, to have one object for each call."""

    # What most requests never come to is a default of the class: that is half of the cost of making a Stream.
    body: bytes | bytearray = b""  # what has arrived of it, and was not taken
    is_refused = False  # its body passed a bound; what came of it is dropped
    is_answered = False  # its answer has begun
    is_ended = False  # its answer is complete, but may be held
    is_reset = False  # by the peer, or for a bound: work for it may stop
    work: Any = None  # the protocol class's own: what works for it
    # For RequestBytes: how much counts as incomplete, how much of that is `body`, and whether
    # STREAM_BYTES are in it.
    counted_bytes = 0
    counted_body_bytes = 0
    is_counted = False
    chunk = 0  # for ServerConnection: which chunk last brought news

    def __init__(self, request: Request, now_s: float) -> None:
        self.id = request.stream_id
        self.method = request.method
        self.target = request.target  # as it was sent: not decoded
        self.headers: list[tuple[bytes, bytes]] = request.headers  # type: ignore[assignment]  # not of HTTP/1
        self.is_complete = request.end_stream
        self.arrived_s = now_s
        self.moved_s = now_s  # when the last chunk with a part of it arrived
