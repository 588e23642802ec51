"""Sessions near, loaded once: an LRU in front of a loader, with a fence around every fill.

The fence. A load that began before a write may return what the write replaced. `drop` is called
when a write is over, in whichever way; it closes the gate of every fill under way for that key, so
that the old value reaches the callers who asked before the write ended, but never the cache.

That the loader has no value for a key is kept too, in an LRU of its own, so that asking for what does
not exist can push out nothing that does.

Rules for editing: every value enters through a Fill; `drop` closes gates before anything else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeAlias, TypeVar, cast

from cache.lru import Lru, Slot
from cache.singleflight import SingleFlight

Value = TypeVar("Value")
# Begins to read a key's value; the slot's value is None where there is none.
Fetch: TypeAlias = Callable[[str], asyncio.Future[Slot[Value] | Slot[None]]]


class Aliases(Protocol):
    """Other names of keys, for whoever must have a value dropped and does not know its key."""

    def alias(self, key: str) -> str:
        """Return a key's other name, or the key if it has none."""
        ...

    def is_stored_key(self, text: str) -> bool:
        """Tell an alias from a key."""
        ...

    def knows(self, alias: str) -> bool:
        """Tell whether `alias` would make this one of its key; otherwise it may stand for any key."""
        ...


@dataclass(slots=True)
class CacheCounters:
    """Lookups by outcome: lookups = hits + misses."""

    hits: int = 0
    misses: int = 0
    refreshes: int = 0  # the misses that found an entry too old to serve
    negative_hits: int = 0  # the misses of which it was known that there is no value


class Fill(Generic[Value]):
    """Leave to put one value, until a write to its key is over."""

    __slots__ = ("_cache", "_is_open", "_key", "is_making")

    def __init__(self, cache: ReadThrough[Value], key: str, *, is_making: bool) -> None:
        self._cache = cache
        self._key = key
        self._is_open = True
        self.is_making = is_making

    def put(self, slot: Slot[Value]) -> None:
        """Keep the value, unless a write to its key was over since the fill began."""
        if self._is_open:
            self._cache.lru.put(self._key, slot)

    def keep(self, slot: Slot[Value] | Slot[None]) -> None:
        """Keep what was found, a value or that there is none."""
        # mypy narrows what is in a slot, not the slot.
        if slot.value is None:
            self.put_negative(cast("Slot[None]", slot))
        else:
            self.put(cast("Slot[Value]", slot))

    def put_negative(self, slot: Slot[None]) -> None:
        """Keep that there is no value, likewise."""
        if self._is_open:
            self._cache.negative.put(self._key, slot)

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

    def __init__(
        self,
        lru: Lru[Value],
        negative: Lru[None] | None = None,
        *,
        beside: ReadThrough[Value] | None = None,
        aliases: Aliases | None = None,
    ) -> None:
        """Begin with what is in `lru`; of two caches beside each other, what one drops both drop.

        Without `negative` it is not kept which keys have no value.
        """
        self.lru = lru
        self.negative: Lru[None] = Lru(max_entries=0, max_bytes=0) if negative is None else negative
        self.counters = CacheCounters()
        self._flights: SingleFlight[Slot[Value] | Slot[None]] = SingleFlight()
        self._fills: dict[str, set[Fill[Value]]] = {}
        self._aliases = aliases
        # Of each key that has a value or a fill under way, and of no other.
        self._key_by_alias: dict[str, str] = {}
        lru.on_removed = self._unlist
        self._beside = beside
        if beside is not None:
            beside._beside = self  # noqa: SLF001  # of this very class

    def peek(self, key: str, *, now_us: int) -> Value | None:
        """Return the value if it may be served now; counts one lookup."""
        slot = self.lru.get(key)
        if slot is None:
            self.counters.misses += 1
            return None
        if slot.fresh_until_us <= now_us:
            self.counters.misses += 1
            self.counters.refreshes += 1
            return None
        self.counters.hits += 1
        return slot.value

    def is_negative(self, key: str, *, now_us: int) -> bool:
        """Tell whether it is known that the key has no value; for after `peek`, which counts the lookup."""
        slot = self.negative.get(key)
        if slot is None or slot.fresh_until_us <= now_us:
            return False
        self.counters.negative_hits += 1
        return True

    async def load(self, key: str, fetch: Fetch[Value]) -> Value | None:
        """Return what `fetch` finds, kept if it has time left; concurrent callers share a fetch.

        Raises what `fetch` raises; a failure is not kept.
        """
        return (await self._flights.run(key, lambda: self._fetched(key, fetch))).value

    def _fetched(self, key: str, fetch: Fetch[Value]) -> asyncio.Future[Slot[Value] | Slot[None]]:
        # In this order: a fetch that raises must leave no fill behind. It has not begun to read yet.
        work = fetch(key)
        fill = self.begin_fill(key)

        def keep(work: asyncio.Future[Slot[Value] | Slot[None]]) -> None:
            with fill:
                if not work.cancelled() and work.exception() is None:
                    fill.keep(work.result())

        # Callbacks come in their order: the value is kept before any caller has it.
        work.add_done_callback(keep)
        return work

    def begin_fill(self, key: str, *, is_making: bool = False) -> Fill[Value]:
        """Open a fill before the value is read or made; use it as a context manager."""
        fill = Fill(self, key, is_making=is_making)
        self._fills.setdefault(key, set()).add(fill)
        if self._aliases is not None:
            self._key_by_alias[self._aliases.alias(key)] = key
        return fill

    def keys(self) -> list[str]:
        """Return every key of which something is known or about to be."""
        return [*self.lru.keys_with_prefix(""), *self.negative.keys_with_prefix(""), *self._fills]

    def end_fill(self, key: str, fill: Fill[Value]) -> None:
        """Forget a fill that is over."""
        fills = self._fills[key]
        fills.discard(fill)
        if not fills:
            del self._fills[key]
            self._unlist(key)

    def drop(self, key: str) -> None:
        """Forget the key's value and keep fills under way from bringing it back; beside as well.

        An alias will do for the key; for one that is not known everything is forgotten.
        """
        if self._aliases is not None and self._aliases.is_stored_key(key):
            self._drop_alias(key)
            return
        for one in self._both():
            one.forget(key)

    def made(self, key: str) -> None:
        """Drop what was read before the key's value was made; who has made it may still put it."""
        for one in self._both():
            one.forget(key, is_made=True)

    def drop_everything(self) -> None:
        """Drop every key."""
        for one in self._both():
            one.forget_everything()

    def forget(self, key: str, *, is_made: bool = False) -> None:
        """Drop here alone; if the value was just made, without closing the fills of those who make it."""
        for fill in self._fills.get(key, ()):
            if not (is_made and fill.is_making):
                fill.close()
        self._flights.forget(key)
        self.lru.pop(key)
        self.negative.pop(key)

    def forget_everything(self) -> None:
        """Drop every key here alone."""
        for fills in self._fills.values():
            for fill in fills:
                fill.close()
        self._flights.forget_all()
        self.lru.clear()
        self.negative.clear()
        # Fills under way may be among them, but bring nothing any more.
        self._key_by_alias.clear()

    def key_of(self, alias: str) -> str | None:
        """Return the key with this alias, if it has a value here or a fill under way."""
        return self._key_by_alias.get(alias)

    def _drop_alias(self, alias: str) -> None:
        assert self._aliases is not None
        if not self._aliases.knows(alias):
            self.drop_everything()
            return
        for one in self._both():
            key = one.key_of(alias)
            if key is not None:
                self.drop(key)

    def _both(self) -> list[ReadThrough[Value]]:
        return [self] if self._beside is None else [self, self._beside]

    def _unlist(self, key: str) -> None:
        if self._aliases is not None and key not in self.lru and key not in self._fills:
            self._key_by_alias.pop(self._aliases.alias(key), None)
