from __future__ import annotations

import asyncio

import pytest

from cache.lru import Lru, Slot
from cache.readthrough import ReadThrough

SOON_US, LATER_US, NEVER_US = 100, 200, 10**18


class Storage:
    """Holds one value; a fetch waits at the gate after it has read."""

    def __init__(self) -> None:
        self.value = "old"
        self.fetches = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def fetch(self, _: str) -> Slot[str]:
        self.fetches += 1
        value = self.value
        await self.gate.wait()
        return Slot(value, 1, good_until_us=LATER_US)


def new_cache() -> ReadThrough[str]:
    return ReadThrough(Lru(max_entries=10, max_bytes=1000))


async def test_a_loaded_value_is_served_while_it_is_good() -> None:
    cache, storage = new_cache(), Storage()

    assert cache.peek("k", now_us=SOON_US) is None
    assert await cache.load("k", storage.fetch) == "old"
    assert cache.peek("k", now_us=SOON_US) == "old"
    assert cache.peek("k", now_us=LATER_US) is None


async def test_lookups_are_hits_and_misses_and_refreshes_are_misses() -> None:
    cache, storage = new_cache(), Storage()
    cache.peek("k", now_us=SOON_US)
    await cache.load("k", storage.fetch)
    cache.peek("k", now_us=SOON_US)
    cache.peek("k", now_us=SOON_US)
    cache.peek("k", now_us=LATER_US)

    assert (cache.counters.hits, cache.counters.misses, cache.counters.refreshes) == (2, 2, 1)


async def test_concurrent_loads_fetch_once() -> None:
    cache, storage = new_cache(), Storage()

    assert await asyncio.gather(*(cache.load("k", storage.fetch) for _ in range(50))) == ["old"] * 50
    assert storage.fetches == 1


async def test_a_load_that_raced_with_a_write_does_not_put_the_old_value_back() -> None:
    cache, storage = new_cache(), Storage()
    storage.gate.clear()
    load = asyncio.create_task(cache.load("k", storage.fetch))
    async with asyncio.timeout(5):
        while not storage.fetches:
            await asyncio.sleep(0)
    storage.value = "new"
    cache.drop("k")
    storage.gate.set()

    assert await load == "old"
    assert cache.peek("k", now_us=SOON_US) is None
    assert await cache.load("k", storage.fetch) == "new"
    assert cache.peek("k", now_us=SOON_US) == "new"


async def test_a_load_after_a_write_does_not_join_one_from_before() -> None:
    cache, storage = new_cache(), Storage()
    storage.gate.clear()
    early = asyncio.create_task(cache.load("k", storage.fetch))
    async with asyncio.timeout(5):
        while not storage.fetches:
            await asyncio.sleep(0)
    storage.value = "new"
    cache.drop("k")
    late = asyncio.create_task(cache.load("k", storage.fetch))
    await asyncio.sleep(0)
    storage.gate.set()

    assert await asyncio.gather(early, late) == ["old", "new"]
    assert cache.peek("k", now_us=SOON_US) == "new"


async def test_a_fill_of_ones_own_is_fenced_too() -> None:
    cache = new_cache()
    with cache.begin_fill("k") as fill:
        cache.drop("k")
        fill.put(Slot("old", 1, NEVER_US))
    with cache.begin_fill("j") as fill:
        fill.put(Slot("new", 1, NEVER_US))

    assert cache.peek("k", now_us=SOON_US) is None
    assert cache.peek("j", now_us=SOON_US) == "new"


async def test_a_failed_refresh_leaves_nothing_behind() -> None:
    cache, storage = new_cache(), Storage()
    await cache.load("k", storage.fetch)

    async def fail(_: str) -> Slot[str]:
        raise OSError("storage is away")

    with pytest.raises(OSError, match="away"):
        await cache.load("k", fail)

    assert cache.peek("k", now_us=LATER_US) is None
    assert cache.peek("k", now_us=SOON_US) == "old"
    assert await cache.load("k", storage.fetch) == "old"
    assert not cache._fills


async def test_what_one_of_two_caches_beside_each_other_drops_both_drop() -> None:
    kept = new_cache()
    beside: ReadThrough[str] = ReadThrough(Lru(max_entries=1, max_bytes=0), beside=kept)
    for dropping in (kept, beside):
        with kept.begin_fill("k") as late, beside.begin_fill("k"):
            kept.lru.put("k", Slot("old", 1, 10))
            dropping.drop("k")
            late.put(Slot("older", 1, 10))

        assert kept.peek("k", now_us=0) is None
