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

from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar, cast

from aio.later import Later, Outcome

T = TypeVar("T")


class _Flight(Generic[T]):
    """Work under way, and the callers that wait for it."""

    __slots__ = ("waiting", "work")

    def __init__(self, work: Later[T]) -> None:
        self.work = work
        self.waiting: list[Later[T]] = []

    def land(self, outcome: Outcome[T]) -> None:
        """Give every caller the outcome."""
        waiting, self.waiting = self.waiting, []
        for answer in waiting:
            answer.set_result(cast("T", outcome))


class SingleFlight(Generic[T]):
    """One flight per key at a time.

    A flight outlives a caller that gives up while another caller waits. When the last caller leaves, the
    flight's work is cancelled, so that no work goes on without a caller.
    """

    def __init__(self) -> None:
        self._flights: dict[str, _Flight[T]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def run(self, key: str, begin: Callable[[], Later[T]]) -> Later[T]:
        """Return the outcome of the key's flight; `begin` begins one if there is none, and may raise."""
        flight = self._flights.get(key)
        is_first = flight is None
        if flight is None:
            flight = self._flights[key] = _Flight(begin())
        answer: Later[T] = Later()
        answer.on_cancel = partial(self._leave, key, flight, answer)
        flight.waiting.append(answer)
        if is_first:
            flight.work.then(partial(self._land, key, flight))
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

    def _land(self, key: str, flight: _Flight[T], outcome: Outcome[T]) -> None:
        self._end(key, flight)
        flight.land(outcome)

    def _end(self, key: str, flight: _Flight[T]) -> None:
        # The key may have another flight already, begun after `forget`.
        if self._flights.get(key) is flight:
            del self._flights[key]
