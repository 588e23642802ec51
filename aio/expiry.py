"""Futures that end at an instant, with one timer for all of them.

`asyncio.timeout` makes a timer for each wait, and takes it back when the wait is over in time, as nearly all
are. Here an instant is only remembered. A timer runs for the earliest of them; when it fires, it passes over
the futures that are done. So a wait that ends in time costs one entry in a heap.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from itertools import count
from typing import Any, Final, Protocol

# Entries of which some may be of futures that are done: they are looked through when there are more.
_MANY: Final = 1024


class Waiting(Protocol):
    """A future, a Later (later.py), or what `expire` knows."""

    def done(self) -> bool:
        """Tell whether it is over."""
        ...


def _time_out(future: Any) -> None:  # noqa: ANN401  # a future or a Later
    future.set_exception(TimeoutError())


class Expiry:
    """The instants of the futures of one owner."""

    def __init__(self, expire: Callable[[Any], None] = _time_out) -> None:
        """`expire` gets a future that is not done at its instant; by default it has it fail: TimeoutError."""
        self._expire = expire
        self._many = _MANY
        self._loop: asyncio.AbstractEventLoop | None = None  # that of the first future
        # The number decides between equal instants: futures cannot be compared.
        self._heap: list[tuple[float, int, Waiting]] = []
        self._numbers = count()
        self._timer: asyncio.Handle | None = None
        # Of the timer. Not from the timer itself: if the instant is over, uvloop's has none.
        self._due_s = 0.0

    def add(self, future: Waiting, seconds: float) -> None:
        """Have a future expire in so many seconds, unless it is done by then."""
        loop = self._loop
        if loop is None:
            # Once: before Python 3.12 it is a system call.
            loop = self._loop = asyncio.get_running_loop()
        at_s = loop.time() + seconds
        heapq.heappush(self._heap, (at_s, next(self._numbers), future))
        if len(self._heap) > self._many:
            self._forget_done()
        if self._timer is None or at_s < self._due_s:
            self._set_timer(loop, at_s)

    def close(self) -> None:
        """Let no future fail any more."""
        self._heap.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _forget_done(self) -> None:
        """Take the futures out that are done; their instants may be hours away."""
        self._heap = [entry for entry in self._heap if not entry[2].done()]
        heapq.heapify(self._heap)
        self._many = max(_MANY, 2 * len(self._heap))

    def _set_timer(self, loop: asyncio.AbstractEventLoop, at_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._due_s = loop.call_at(at_s, self._fire, loop), at_s

    def _fire(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now_s = loop.time()
        while self._heap and (self._heap[0][0] <= now_s or self._heap[0][2].done()):
            _, _, future = heapq.heappop(self._heap)
            if not future.done():
                self._expire(future)
        if self._heap:
            self._set_timer(loop, self._heap[0][0])
