from __future__ import annotations

import asyncio
from random import Random

from serving import assembled
from stores import new

from mnemosyned.errors import StorageUnavailable
from mnemosyned.sessions.cleanup import run_cleanup
from mnemosyned.storage.memory import MemoryStore


class Store(MemoryStore):
    """Fails its first cleanup."""

    rounds = 0

    async def clean_up(self, *, limit: int) -> list[str]:
        self.rounds += 1
        if self.rounds == 1:
            raise StorageUnavailable("unavailable")
        return await super().clean_up(limit=limit)


async def test_cleanup_survives_an_error_and_drops_what_it_removed_from_the_cache() -> None:
    now_us = 1_000_000
    store = Store(wall_us=lambda: now_us)
    parts = assembled(store)
    service, cache, metrics = parts.service, parts.cache, parts.upkeep
    await service.start(new("t", ttl_us=1))
    assert "t" in cache.lru
    now_us += 10

    cleaning = asyncio.create_task(run_cleanup(service, period_s=0.001, metrics=metrics, rng=Random(1)))
    async with asyncio.timeout(5):
        while not metrics.cleaned_up._value.get():
            await asyncio.sleep(0)
    cleaning.cancel()

    assert metrics.cleanup_errors._value.get() == 1
    assert metrics.cleaned_up._value.get() == 1
    assert "t" not in cache.lru
