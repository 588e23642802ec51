from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from aio import slices
from aio.slices import SlicesFull, in_slices, in_turn
from aio.steps import Steps, cut, finished


def counting(steps: int, took_s: float = 0.0) -> Steps[int]:
    for _ in range(steps):
        until_s = time.perf_counter() + took_s
        while time.perf_counter() < until_s:
            pass
        yield
    return steps


def test_steps_can_be_run_at_once() -> None:
    assert finished(counting(5)) == 5
    assert [list(part) for part in cut(range(5), 2)] == [[0, 1], [2, 3], [4]]


async def test_work_of_one_step_suspends_nothing() -> None:
    assert await in_slices(counting(0)) == 0
    assert not slices._by_loop.get(asyncio.get_running_loop())


async def test_others_have_their_turns_between_slices() -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    jobs = [in_slices(counting(20, 0.0005)) for _ in range(10)]
    assert await asyncio.gather(*jobs) == [20] * 10
    task.cancel()

    # 100 ms of work in slices of 1 ms, and at least eight turns between two of them.
    assert turns > 200


async def test_a_short_job_does_not_wait_for_a_long_one() -> None:
    ended: list[str] = []

    async def job(name: str, steps: int) -> None:
        await in_slices(counting(steps, 0.0005))
        ended.append(name)

    await asyncio.gather(job("long", 100), job("short", 6))

    assert ended == ["short", "long"]


async def test_urgent_work_goes_first() -> None:
    ended: list[str] = []

    async def job(name: str, *, is_urgent: bool = False) -> None:
        await in_slices(counting(20, 0.0005), is_urgent=is_urgent)
        ended.append(name)

    # More than are begun at once.
    await asyncio.gather(*(job("other") for _ in range(12)), job("urgent", is_urgent=True))

    assert ended[0] == "urgent"


async def test_an_error_is_its_callers_own() -> None:
    def failing() -> Steps[None]:
        yield
        raise KeyError

    with pytest.raises(KeyError):
        await in_slices(failing())
    assert await in_slices(counting(3)) == 3


async def test_the_work_of_a_cancelled_caller_ends() -> None:
    closed = False

    def endless() -> Steps[None]:
        nonlocal closed
        try:
            while True:
                yield
        finally:
            closed = True

    task = asyncio.create_task(in_slices(endless(), size_bytes=10))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert await in_slices(counting(3)) == 3
    assert closed
    assert slices.of_loop().waiting_bytes == 0


async def test_what_waits_has_a_bound() -> None:
    half = slices.MAX_WAITING_BYTES // 2
    tasks = [asyncio.create_task(in_slices(counting(50), size_bytes=half)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(SlicesFull):
        await in_slices(counting(50), size_bytes=1)
    assert await in_slices(counting(50)) == 50

    assert await asyncio.gather(*tasks) == [50, 50]
    assert await in_slices(counting(50), size_bytes=4 * half) == 50


async def test_work_that_cannot_be_cut_has_its_turn() -> None:
    work: Callable[[], int] = lambda: 7  # noqa: E731  # nothing else to say of it

    assert await in_turn(work) == 7
