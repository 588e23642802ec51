"""Callers that want the same key at the same time share one piece of work, called a flight.

Without it, the end of a popular session's cache entry would send one load for each waiting caller to the
storage. The idea and the name are those of groupcache's `singleflight`.

    caller 1:  run(k) ── begins the work ─────────────────┬── result
    caller 2:         run(k) ── joins the flight ─────────┤── result
    write:                          forget(k)             |
    caller 3:                            run(k) ── begins new work, since the first may have read before the
    write
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

from aio.later import Later

T = TypeVar("T")


class _Flight(Generic[T]):
    """Work under way, and the callers that wait for it."""

    __slots__ = ("waiting", "work")

    def __init__(self, work: asyncio.Future[T]) -> None:
        self.work = work
        self.waiting: list[Later[T]] = []

    def land(self, work: asyncio.Future[T]) -> None:
        """Give every caller the outcome."""
        waiting, self.waiting = self.waiting, []
        exc = asyncio.CancelledError() if work.cancelled() else work.exception()
        for answer in waiting:
            if exc is not None:
                answer.set_exception(exc)
            else:
                answer.set_result(work.result())


class SingleFlight(Generic[T]):
    """One flight per key at a time.

    A flight outlives a caller that gives up while another caller waits. When the last caller leaves, the
    flight's work is cancelled, so that no work goes on without a caller.
    """

    def __init__(self) -> None:
        self._flights: dict[str, _Flight[T]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def run(self, key: str, begin: Callable[[], asyncio.Future[T]]) -> Later[T]:
        """Return the outcome of the key's flight; `begin` begins one if there is none, and may raise."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._take_off(key, begin())
        answer: Later[T] = Later()
        answer.on_cancel = partial(self._leave, key, flight, answer)
        flight.waiting.append(answer)
        return answer

    def forget(self, key: str) -> None:
        """Let later callers begin new work; callers that have joined get the result of the old work."""
        self._flights.pop(key, None)

    def forget_all(self) -> None:
        """Do what `forget` does for every key."""
        self._flights.clear()

    def _leave(self, key: str, flight: _Flight[T], answer: Later[T]) -> None:
        if answer in flight.waiting:
            flight.waiting.remove(answer)
            if not flight.waiting and not flight.work.done():
                self._end(key, flight)
                flight.work.cancel()

    def _take_off(self, key: str, work: asyncio.Future[T]) -> _Flight[T]:
        # The dictionary owns the work, and after `forget` its callers do.
        flight = _Flight(work)
        self._flights[key] = flight

        def land(work: asyncio.Future[T]) -> None:
            self._end(key, flight)
            flight.land(work)

        work.add_done_callback(land)
        return flight

    def _end(self, key: str, flight: _Flight[T]) -> None:
        # The key may have another flight already, begun after `forget`.
        if self._flights.get(key) is flight:
            del self._flights[key]
