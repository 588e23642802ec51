"""The cache's public face: an aiocache backend on the bounded LRU.

aiocache 0.12 has no bounded in-memory backend of its own. Code off the hot path, a plugin, or a
second level can use the whole aiocache interface; the hot path reads the LRU directly, which
costs 0.2 µs where `await get()` costs 2.7 µs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias

from aiocache.base import BaseCache
from aiocache.serializers import NullSerializer

from cache.lru import Lru, Slot

_NEVER_US: Final = sys.maxsize
_US_PER_S: Final = 1_000_000

Cached: TypeAlias = Any  # aiocache caches anything


class LruBackend(BaseCache):  # type: ignore[misc]  # aiocache is untyped
    """aiocache's operations over one Lru.

    A value set without `ttl` (seconds) stays until it is evicted; values are kept as they are,
    not copied. `now_us` is the clock that the slots' `fresh_until_us` refers to.
    """

    NAME = "lru"

    def __init__(self, lru: Lru[Cached], now_us: Callable[[], int], **options: Cached) -> None:
        options.setdefault("serializer", NullSerializer())
        # aiocache's default of 5 s arms a timer around each call of a cache that never waits.
        options.setdefault("timeout", None)
        super().__init__(**options)
        self._lru = lru
        self._now_us = now_us

    def _read(self, key: str) -> Cached:
        slot = self._lru.get(key)
        return None if slot is None or slot.fresh_until_us <= self._now_us() else slot.value

    def _write(self, key: str, value: Cached, ttl: float | None) -> bool:
        self._lru.put(key, Slot(value, sys.getsizeof(value), self._deadline_us(ttl)))
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
        slot = self._lru.get(key)
        if slot is None:
            return False
        slot.fresh_until_us = self._deadline_us(ttl)
        return True

    async def _delete(self, key: str, _conn: Cached = None) -> int:
        return int(self._lru.pop(key) is not None)

    async def _clear(self, namespace: str | None = None, _conn: Cached = None) -> bool:
        for key in self._lru.keys_with_prefix(namespace or ""):
            self._lru.pop(key)
        return True

    async def _raw(self, command: str, *args: Cached, **kwargs: Cached) -> Cached:
        kwargs.pop("encoding", None)
        kwargs.pop("_conn", None)
        return getattr(self._lru, command)(*args, **kwargs)

    async def _redlock_release(self, key: str, value: Cached) -> int:
        return await self._delete(key) if self._read(key) == value else 0
