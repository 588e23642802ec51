"""Callers that want the same thing at the same time share one piece of work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class _Flight(Generic[T]):
    """Work under way, and a future for each who waits for it.

    A seat is half of what `asyncio.shield` costs, and most flights have one passenger.
    """

    __slots__ = ("seats", "work")

    def __init__(self, work: asyncio.Future[T]) -> None:
        self.work = work
        self.seats: list[asyncio.Future[T]] = []

    def land(self, work: asyncio.Future[T]) -> None:
        """Give every passenger the outcome."""
        exc = None if work.cancelled() else work.exception()
        for seat in self.seats:
            if seat.done():
                continue
            if work.cancelled():
                seat.cancel()
            elif exc is not None:
                seat.set_exception(exc)
            else:
                seat.set_result(work.result())


class SingleFlight(Generic[T]):
    """One flight per key at a time.

    A flight outlives a cancelled caller while another waits; when the last one leaves, it is
    cancelled, so that no work goes on which nobody wants.
    """

    def __init__(self) -> None:
        self._flights: dict[str, _Flight[T]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    async def run(self, key: str, begin: Callable[[], asyncio.Future[T]]) -> T:
        """Return the result of the key's flight, begun by `begin` if there is none."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._take_off(key, begin())
        # Not the running loop's: before Python 3.12, asking for that is a system call.
        seat: asyncio.Future[T] = flight.work.get_loop().create_future()
        flight.seats.append(seat)
        try:
            return await seat
        except asyncio.CancelledError:
            flight.seats.remove(seat)
            if not flight.seats and not flight.work.done():
                self._end(key, flight)
                flight.work.cancel()
            raise

    def forget(self, key: str) -> None:
        """Let later callers begin anew; those already aboard get the old result."""
        self._flights.pop(key, None)

    def forget_all(self) -> None:
        """The same for every key."""
        self._flights.clear()

    def _take_off(self, key: str, work: asyncio.Future[T]) -> _Flight[T]:
        # The dictionary and then the passengers own the work.
        flight = _Flight(work)
        self._flights[key] = flight

        def land(work: asyncio.Future[T]) -> None:
            self._end(key, flight)
            flight.land(work)

        work.add_done_callback(land)
        return flight

    def _end(self, key: str, flight: _Flight[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
