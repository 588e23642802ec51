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
from typing import Generic, TypeVar

T = TypeVar("T")


class _Flight(Generic[T]):
    """Work under way, and a future for each caller that waits for it.

    A future of its own costs a caller half of what `asyncio.shield` costs, and most flights have one
    caller.
    """

    __slots__ = ("waiting", "work")

    def __init__(self, work: asyncio.Future[T]) -> None:
        self.work = work
        self.waiting: list[asyncio.Future[T]] = []

    def land(self, work: asyncio.Future[T]) -> None:
        """Give every caller the outcome."""
        exc = None if work.cancelled() else work.exception()
        for answer in self.waiting:
            # A caller that was cancelled has taken its own future away, or its future is done.
            if answer.done():
                continue
            if work.cancelled():
                answer.cancel()
            elif exc is not None:
                answer.set_exception(exc)
            else:
                answer.set_result(work.result())


class SingleFlight(Generic[T]):
    """One flight per key at a time.

    A flight outlives a cancelled caller while another caller waits. When the last caller leaves, the
    flight's work is cancelled, so that no work goes on without a caller.
    """

    def __init__(self) -> None:
        self._flights: dict[str, _Flight[T]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    async def run(self, key: str, begin: Callable[[], asyncio.Future[T]]) -> T:
        """Return the result of the key's flight, begun by `begin` if there is none.

        Raises what the work raises.
        """
        flight = self._flights.get(key)
        if flight is None:
            flight = self._take_off(key, begin())
        # Not through `asyncio.get_running_loop`: before Python 3.12, that is a system call.
        answer: asyncio.Future[T] = flight.work.get_loop().create_future()
        flight.waiting.append(answer)
        try:
            return await answer
        except asyncio.CancelledError:
            flight.waiting.remove(answer)
            if not flight.waiting and not flight.work.done():
                self._end(key, flight)
                flight.work.cancel()
            raise

    def forget(self, key: str) -> None:
        """Let later callers begin new work; callers that have joined get the result of the old work."""
        self._flights.pop(key, None)

    def forget_all(self) -> None:
        """Do what `forget` does for every key."""
        self._flights.clear()

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
