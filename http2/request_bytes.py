"""What requests hold that are not complete, or wait: of one connection, and in a total over many. Pure.

Most requests come whole in one chunk, and their answer begins at once: they are never counted. A body is
counted from its second part on. What waits in admission.py is no request's yet, and is counted too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from http2.outbox import Tally
from http2.stream import STREAM_BYTES, Stream


class RequestBytes:
    """Keeps the bodies of requests, within a bound, and counts them."""

    __slots__ = (
        "_admission_bytes",
        "_body_bytes",
        "_max_body_bytes",
        "_requests_bytes",
        "_streams",
        "_total",
    )

    def __init__(self, streams: Mapping[int, Stream], total: Tally, *, max_body_bytes: int) -> None:
        """`streams` are those of the connection that are not forgotten."""
        self._streams = streams
        self._total = total
        self._max_body_bytes = max_body_bytes
        self._body_bytes = 0  # of bodies
        self._requests_bytes = 0  # the same, and what else requests cost
        self._admission_bytes = 0

    @property
    def size_bytes(self) -> int:
        """How many bytes are held."""
        return self._requests_bytes + self._admission_bytes

    def since_s(self, begun_s: float) -> float:
        """Return when the oldest of these requests arrived; infinity if there is none.

        What waits in admission.py may be as old as the connection, which has begun at `begun_s`.
        """
        since_s = min(
            (stream.arrived_s for stream in self._streams.values() if stream.counted_bytes), default=math.inf
        )
        return min(since_s, begun_s) if self._admission_bytes else since_s

    def append(self, stream: Stream, data: bytes) -> None:
        """Add to a body that comes in several parts, unless a bound is passed."""
        if stream.is_refused:
            return
        self._count_body(stream)
        if self._body_bytes + len(data) > self._max_body_bytes:
            self.take_body(stream)
            stream.is_refused = True
            return
        if isinstance(stream.body, bytes):
            stream.body = bytearray(stream.body)
        stream.body += data
        self._count_body(stream)

    def take_body(self, stream: Stream) -> bytes | bytearray:
        """Return what has arrived of a body since it was last taken."""
        body, stream.body = stream.body, b""
        if stream.counted_body_bytes:
            self._count_body(stream)
        return body

    def count_incomplete(self, stream: Stream) -> None:
        """Count a request that is not complete, or waits: itself, and the first part of its body."""
        if not stream.is_counted and stream.id in self._streams:
            stream.is_counted = True
            self.count(stream, STREAM_BYTES)
        self._count_body(stream)

    def count(self, stream: Stream, size_bytes: int) -> None:
        """Count more bytes of a request, or with a number below zero fewer."""
        if stream.id in self._streams:
            stream.counted_bytes += size_bytes
            self._requests_bytes += size_bytes
            self._total.size_bytes += size_bytes

    def count_admission(self, size_bytes: int) -> None:
        """Take note of how much waits in admission.py."""
        more_bytes = size_bytes - self._admission_bytes
        if more_bytes:
            self._admission_bytes += more_bytes
            self._total.size_bytes += more_bytes

    def release(self, stream: Stream) -> None:
        """Count out all that a request holds, before it is forgotten."""
        if stream.counted_bytes:
            self.take_body(stream)
            self.count(stream, -stream.counted_bytes)

    def _count_body(self, stream: Stream) -> None:
        more_bytes = len(stream.body) - stream.counted_body_bytes
        stream.counted_body_bytes += more_bytes
        self._body_bytes += more_bytes
        self.count(stream, more_bytes)
