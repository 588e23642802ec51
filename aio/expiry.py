"""Futures that fail at an instant, with one timer for all of them.

`asyncio.timeout` makes a timer for each wait, and takes it back when the wait is over in time, as nearly all
are. Here an instant is only remembered. A timer runs for the earliest of them; when it fires, it passes over
the futures that are done. So a wait that ends in time costs one entry in a heap.
"""

from __future__ import annotations

import asyncio
import heapq
from itertools import count
from typing import Protocol


class Waiting(Protocol):
    """A future, or a Later (later.py)."""

    def done(self) -> bool:
        """Tell whether it is over."""
        ...

    def set_exception(self, exception: BaseException, /) -> None:
        """Take note that there is no result."""
        ...


class Expiry:
    """The instants of the futures of one owner."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        # The number decides between equal instants: futures cannot be compared.
        self._heap: list[tuple[float, int, Waiting]] = []
        self._numbers = count()
        self._timer: asyncio.Handle | None = None
        # Of the timer. Not from the timer itself: if the instant is over, uvloop's has none.
        self._due_s = 0.0

    def add(self, future: Waiting, seconds: float) -> None:
        """Have a future fail with TimeoutError in so many seconds, unless it is done by then."""
        at_s = self._loop.time() + seconds
        heapq.heappush(self._heap, (at_s, next(self._numbers), future))
        if self._timer is None or at_s < self._due_s:
            self._set_timer(at_s)

    def close(self) -> None:
        """Let no future fail any more."""
        self._heap.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _set_timer(self, at_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._due_s = self._loop.call_at(at_s, self._fire), at_s

    def _fire(self) -> None:
        self._timer = None
        now_s = self._loop.time()
        while self._heap and (self._heap[0][0] <= now_s or self._heap[0][2].done()):
            _, _, future = heapq.heappop(self._heap)
            if not future.done():
                future.set_exception(TimeoutError())
        if self._heap:
            self._set_timer(self._heap[0][0])
