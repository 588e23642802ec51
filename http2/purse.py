"""Tells a peer that works from one that floods. Pure.

A peer must send PING, WINDOW_UPDATE, SETTINGS and RST_STREAM, and each of them costs work and brings no
request. How many are too many depends on what the peer does: one that reads megabytes grants windows often,
and one whose deadlines pass resets streams. So such frames are paid from a purse:

- it is full at first: _FRAMES;
- it fills with time, and with what the peer was answered;
- when it is empty, the peer has sent thousands of frames for nothing.

Full, it pays for the deadlines that pass while this process is stalled: 128 streams each 20 ms, for a second
and a half.
"""

from __future__ import annotations

from typing import Final

_FRAMES: Final = 10_000.0
_FRAMES_PER_S: Final = 1000.0
_FRAMES_PER_ANSWER: Final = 2.0
# A peer may grant both windows, of the stream and of the connection, for each 4 KiB.
_FRAMES_PER_BYTE: Final = 1 / 2048


class Purse:
    """How many frames without use one peer may still send."""

    __slots__ = ("_frames", "_paid_s", "_sent_bytes", "answers")

    def __init__(self, now_s: float) -> None:
        self.answers = 0  # since the last payment; the connection counts them here
        self._frames = _FRAMES
        self._paid_s = now_s
        self._sent_bytes = 0

    def pay(self, frames: int, now_s: float, *, sent_bytes: int) -> bool:
        """Pay for frames; `sent_bytes` is what the peer was sent since the beginning. False: it is empty."""
        earned = (
            (now_s - self._paid_s) * _FRAMES_PER_S
            + self.answers * _FRAMES_PER_ANSWER
            + (sent_bytes - self._sent_bytes) * _FRAMES_PER_BYTE
        )
        self._frames = min(self._frames + earned, _FRAMES) - frames
        self._paid_s, self._sent_bytes, self.answers = now_s, sent_bytes, 0
        return self._frames >= 0
