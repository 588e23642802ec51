"""Values loaded once and kept: an LRU in front of a loader, with a fence around every fill.

The fence. A load that began before a write may return what the write replaced:

    load of t:   begin_fill ───── the storage reads the old row ─────────────────── put: refused
    write to t:                        commit ── drop(t) closes the gate ── acknowledged

`drop` is called when a write has ended, successfully or not. It closes the gate of every fill under way for
that key. The old value then reaches the callers that asked before the write ended, but never the cache.

The fill of a writer. A write that learns the new value may put it. It opens a fill before it begins, and
spares that fill when it drops the key. Another write that has ended meanwhile has closed the fill:

    one write:       begin_fill ── commit ──────────────────────────── drop(t, but=fill) ── put: refused
    another one:                        commit ── drop(t) closes the gate ── acknowledged

Generations. The owner of the cache may lose the right to some keys, and get it back. It counts these changes
in `generation`, and `keeps` tells whether it has had the right to a key ever since a generation. A value from
before is then served on; any other is as good as not there. So a change costs no walk through all keys.

The negative cache remembers keys for which the loader has no value. It is an LRU of its own, so that
requests for keys that do not exist cannot evict values.

Rules for editing:
- Every value enters through a `Fill`.
- `drop` closes gates before anything else.
- A key is reported as added before it is known to any of the tables, and as removed after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeAlias, TypeVar, cast

from aio.later import Later, Outcome
from cache.lru import Lru, Slot
from cache.singleflight import SingleFlight

Value = TypeVar("Value")
# Begins to read a key's value; the slot's value is None where there is none.
Fetch: TypeAlias = Callable[[str], Later[Slot[Value] | Slot[None]]]


class KeyObserver(Protocol):
    """Is told which keys the cache has a value for, or a fill under way."""

    def added(self, key: str) -> None:
        """Take note of a key, possibly once more."""
        ...

    def removed(self, key: str) -> None:
        """Take note that a key has neither value nor fill any more."""
        ...

    def cleared(self) -> None:
        """Take note that no key has a value; fills under way can bring none."""
        ...


@dataclass(slots=True)
class CacheCounters:
    """Lookups by outcome: lookups = hits + misses."""

    hits: int = 0
    misses: int = 0
    refreshes: int = 0  # misses that found an entry too old to serve
    negative_hits: int = 0  # misses that the negative cache answered


class Fill(Generic[Value]):
    """The permission to put one value; it ends when a write to the key has ended."""

    __slots__ = ("_cache", "_generation", "_is_open", "_key", "is_making")

    def __init__(self, cache: ReadThrough[Value], key: str, generation: int, *, is_making: bool) -> None:
        self._cache = cache
        self._key = key
        self._generation = generation
        self._is_open = cache.may_fill()
        self.is_making = is_making

    def put(self, slot: Slot[Value]) -> None:
        """Keep the value, unless a write to its key has ended since the fill began."""
        if self._is_open:
            slot.generation = self._generation
            self._cache.lru.put(self._key, slot)

    def keep(self, slot: Slot[Value] | Slot[None]) -> None:
        """Keep what was found, a value or that there is none."""
        # mypy narrows what is in a slot, not the slot.
        if slot.value is None:
            self.put_negative(cast("Slot[None]", slot))
        else:
            self.put(cast("Slot[Value]", slot))

    def end_with(self, found: Outcome[Slot[Value] | Slot[None]]) -> Outcome[Slot[Value] | Slot[None]]:
        """Keep what was found, if anything was, before any caller has it; the last step of a fetch."""
        with self:
            if isinstance(found, Slot):
                self.keep(found)
        return found

    def put_negative(self, slot: Slot[None]) -> None:
        """Keep that there is no value, unless a write to the key has ended since the fill began."""
        if self._is_open:
            slot.generation = self._generation
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
        observer: KeyObserver | None = None,
    ) -> None:
        """Begin with what is in `lru`; without `negative`, keys without a value are not remembered."""
        self.lru = lru
        self.negative: Lru[None] = Lru(max_entries=0, max_bytes=0) if negative is None else negative
        self.counters = CacheCounters()
        self.generation = 0
        self.keeps: Callable[[str, int], bool] = _always_kept
        self.may_fill: Callable[[], bool] = _always  # whether what is loaded from now on may be kept
        self._flights: SingleFlight[Slot[Value] | Slot[None]] = SingleFlight()
        self._fills: dict[str, set[Fill[Value]]] = {}
        self._observer = observer
        if observer is not None:
            lru.on_removed = self._report_if_unused

    def peek(self, key: str, *, now_us: int) -> Value | None:
        """Return the value if it may be served now; counts one lookup."""
        # Lru.peek without its call: every Get comes by here.
        slots = self.lru.slots
        slot = slots.get(key)
        if slot is None:
            self.counters.misses += 1
            return None
        slots.move_to_end(key)
        if slot.generation != self.generation and not self._is_kept(key, slot):
            self.counters.misses += 1
            return None
        if slot.fresh_until_us <= now_us:
            self.counters.misses += 1
            self.counters.refreshes += 1
            return None
        self.counters.hits += 1
        return slot.value

    def is_negative(self, key: str, *, now_us: int) -> bool:
        """Tell whether the key is known to have no value; call it after `peek`, which counts the lookup."""
        slot = self.negative.peek(key)
        if slot is None or slot.fresh_until_us <= now_us:
            return False
        if slot.generation != self.generation and not self._is_kept(key, slot):
            return False
        self.counters.negative_hits += 1
        return True

    def load(self, key: str, fetch: Fetch[Value]) -> Later[Slot[Value] | Slot[None]]:
        """Return what `fetch` finds, kept if it has time left; concurrent callers share a fetch.

        Raises, at once or later, what `fetch` raises; a failure is not kept.
        """
        return self._flights.run(key, partial(self._fetched, key, fetch))

    def _fetched(self, key: str, fetch: Fetch[Value]) -> Later[Slot[Value] | Slot[None]]:
        # In this order: a fetch that raises must leave no fill behind. It has not begun to read yet.
        work = fetch(key)
        return work.through(self.begin_fill(key).end_with)

    def begin_fill(self, key: str, *, is_making: bool = False, generation: int | None = None) -> Fill[Value]:
        """Open a fill before the value is read or made; use it as a context manager.

        `generation` is that in which the cache's owner had the right to the key, if that was before.
        """
        since = self.generation if generation is None else generation
        fill = Fill(self, key, since, is_making=is_making)
        self._fills.setdefault(key, set()).add(fill)
        if self._observer is not None:
            self._observer.added(key)
        return fill

    def change_generation(self) -> None:
        """Begin another generation: from now on `keeps` decides on what was filled before."""
        self.generation += 1
        # A load under way may be older than a loss of the key.
        self._flights.forget_all()

    def end_fill(self, key: str, fill: Fill[Value]) -> None:
        """Forget a fill that is over."""
        fills = self._fills[key]
        fills.discard(fill)
        if not fills:
            del self._fills[key]
            self._report_if_unused(key)

    def drop(self, key: str, *, but: Fill[Value] | None = None) -> None:
        """Forget the key, and keep fills under way from bringing its value back, `but` the writer's own."""
        for fill in self._fills.get(key, ()):
            if fill is not but:
                fill.close()
        self._forget(key)

    def made(self, key: str) -> None:
        """Forget what was read before the key's value was made; its maker may still put the value."""
        for fill in self._fills.get(key, ()):
            if not fill.is_making:
                fill.close()
        self._forget(key)

    def drop_everything(self) -> None:
        """Drop every key."""
        for fills in self._fills.values():
            for fill in fills:
                fill.close()
        self._flights.forget_all()
        self.lru.drop_all()
        self.negative.drop_all()
        if self._observer is not None:
            self._observer.cleared()

    def _is_kept(self, key: str, slot: Slot[Value] | Slot[None]) -> bool:
        """Tell whether an entry of another generation may be served, and mark or forget it."""
        if self.keeps(key, slot.generation):
            slot.generation = self.generation
            return True
        self._forget(key)
        return False

    def _forget(self, key: str) -> None:
        self._flights.forget(key)
        self.lru.pop(key)
        self.negative.pop(key)

    def _report_if_unused(self, key: str) -> None:
        if self._observer is not None and key not in self.lru and key not in self._fills:
            self._observer.removed(key)


def _always_kept(_key: str, _generation: int) -> bool:
    return True


def _always() -> bool:
    return True
