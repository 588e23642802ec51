from __future__ import annotations

import asyncio

import pytest

from aio.periodic import run_periodically


async def test_a_bug_is_logged_and_the_next_round_is_tried(caplog: pytest.LogCaptureFixture) -> None:
    rounds = 0

    async def work() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 1:
            raise RuntimeError("a bug")

    running = asyncio.create_task(run_periodically("upkeep", work, period_s=lambda: 0.001))
    async with asyncio.timeout(5):
        while rounds < 3:
            await asyncio.sleep(0)
    running.cancel()

    assert [record.getMessage() for record in caplog.records] == ["upkeep_failed"]
    assert caplog.records[0].exc_info


async def test_the_period_is_asked_before_each_round_and_comes_first() -> None:
    asked: list[str] = []

    async def work() -> None:
        asked.append("work")

    def period_s() -> float:
        asked.append("period")
        return 0.0

    running = asyncio.create_task(run_periodically("upkeep", work, period_s=period_s))
    async with asyncio.timeout(5):
        while len(asked) < 4:
            await asyncio.sleep(0)
    running.cancel()

    assert asked[:4] == ["period", "work", "period", "work"]
