"""Bodies that wait until the peer can take them. Pure.

A peer that reads slowly, or not at all, must not fill the memory. So nothing is framed before it can be sent:

    finish() ──> there is room ────────────────────> DATA, in the library's output
       └───────> there is none: held ── pump() ────> DATA, a slice of each held body in turn

There is room while three things are open: the peer's windows of the stream and of the connection (RFC 9113,
section 5.2), and this turn, which bounds what is framed before the transport is asked whether it wants more.

What is held are the pieces that the caller gave. No copy of them is made before they are framed, so that a
thousand answers from one cache entry hold its bytes once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from http2.core import Core, Sender

Headers = list[tuple[bytes, bytes]]

# What is framed before the transport is asked again, and how much of one body before the next has its turn.
_TURN_BYTES: Final = 256 * 1024
_SLICE_BYTES: Final = 64 * 1024


class Tally:
    """A number of bytes that many connections share."""

    __slots__ = ("size_bytes",)

    def __init__(self) -> None:
        self.size_bytes = 0


class _Held:
    """The rest of one body, and what comes after it."""

    __slots__ = ("ends", "moved_s", "pieces", "sender", "size_bytes", "trailers")

    def __init__(self, sender: Sender, now_s: float) -> None:
        self.sender = sender
        self.pieces: list[memoryview] = []
        self.size_bytes = 0
        self.ends = False
        self.trailers: Headers | None = None
        self.moved_s = now_s  # when the peer last took some of it


class Outbox:
    """What one connection is to send."""

    __slots__ = (
        "_core",
        "_held",
        "_is_paused",
        "_moved_s",
        "_room_bytes",
        "_total",
        "sent_bytes",
        "unsent_bytes",
    )

    def __init__(self, core: Core, total: Tally) -> None:
        """`total` counts the held bytes of all connections that share it."""
        self._core = core
        self._held: dict[int, _Held] = {}  # by stream; the first has the next turn
        self._is_paused = False
        self._room_bytes = _TURN_BYTES  # of this turn; none while the transport has asked for a pause
        self._moved_s = 0.0  # when the peer last took some of what is held, or nothing was held
        self._total = total
        self.unsent_bytes = 0
        self.sent_bytes = 0  # up to the last turn

    def __len__(self) -> int:
        """Return of how many streams something is held."""
        return len(self._held)

    def pause(self, is_paused: bool) -> None:  # noqa: FBT001  # the state itself
        """Hold everything from now on, or go on: as the transport wants."""
        self._is_paused = is_paused
        self.begin_turn()

    def begin_turn(self) -> None:
        """Take note that the transport has what was framed so far."""
        if not self._is_paused:
            self.sent_bytes += _TURN_BYTES - self._room_bytes
            self._room_bytes = _TURN_BYTES
        else:
            self._room_bytes = 0

    def fits(self, sender: Sender, stream_id: int, size_bytes: int) -> bool:
        """Tell whether a part of a body can be framed now; if so, the caller frames it at once."""
        if (
            size_bytes <= self._room_bytes
            and size_bytes <= (sender.send_window or 0)
            and size_bytes <= self._core.send_window
            and stream_id not in self._held
        ):
            self._room_bytes -= size_bytes
            return True
        return False

    def hold(self, sender: Sender, stream_id: int, pieces: Sequence[bytes], now_s: float) -> None:
        """Keep a part of a body until there is room."""
        held = self._held.get(stream_id)
        if held is None:
            if not self._held:
                self._moved_s = now_s
            held = self._held[stream_id] = _Held(sender, now_s)
        for piece in pieces:
            if piece:
                held.pieces.append(memoryview(piece))
                held.size_bytes += len(piece)
                self.unsent_bytes += len(piece)
                self._total.size_bytes += len(piece)

    def end(self, stream_id: int, trailers: Headers | None) -> bool:
        """End a stream after what is held of it, with trailers or without; False: nothing is held."""
        held = self._held.get(stream_id)
        if held is None:
            return False
        held.ends, held.trailers = True, trailers
        return True

    def unsent_of(self, stream_id: int) -> int:
        """Return how many bytes of a stream are held."""
        held = self._held.get(stream_id)
        return 0 if held is None else held.size_bytes

    def pump(self, now_s: float) -> list[int]:
        """Frame what there is room for; return the streams of which nothing is held any more.

        Call it at the beginning of each turn, and after a WINDOW_UPDATE or SETTINGS.
        """
        emptied: list[int] = []
        is_moving = True
        while is_moving and self._room_bytes > 0:
            is_moving = False
            for stream_id, held in list(self._held.items()):
                took_bytes = self._frame_slice(held)
                if took_bytes:
                    held.moved_s = self._moved_s = now_s
                    is_moving = True
                if not held.size_bytes:
                    if held.ends:
                        held.sender.end_message(held.trailers)
                    del self._held[stream_id]
                    emptied.append(stream_id)
                elif took_bytes:
                    # To the end of the line.
                    self._held[stream_id] = self._held.pop(stream_id)
        return emptied

    def drop(self, stream_id: int) -> None:
        """Forget what is held of a stream that was reset."""
        held = self._held.pop(stream_id, None)
        if held is not None:
            self.unsent_bytes -= held.size_bytes
            self._total.size_bytes -= held.size_bytes

    def clear(self) -> None:
        """Forget everything: the connection is closed."""
        for stream_id in list(self._held):
            self.drop(stream_id)

    def is_stuck_since(self, instant_s: float) -> bool:
        """Tell whether the peer has taken nothing at all since an instant, while something was held."""
        return bool(self._held) and self._moved_s <= instant_s

    def stuck_since(self, instant_s: float) -> list[int]:
        """Return the streams whose windows the peer keeps shut since an instant.

        A stream with an open window waits for its turn among others, or for the window of the connection.
        That is no fault of the stream.
        """
        return [
            stream_id
            for stream_id, held in self._held.items()
            if held.moved_s <= instant_s and (held.sender.send_window or 0) <= 0
        ]

    def still_since_s(self) -> float:
        """Return since when the peer has taken nothing of some stream; infinity if nothing is held."""
        return min((held.moved_s for held in self._held.values()), default=math.inf)

    def _frame_slice(self, held: _Held) -> int:
        """Frame what fits of a body, at most a slice; return its size."""
        window_bytes = min(held.sender.send_window or 0, self._core.send_window)
        room_bytes = min(window_bytes, _SLICE_BYTES, self._room_bytes)
        took_bytes = 0
        while held.pieces and took_bytes < room_bytes:
            piece = held.pieces[0]
            part = piece[: room_bytes - took_bytes]
            held.sender.send_data(part)
            took_bytes += len(part)
            if len(part) == len(piece):
                held.pieces.pop(0)
            else:
                held.pieces[0] = piece[len(part) :]
        held.size_bytes -= took_bytes
        self.unsent_bytes -= took_bytes
        self._total.size_bytes -= took_bytes
        self._room_bytes -= took_bytes
        return took_bytes
