from __future__ import annotations

import asyncio
from random import Random

from prometheus_client import CollectorRegistry
from serving import LIFETIMES

from cache.lru import Lru
from cache.read_through import ReadThrough
from mnemosyned.errors import StorageUnavailable
from mnemosyned.observe.metrics import UpkeepMetrics
from mnemosyned.sessions.cleanup import run_cleanup
from mnemosyned.sessions.clock import StorageClock
from mnemosyned.sessions.encoded import EncodedSession
from mnemosyned.sessions.model import NewSession
from mnemosyned.sessions.service import SessionService
from mnemosyned.sessions.touches import TouchWriter
from mnemosyned.storage.memory import MemoryStore


class Store(MemoryStore):
    """Fails its first cleanup."""

    rounds = 0

    async def clean_up(self, *, limit: int) -> list[str]:
        self.rounds += 1
        if self.rounds == 1:
            raise StorageUnavailable("away")
        return await super().clean_up(limit=limit)


async def test_cleanup_survives_an_error_and_drops_what_it_removed_from_the_cache() -> None:
    now_us = 1_000_000
    store = Store(ttl_us=1, touch_interval_us=0, wall_us=lambda: now_us)
    cache: ReadThrough[EncodedSession] = ReadThrough(Lru(max_entries=10, max_bytes=10**6))
    metrics = UpkeepMetrics(CollectorRegistry())
    touches = TouchWriter(store, max_waiting=10, lost=metrics.touches_lost, on_gone=cache.drop)
    service = SessionService(store, cache, touches, clock=StorageClock(), lifetimes=LIFETIMES)
    await service.start(NewSession(access_token="t", subject_id="s"))
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
