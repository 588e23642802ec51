"""The cache of the daemon as an aiocache backend: one set of entries, two interfaces.

aiocache has no in-memory backend with a bound. `LruBackend` is one: it inherits the entries and their
bounds from `Lru`, and implements aiocache's operations on them. The daemon keeps its sessions in it.

- The hot path calls the synchronous methods of `Lru`: `peek` costs 0.2 us.
- Code off the hot path, an aiocache plugin or a second level uses `await get()`, `exists()`, `delete()`
  …, which cost about 3 us each. It sees the same entries at once.

Sessions enter through the fence of `read_through` only. `set` puts a value past the fence, so use it for
values that have no other writer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias

from aiocache.base import BaseCache
from aiocache.serializers import NullSerializer

from cache.lru import Lru, Slot, Value

_NEVER_US: Final = sys.maxsize
_US_PER_S: Final = 1_000_000

Cached: TypeAlias = Any  # aiocache caches anything


class LruBackend(Lru[Value], BaseCache):  # type: ignore[misc]  # aiocache is untyped
    """An Lru with aiocache's operations.

    A value set without `ttl` (seconds) stays until it is evicted. Values are kept as they are, not copied.
    `now_us` is the clock that the slots' `fresh_until_us` refers to.
    """

    NAME = "lru"

    def __init__(
        self, *, max_entries: int, max_bytes: int, now_us: Callable[[], int], **options: Cached
    ) -> None:
        Lru.__init__(self, max_entries=max_entries, max_bytes=max_bytes)
        options.setdefault("serializer", NullSerializer())
        # aiocache's default of 5 s arms a timer around each call of a cache that never waits.
        options.setdefault("timeout", None)
        BaseCache.__init__(self, **options)
        self._now_us = now_us

    def _read(self, key: str) -> Cached:
        slot = self.peek(key)
        return None if slot is None or slot.fresh_until_us <= self._now_us() else slot.value

    def _write(self, key: str, value: Cached, ttl: float | None) -> bool:
        self.put(key, Slot(value, sys.getsizeof(value), self._deadline_us(ttl)))
        return True

    def _deadline_us(self, ttl: float | None) -> int:
        return self._now_us() + int(ttl * _US_PER_S) if ttl else _NEVER_US

    async def _get(self, key: str, encoding: str = "utf-8", _conn: Cached = None) -> Cached:  # noqa: ARG002
        return self._read(key)

    async def _gets(self, key: str, encoding: str = "utf-8", _conn: Cached = None) -> Cached:  # noqa: ARG002
        return self._read(key)

    async def _multi_get(
        self,
        keys: Iterable[str],
        encoding: str = "utf-8",  # noqa: ARG002
        _conn: Cached = None,
    ) -> list[Cached]:
        return [self._read(key) for key in keys]

    async def _set(
        self,
        key: str,
        value: Cached,
        ttl: float | None = None,
        _cas_token: Cached = None,
        _conn: Cached = None,
    ) -> bool:
        if _cas_token is not None and _cas_token != self._read(key):
            return False
        return self._write(key, value, ttl)

    async def _multi_set(
        self, pairs: Iterable[tuple[str, Cached]], ttl: float | None = None, _conn: Cached = None
    ) -> bool:
        for key, value in pairs:
            self._write(key, value, ttl)
        return True

    async def _add(self, key: str, value: Cached, ttl: float | None = None, _conn: Cached = None) -> bool:
        if self._read(key) is not None:
            raise ValueError("the key exists already; use set to replace its value")
        return self._write(key, value, ttl)

    async def _exists(self, key: str, _conn: Cached = None) -> bool:
        return self._read(key) is not None

    async def _increment(self, key: str, delta: int, _conn: Cached = None) -> int:
        value: int = (self._read(key) or 0) + delta
        self._write(key, value, None)
        return value

    async def _expire(self, key: str, ttl: float, _conn: Cached = None) -> bool:
        slot = self.peek(key)
        if slot is None:
            return False
        slot.fresh_until_us = self._deadline_us(ttl)
        return True

    async def _delete(self, key: str, _conn: Cached = None) -> int:
        return int(self.pop(key) is not None)

    async def _clear(self, namespace: str | None = None, _conn: Cached = None) -> bool:
        for key in self.keys_with_prefix(namespace or ""):
            self.pop(key)
        return True

    async def _raw(self, command: str, *args: Cached, **kwargs: Cached) -> Cached:
        kwargs.pop("encoding", None)
        kwargs.pop("_conn", None)
        return getattr(self, command)(*args, **kwargs)

    async def _redlock_release(self, key: str, value: Cached) -> int:
        return await self._delete(key) if self._read(key) == value else 0
