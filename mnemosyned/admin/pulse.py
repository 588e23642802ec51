"""How long the event loop has been silent, as other threads see it, and where it is stuck.

event loop ── beat() ──every 0.5 s──> Pulse <── silence_s(), stack() ── admin thread
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from typing import Final

PERIOD_S: Final = 0.5
_MAX_FRAMES: Final = 12


class Pulse:
    """The beats of one event loop; made and started on its thread."""

    def __init__(self) -> None:
        self._beaten_s = time.monotonic()
        self._thread_id = threading.get_ident()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Beat until `stop`, on the running loop."""
        self._beaten_s = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(PERIOD_S, self.start)

    def stop(self) -> None:
        """Beat no more."""
        if self._timer is not None:
            self._timer.cancel()

    def forgive(self, seconds: float) -> None:
        """Leave so many seconds out of the silence that there is now, if any. From one other thread."""
        beaten_s = self._beaten_s
        if time.monotonic() - beaten_s > PERIOD_S and self._beaten_s == beaten_s:
            self._beaten_s = beaten_s + seconds

    def silence_s(self) -> float:
        """Return for how many seconds a beat is overdue; 0 while the loop keeps time. From any thread."""
        return max(0.0, time.monotonic() - self._beaten_s - PERIOD_S)

    def stack(self) -> list[str]:
        """Return where the loop's thread is, innermost last: files and functions, and no values."""
        frame = sys._current_frames().get(self._thread_id)  # noqa: SLF001  # the documented way
        if frame is None:
            return []
        frames = traceback.extract_stack(frame)[-_MAX_FRAMES:]
        return [f"{one.filename}:{one.lineno} {one.name}" for one in frames]
