from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from aio.around import Around


async def answer(log: list[str]) -> str:
    try:
        await asyncio.sleep(0)
        log.append("answered")
    finally:
        log.append("ended")
    return "answer"


async def twice(inner: Coroutine[Any, Any, str]) -> str:
    return 2 * await inner


async def test_it_runs_what_is_made_of_the_inner_one() -> None:
    log: list[str] = []

    assert await Around(answer(log), twice) == "answeranswer"
    assert await asyncio.create_task(Around(answer(log), twice)) == "answeranswer"
    assert log == ["answered", "ended"] * 2


# An inner one that is left behind is a RuntimeWarning, and so a failed test.


async def test_it_may_be_closed_or_cancelled_before_it_begins() -> None:
    log: list[str] = []
    Around(answer(log), twice).close()
    task = asyncio.create_task(Around(answer(log), twice))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert log == []


async def test_it_may_be_cancelled_after_it_has_begun() -> None:
    log: list[str] = []
    task = asyncio.create_task(Around(answer(log), twice))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert log == ["ended"]
