"""Sessions near, loaded once: an LRU in front of a loader, with a fence around every fill.

The fence. A load that began before a write may return what the write replaced. `drop` is called
when a write is over, in whichever way; it closes the gate of every fill under way for that key, so
that the old value reaches the callers who asked before the write ended, but never the cache.

Rules for editing: every value enters through a Fill; `drop` closes gates before anything else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from cache.lru import Lru, Slot
from cache.singleflight import SingleFlight

Value = TypeVar("Value")


@dataclass(slots=True)
class CacheCounters:
    """Lookups by outcome: lookups = hits + misses."""

    hits: int = 0
    misses: int = 0
    refreshes: int = 0  # the misses that found an entry too old to serve


class Fill(Generic[Value]):
    """Leave to put one value, until a write to its key is over."""

    __slots__ = ("_cache", "_is_open", "_key")

    def __init__(self, cache: ReadThrough[Value], key: str) -> None:
        self._cache = cache
        self._key = key
        self._is_open = True

    def put(self, slot: Slot[Value]) -> None:
        """Keep the value, unless a write to its key was over since the fill began."""
        if self._is_open:
            self._cache.lru.put(self._key, slot)

    def close(self) -> None:
        """Let nothing more through."""
        self._is_open = False

    def __enter__(self) -> Fill[Value]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._cache.end_fill(self._key, self)


class ReadThrough(Generic[Value]):
    """A cache that loads what it lacks, each key once at a time."""

    def __init__(self, lru: Lru[Value], *, beside: ReadThrough[Value] | None = None) -> None:
        """Begin with what is in `lru`; of two caches beside each other, what one drops both drop."""
        self.lru = lru
        self.counters = CacheCounters()
        self._flights: SingleFlight[Value] = SingleFlight()
        self._fills: dict[str, set[Fill[Value]]] = {}
        self._beside = beside
        if beside is not None:
            beside._beside = self  # noqa: SLF001  # of this very class

    def peek(self, key: str, *, now_us: int) -> Value | None:
        """Return the value if it may be served now; counts one lookup."""
        slot = self.lru.get(key)
        if slot is None:
            self.counters.misses += 1
            return None
        if slot.good_until_us <= now_us:
            self.counters.misses += 1
            self.counters.refreshes += 1
            return None
        self.counters.hits += 1
        return slot.value

    async def load(self, key: str, fetch: Callable[[str], Awaitable[Slot[Value]]]) -> Value:
        """Return what `fetch` returns, kept if it has time left; concurrent callers share a fetch.

        Raises what `fetch` raises; a failure, like an absence, is not kept.
        """

        async def fly() -> Value:
            with self.begin_fill(key) as fill:
                slot = await fetch(key)
                fill.put(slot)
                return slot.value

        return await self._flights.run(key, fly)

    def begin_fill(self, key: str) -> Fill[Value]:
        """Open a fill before the value is read or made; use it as a context manager."""
        fill = Fill(self, key)
        self._fills.setdefault(key, set()).add(fill)
        return fill

    def keys(self) -> list[str]:
        """Return every key that has a value or is about to."""
        return [*self.lru.keys_with_prefix(""), *self._fills]

    def end_fill(self, key: str, fill: Fill[Value]) -> None:
        """Forget a fill that is over."""
        fills = self._fills[key]
        fills.discard(fill)
        if not fills:
            del self._fills[key]

    def drop(self, key: str) -> None:
        """Forget the key's value and keep fills under way from bringing it back; beside as well."""
        self.forget(key)
        if self._beside is not None:
            self._beside.forget(key)

    def forget(self, key: str) -> None:
        """Drop here alone."""
        for fill in self._fills.get(key, ()):
            fill.close()
        self._flights.forget(key)
        self.lru.pop(key)
