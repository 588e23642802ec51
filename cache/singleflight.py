"""Callers that want the same thing at the same time share one piece of work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Flight(Generic[T]):
    task: asyncio.Task[T]
    passengers: int = 0


class SingleFlight(Generic[T]):
    """One flight per key at a time.

    A flight outlives a cancelled caller while another waits; when the last one leaves, it is
    cancelled, so that no work goes on which nobody wants.
    """

    def __init__(self) -> None:
        self._flights: dict[str, _Flight[T]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    async def run(self, key: str, fly: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return the result of the key's flight, begun with `fly` if there is none."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._take_off(key, fly)
        flight.passengers += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.passengers -= 1
            if not flight.passengers and not flight.task.done():
                self._land(key, flight)
                flight.task.cancel()

    def forget(self, key: str) -> None:
        """Let later callers begin anew; those already aboard get the old result."""
        self._flights.pop(key, None)

    def _take_off(self, key: str, fly: Callable[[], Coroutine[Any, Any, T]]) -> _Flight[T]:
        # The dictionary and then the passengers own the task.
        flight = _Flight(asyncio.create_task(fly()))
        self._flights[key] = flight
        flight.task.add_done_callback(lambda _: self._land(key, flight))
        # When every caller was cancelled nobody else reads a failure,
        # and asyncio would log "exception was never retrieved".
        flight.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return flight

    def _land(self, key: str, flight: _Flight[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
