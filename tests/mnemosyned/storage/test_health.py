from __future__ import annotations

import asyncio
import logging
import time

import pytest

from mnemosyned.errors import StorageUnavailable
from mnemosyned.sessions.clock import StorageClock
from mnemosyned.storage import health
from mnemosyned.storage.health import StorageHealth
from mnemosyned.storage.memory import MemoryStore

HOUR_US = 3_600_000_000


class Store(MemoryStore):
    """A memory store an hour ahead of us, that can be unavailable."""

    is_unavailable = False
    refused = 0

    def __init__(self) -> None:
        super().__init__(wall_us=lambda: time.time_ns() // 1000 + HOUR_US)

    async def now_us(self) -> int:
        if self.is_unavailable:
            self.refused += 1
            raise StorageUnavailable("unavailable")
        return await super().now_us()


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_PROBE_PERIOD_S", 0.001)
    monkeypatch.setattr(health, "_OPEN_RETRY_S", (0.001, 0.002))


async def until(condition: object) -> None:
    async with asyncio.timeout(5):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0)


async def test_opening_is_tried_until_it_succeeds_and_sets_the_clock() -> None:
    store, clock = Store(), StorageClock()
    store.is_unavailable = True
    checking = StorageHealth(store, clock)
    opening = asyncio.create_task(checking.open())
    await until(lambda: store.refused >= 3)
    assert not checking.is_serving
    store.is_unavailable = False
    await opening

    assert checking.is_serving
    assert abs(clock.now_us() - time.time_ns() // 1000 - HOUR_US) < 1_000_000


async def test_loss_and_return_are_noticed_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    store = Store()
    checking = StorageHealth(store, StorageClock())
    await checking.open()
    running = asyncio.create_task(checking.run())
    store.is_unavailable = True
    await until(lambda: store.refused >= 5)
    assert not checking.is_serving
    store.is_unavailable = False
    await until(lambda: checking.is_serving)
    running.cancel()

    assert [record.message for record in caplog.records] == [
        "storage_ready",
        "storage_lost",
        "storage_regained",
    ]


async def test_an_outage_that_lasts_is_logged_again_after_a_minute_and_its_end_has_its_length(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "_REPEAT_S", 0.05)
    monkeypatch.setattr(health, "_OPEN_RETRY_S", (0.01,))
    store = Store()
    store.is_unavailable = True
    checking = StorageHealth(store, StorageClock())
    opening = asyncio.create_task(checking.open())
    # With the line about the end, there are fewer of them than tries.
    await until(lambda: len(caplog.records) >= 2 and store.refused > len(caplog.records) + 1)
    store.is_unavailable = False
    await opening
    first, second = caplog.records[:2]

    assert first.message == second.message == "storage_not_ready"
    assert first.since == second.since  # type: ignore[attr-defined]
    assert second.times > 1  # type: ignore[attr-defined]
    assert len(caplog.records) < store.refused


class Checked(MemoryStore):
    """A memory store that counts how often it is asked."""

    checks = 0

    async def check(self) -> object:
        self.checks += 1
        return await super().check()


async def test_while_renewals_succeed_it_asks_rarely_and_a_doubt_has_it_ask_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(health, "_LEASED_PERIOD_S", 3600.0)
    store = Checked()
    checking = StorageHealth(store, StorageClock(), has_lease=True)
    await checking.open()
    running = asyncio.create_task(checking.run())
    # Twenty of the short periods.
    await asyncio.sleep(0.02)
    at_rest = store.checks
    checking.doubt(True)
    await until(lambda: store.checks >= at_rest + 3)
    running.cancel()

    assert at_rest == 1
