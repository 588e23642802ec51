"""Least-recently-used mapping, bounded by entries and by bytes. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclass(slots=True, eq=False)
class Slot(Generic[Value]):
    """One entry: the value, its cost, and how long it may be served."""

    value: Value
    size_bytes: int
    fresh_until_us: int  # on the reader's clock
    generation: int = 0  # of the cache, when its fill began


class Lru(Generic[Value]):
    """The least recently read entries go first when a bound is passed.

    An entry over `max_bytes` by itself is not kept.
    """

    def __init__(self, *, max_entries: int, max_bytes: int) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        # Called with the key of each entry that goes, also of one that is replaced.
        self.on_removed: Callable[[str], None] | None = None
        # The least recently read entry first. Public for `ReadThrough.peek`, which only reads it.
        self.slots: OrderedDict[str, Slot[Value]] = OrderedDict()
        self._size_bytes = 0

    def __len__(self) -> int:
        return len(self.slots)

    def __contains__(self, key: str) -> bool:
        return key in self.slots

    @property
    def size_bytes(self) -> int:
        """The sum of the entries' own sizes."""
        return self._size_bytes

    def peek(self, key: str) -> Slot[Value] | None:
        """Return the slot and make it the most recently used."""
        slot = self.slots.get(key)
        if slot is not None:
            self.slots.move_to_end(key)
        return slot

    def put(self, key: str, slot: Slot[Value]) -> None:
        """Keep the slot, in place of an older one, and evict what passes the bounds."""
        self.pop(key)
        self.slots[key] = slot
        self._size_bytes += slot.size_bytes
        while len(self.slots) > self._max_entries or self._size_bytes > self._max_bytes:
            evicted_key, evicted = self.slots.popitem(last=False)
            self._size_bytes -= evicted.size_bytes
            if self.on_removed is not None:
                self.on_removed(evicted_key)

    def pop(self, key: str) -> Slot[Value] | None:
        """Remove and return the slot, if there is one."""
        slot = self.slots.pop(key, None)
        if slot is not None:
            self._size_bytes -= slot.size_bytes
            if self.on_removed is not None:
                self.on_removed(key)
        return slot

    def drop_all(self) -> None:
        """Remove every slot; `on_removed` is not called."""
        self.slots.clear()
        self._size_bytes = 0

    def keys_with_prefix(self, prefix: str) -> list[str]:
        """Return the keys that start so, least recently used first; O(n)."""
        return [key for key in self.slots if key.startswith(prefix)]
