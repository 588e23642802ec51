from __future__ import annotations

import pytest
from aiocache.base import BaseCache

from cache.backend import LruBackend
from cache.lru import Lru, Slot


class Clock:
    def __init__(self) -> None:
        self.us = 0

    def now_us(self) -> int:
        return self.us


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def backend(clock: Clock) -> LruBackend:
    return LruBackend(max_entries=3, max_bytes=10_000, now_us=clock.now_us)


def test_it_is_an_aiocache_cache(backend: LruBackend) -> None:
    assert isinstance(backend, BaseCache)


async def test_both_interfaces_see_the_same_entries(backend: LruBackend) -> None:
    backend.put("k", Slot("v", 1, 1))
    assert await backend.get("k") == "v"
    await backend.set("l", "w")
    await backend.delete("k")

    assert backend.peek("k") is None
    assert backend.peek("l").value == "w"
    assert isinstance(backend, Lru)


async def test_values_are_set_and_got_and_deleted(backend: LruBackend) -> None:
    assert await backend.set("k", "v")
    assert await backend.get("k") == "v"
    assert await backend.exists("k")
    assert await backend.delete("k") == 1
    assert await backend.delete("k") == 0
    assert await backend.get("k", default="none") == "none"


async def test_a_value_with_a_ttl_ends(backend: LruBackend, clock: Clock) -> None:
    await backend.set("k", "v", ttl=2)
    clock.us = 1_999_999
    assert await backend.get("k") == "v"
    clock.us = 2_000_000
    assert await backend.get("k") is None


async def test_a_newer_value_outlives_an_older_ones_ttl(backend: LruBackend, clock: Clock) -> None:
    await backend.set("k", "v", ttl=1)
    await backend.clear()
    await backend.set("k", "w")
    clock.us = 5_000_000

    assert await backend.get("k") == "w"


async def test_the_bound_holds(backend: LruBackend) -> None:
    await backend.multi_set([(key, key) for key in "abcd"])

    assert await backend.multi_get(list("abcd")) == [None, "b", "c", "d"]


async def test_the_other_operations_do_what_aiocache_says(backend: LruBackend, clock: Clock) -> None:
    await backend.add("k", 1)
    with pytest.raises(ValueError, match="exists already"):
        await backend.add("k", 2)
    assert await backend.increment("k", 2) == 3
    assert await backend.increment("new") == 1
    assert await backend.expire("k", 1)
    assert not await backend.expire("absent", 1)
    clock.us = 1_000_000
    assert await backend.get("k") is None
    assert await backend.raw("keys_with_prefix", "n") == ["new"]
    assert not await backend._set("new", 5, _cas_token=7)
    assert await backend._set("new", 5, _cas_token=1)
    assert await backend._gets("new") == 5
    assert await backend._redlock_release("new", 6) == 0
    assert await backend._redlock_release("new", 5) == 1
