"""Requests beyond the limit of streams wait here until others are answered. Pure.

A client learns the limit from our SETTINGS, and may have opened any number of streams before it does
(RFC 9113, section 6.5.3). To refuse them would fail calls of a client that did nothing wrong. The library
does refuse them, so their frames are kept from it:

    HEADERS of a stream beyond the limit ──> wait, and with them all later HEADERS and CONTINUATION
    DATA, WINDOW_UPDATE of such a stream ──> wait behind its HEADERS
    everything else ───────────────────────> the library, at once

Later HEADERS wait too, because the compression of headers depends on their sequence. Everything else must not
wait: the streams that are open need it to come to their end.

Most connections never need this. It works on whole frames; a chunk without such a stream is passed on uncut.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final

from http2.frames import CONTINUATION, DATA, HEADERS, WINDOW_UPDATE, Frame

# For some thousands of requests, all of them sent before the SETTINGS arrived.
_MAX_BYTES: Final = 1024 * 1024


class AdmissionFull(Exception):
    """More waits than a client can have sent before it knew the limit."""


class Admission:
    """The requests of one connection that wait, in their sequence."""

    __slots__ = ("_frames", "_highest_id", "_order", "reset_ids", "size_bytes")

    def __init__(self) -> None:
        self._frames: dict[int, list[bytes]] = {}  # by stream
        self._order: deque[int] = deque()
        self._highest_id = 0  # of any stream that has waited
        self.size_bytes = 0  # of all that waits
        # Streams that the client has reset. Their HEADERS must still be decoded, in their turn.
        self.reset_ids: set[int] = set()

    def __contains__(self, stream_id: int) -> bool:
        return stream_id in self._frames

    def __len__(self) -> int:
        return len(self._order)

    def pass_on(self, frames: Iterable[Frame], *, room: int, highest_id: int) -> bytes:
        """Return the frames that need not wait, where there is room for so many streams.

        A stream is new if its number is above those that wait, and above `highest_id`.

        Raises:
            AdmissionFull: too much waits.
        """
        highest_id = max(highest_id, self._highest_id)
        passed: list[bytes] = []
        for frame in frames:
            is_new = frame.kind == HEADERS and frame.stream_id > highest_id
            if is_new:
                highest_id = frame.stream_id
                if room > 0 and not self._order:
                    room -= 1
                else:
                    self._order.append(frame.stream_id)
                    self._highest_id = frame.stream_id
                    self._frames[frame.stream_id] = []
            if self._order and frame.kind in {HEADERS, CONTINUATION}:
                self._keep(self._order[-1], frame)
            elif frame.stream_id in self._frames and frame.kind in {DATA, WINDOW_UPDATE}:
                self._keep(frame.stream_id, frame)
            else:
                passed.append(frame.data)
        return b"".join(passed)

    def next(self, room: int) -> bytes:
        """Return the frames of the next streams, as many as there is room for."""
        admitted: list[bytes] = []
        while self._order and room > 0:
            room -= 1
            admitted += self._frames.pop(self._order.popleft())
        self.size_bytes -= sum(map(len, admitted))
        return b"".join(admitted)

    def _keep(self, stream_id: int, frame: Frame) -> None:
        self._frames[stream_id].append(frame.data)
        self.size_bytes += len(frame.data)
        if self.size_bytes > _MAX_BYTES:
            raise AdmissionFull
