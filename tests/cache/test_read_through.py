from __future__ import annotations

import asyncio

import pytest

from aio.later import Later, begun
from aio.tasks import Tasks
from cache.lru import Lru, Slot
from cache.read_through import Fetch, ReadThrough

TASKS = Tasks("fetches")
SOON_US, LATER_US, NEVER_US = 100, 200, 10**18


class Storage:
    """Holds one value; a fetch waits at the gate after it has read."""

    def __init__(self) -> None:
        self.value: str | None = "old"
        self.fetches = 0
        self.gate = asyncio.Event()
        self.gate.set()

    def fetch(self, _: str) -> Later[Slot[str] | Slot[None]]:
        return begun(self._fetch(), TASKS)

    async def _fetch(self) -> Slot[str] | Slot[None]:
        self.fetches += 1
        value = self.value
        await self.gate.wait()
        return Slot(value, 1, fresh_until_us=LATER_US)


async def loaded(cache: ReadThrough[str], key: str, fetch: Fetch[str]) -> str | None:
    return (await cache.load(key, fetch)).value


def new_cache() -> ReadThrough[str]:
    return ReadThrough(Lru(max_entries=10, max_bytes=1000), Lru(max_entries=10, max_bytes=10))


async def test_a_loaded_value_is_served_while_it_is_fresh() -> None:
    cache, storage = new_cache(), Storage()

    assert cache.peek("k", now_us=SOON_US) is None
    assert await loaded(cache, "k", storage.fetch) == "old"
    assert cache.peek("k", now_us=SOON_US) == "old"
    assert cache.peek("k", now_us=LATER_US) is None


async def test_lookups_are_hits_and_misses_and_refreshes_are_misses() -> None:
    cache, storage = new_cache(), Storage()
    cache.peek("k", now_us=SOON_US)
    await loaded(cache, "k", storage.fetch)
    cache.peek("k", now_us=SOON_US)
    cache.peek("k", now_us=SOON_US)
    cache.peek("k", now_us=LATER_US)

    assert (cache.counters.hits, cache.counters.misses, cache.counters.refreshes) == (2, 2, 1)


async def test_concurrent_loads_fetch_once() -> None:
    cache, storage = new_cache(), Storage()

    assert await asyncio.gather(*(loaded(cache, "k", storage.fetch) for _ in range(50))) == ["old"] * 50
    assert storage.fetches == 1


async def test_a_load_that_raced_with_a_write_does_not_put_the_old_value_back() -> None:
    cache, storage = new_cache(), Storage()
    storage.gate.clear()
    load = asyncio.create_task(loaded(cache, "k", storage.fetch))
    async with asyncio.timeout(5):
        while not storage.fetches:
            await asyncio.sleep(0)
    storage.value = "new"
    cache.drop("k")
    storage.gate.set()

    assert await load == "old"
    assert cache.peek("k", now_us=SOON_US) is None
    assert await loaded(cache, "k", storage.fetch) == "new"
    assert cache.peek("k", now_us=SOON_US) == "new"


async def test_a_load_after_a_write_does_not_join_one_from_before() -> None:
    cache, storage = new_cache(), Storage()
    storage.gate.clear()
    early = asyncio.create_task(loaded(cache, "k", storage.fetch))
    async with asyncio.timeout(5):
        while not storage.fetches:
            await asyncio.sleep(0)
    storage.value = "new"
    cache.drop("k")
    late = asyncio.create_task(loaded(cache, "k", storage.fetch))
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
    await loaded(cache, "k", storage.fetch)

    async def fail(_: str) -> Slot[str]:
        raise OSError("storage is away")

    with pytest.raises(OSError, match="away"):
        await loaded(cache, "k", lambda key: begun(fail(key), TASKS))

    assert cache.peek("k", now_us=LATER_US) is None
    assert cache.peek("k", now_us=SOON_US) == "old"
    assert await loaded(cache, "k", storage.fetch) == "old"
    assert not cache._fills


async def test_that_there_is_no_value_is_kept_until_one_is_made() -> None:
    cache, storage = new_cache(), Storage()
    storage.value = None

    assert not cache.is_negative("k", now_us=SOON_US)
    assert await loaded(cache, "k", storage.fetch) is None
    assert cache.is_negative("k", now_us=SOON_US)
    assert not cache.is_negative("k", now_us=LATER_US)
    assert cache.counters.negative_hits == 1
    assert "k" in cache.negative
    cache.made("k")
    assert not cache.is_negative("k", now_us=SOON_US)


async def test_a_load_that_raced_with_a_making_leaves_what_was_made() -> None:
    cache, storage = new_cache(), Storage()
    storage.value = None
    storage.gate.clear()
    load = asyncio.create_task(loaded(cache, "k", storage.fetch))
    async with asyncio.timeout(5):
        while not storage.fetches:
            await asyncio.sleep(0)
    with cache.begin_fill("k", is_making=True) as fill:
        cache.made("k")
        fill.put(Slot("new", 1, LATER_US))
    storage.gate.set()

    assert await load is None
    assert not cache.is_negative("k", now_us=SOON_US)
    assert cache.peek("k", now_us=SOON_US) == "new"


async def test_a_drop_ends_a_making_too() -> None:
    cache = new_cache()
    with cache.begin_fill("k", is_making=True) as fill:
        cache.made("k")
        cache.drop("k")
        fill.put(Slot("new", 1, LATER_US))

    assert cache.peek("k", now_us=SOON_US) is None


async def test_negative_entries_evict_no_value_and_are_bounded() -> None:
    cache, storage = new_cache(), Storage()
    await loaded(cache, "k", storage.fetch)
    storage.value = None
    for number in range(100):
        await loaded(cache, f"absent-{number}", storage.fetch)

    assert cache.peek("k", now_us=SOON_US) == "old"
    assert len(cache.negative) == 10


async def test_without_room_no_negative_entry_is_kept() -> None:
    cache: ReadThrough[str] = ReadThrough(Lru(max_entries=1, max_bytes=10))
    storage = Storage()
    storage.value = None
    await loaded(cache, "k", storage.fetch)

    assert not cache.is_negative("k", now_us=SOON_US)


async def test_a_fetch_that_cannot_begin_leaves_nothing_behind() -> None:
    cache = new_cache()

    def refuse(_: str) -> asyncio.Future[Slot[str] | Slot[None]]:
        raise OSError("too many wait")

    with pytest.raises(OSError, match="too many"):
        await loaded(cache, "k", refuse)

    assert not cache._fills
    assert "k" not in cache.lru


class Observed:
    """The keys that a cache says it has something of."""

    def __init__(self) -> None:
        self.keys: set[str] = set()

    def added(self, key: str) -> None:
        self.keys.add(key)

    def removed(self, key: str) -> None:
        self.keys.discard(key)

    def cleared(self) -> None:
        self.keys.clear()


def keep(cache: ReadThrough[str], *keys: str) -> None:
    for key in keys:
        with cache.begin_fill(key) as fill:
            fill.put(Slot(key, 1, NEVER_US))


def test_an_observer_knows_the_keys_with_a_value_or_a_fill_and_no_others() -> None:
    observed = Observed()
    cache: ReadThrough[str] = ReadThrough(Lru(max_entries=2, max_bytes=1000), observer=observed)
    keep(cache, "a", "b", "c", "c")
    with cache.begin_fill("d"):
        assert observed.keys == {"b", "c", "d"}
    assert observed.keys == {"b", "c"}
    cache.drop("b")

    assert observed.keys == {"c"}
    cache.drop_everything()
    assert not observed.keys


def absent(cache: ReadThrough[str], key: str) -> None:
    with cache.begin_fill(key) as fill:
        fill.put_negative(Slot(None, 1, NEVER_US))


def test_an_entry_of_another_generation_is_served_if_it_is_kept_and_then_asked_about_no_more() -> None:
    cache, asked = new_cache(), list[tuple[str, int]]()
    keep(cache, "k")
    absent(cache, "n")

    def keeps(key: str, generation: int) -> bool:
        asked.append((key, generation))
        return True

    cache.keeps = keeps
    for _ in range(2):
        assert cache.peek("k", now_us=SOON_US) == "k"
        assert cache.is_negative("n", now_us=SOON_US)
    assert asked == []
    cache.change_generation()
    cache.change_generation()
    for _ in range(2):
        assert cache.peek("k", now_us=SOON_US) == "k"
        assert cache.is_negative("n", now_us=SOON_US)

    assert asked == [("k", 0), ("n", 0)]
    assert (cache.counters.hits, cache.counters.misses) == (4, 0)


def test_an_entry_that_is_not_kept_is_a_miss_and_stays_away_when_the_right_comes_back() -> None:
    cache = new_cache()
    keep(cache, "k", "other")
    absent(cache, "n")
    cache.change_generation()
    cache.keeps = lambda key, _: key == "other"
    assert cache.peek("k", now_us=SOON_US) is None
    assert not cache.is_negative("n", now_us=SOON_US)
    assert cache.peek("other", now_us=SOON_US) == "other"
    cache.change_generation()
    cache.keeps = lambda _key, _generation: True

    assert cache.peek("k", now_us=SOON_US) is None
    assert not cache.is_negative("n", now_us=SOON_US)
    assert (cache.counters.hits, cache.counters.misses, cache.counters.negative_hits) == (1, 2, 0)


def test_an_entry_that_was_not_asked_for_is_judged_by_its_own_generation() -> None:
    cache = new_cache()
    keep(cache, "old")
    cache.change_generation()
    keep(cache, "new")
    cache.change_generation()
    cache.keeps = lambda _, generation: generation >= 1

    assert cache.peek("old", now_us=SOON_US) is None
    assert cache.peek("new", now_us=SOON_US) == "new"


def test_a_fill_that_began_in_an_earlier_generation_counts_as_of_that_one() -> None:
    cache = new_cache()
    with cache.begin_fill("k") as fill, cache.begin_fill("n") as negative:
        cache.change_generation()
        fill.put(Slot("k", 1, NEVER_US))
        negative.put_negative(Slot(None, 1, NEVER_US))
    cache.keeps = lambda _, generation: generation >= 1

    assert cache.peek("k", now_us=SOON_US) is None
    assert not cache.is_negative("n", now_us=SOON_US)


@pytest.mark.parametrize("forget", ["change_generation", "drop_everything"])
async def test_a_load_joins_none_that_began_before_a_change_of_all_keys(forget: str) -> None:
    cache, storage = new_cache(), Storage()
    cache.keeps = lambda _key, _generation: False
    storage.gate.clear()
    early = asyncio.create_task(loaded(cache, "k", storage.fetch))
    async with asyncio.timeout(5):
        while not storage.fetches:
            await asyncio.sleep(0)
    storage.value = "new"
    getattr(cache, forget)()
    late = asyncio.create_task(loaded(cache, "k", storage.fetch))
    await asyncio.sleep(0)
    storage.gate.set()

    assert await asyncio.gather(early, late) == ["old", "new"]
    assert storage.fetches == 2
    assert cache.peek("k", now_us=SOON_US) != "old"


async def test_nothing_is_kept_of_what_is_loaded_while_it_may_not_be() -> None:
    cache, storage = new_cache(), Storage()
    cache.may_fill = lambda: False
    assert await loaded(cache, "k", storage.fetch) == "old"
    storage.value = None
    assert await loaded(cache, "n", storage.fetch) is None
    storage.value = "old"
    with cache.begin_fill("made", is_making=True) as fill:
        # It is the beginning that counts: what was read before may be older than a write elsewhere.
        cache.may_fill = lambda: True
        fill.put(Slot("made", 1, NEVER_US))

    assert cache.peek("k", now_us=SOON_US) is None
    assert not cache.is_negative("n", now_us=SOON_US)
    assert cache.peek("made", now_us=SOON_US) is None
    await loaded(cache, "k", storage.fetch)
    assert cache.peek("k", now_us=SOON_US) == "old"


def test_a_fill_under_way_puts_nothing_after_everything_was_dropped() -> None:
    cache = new_cache()
    with cache.begin_fill("k") as fill, cache.begin_fill("n") as negative:
        cache.drop_everything()
        fill.put(Slot("k", 1, NEVER_US))
        negative.put_negative(Slot(None, 1, NEVER_US))

    assert cache.peek("k", now_us=SOON_US) is None
    assert not cache.is_negative("n", now_us=SOON_US)
