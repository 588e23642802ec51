from __future__ import annotations

import asyncio
import logging

import pytest

from aio.tasks import Tasks


async def until(condition: object) -> None:
    async with asyncio.timeout(5):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0)


async def forever() -> None:
    await asyncio.Event().wait()


async def test_work_is_owned_until_it_ends() -> None:
    tasks, may_end = Tasks("work"), asyncio.Event()

    async def work() -> None:
        await may_end.wait()

    task = tasks.spawn(work())
    assert tasks.running() == {task}
    may_end.set()

    await until(lambda: not len(tasks))


async def test_a_failure_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    tasks = Tasks("work")

    async def fail() -> None:
        raise RuntimeError("a bug")

    tasks.spawn(fail())
    await until(lambda: caplog.records)

    (record,) = caplog.records
    assert (record.getMessage(), record.levelno) == ("work_failed", logging.ERROR)
    assert record.exc_info


async def test_beyond_the_bound_work_is_dropped() -> None:
    tasks = Tasks("work", max_tasks=1)

    assert tasks.spawn(forever()) is not None
    assert tasks.spawn(forever()) is None
    await tasks.close()


async def test_closing_cancels_what_runs_and_lets_nothing_begin(caplog: pytest.LogCaptureFixture) -> None:
    tasks = Tasks("work")
    task = tasks.spawn(forever())
    await tasks.close()

    assert task is not None
    assert task.cancelled()
    assert tasks.spawn(forever()) is None
    assert not caplog.records


async def test_shielded_work_ends_though_its_caller_was_cancelled() -> None:
    tasks, may_end, ended = Tasks("work"), asyncio.Event(), asyncio.Event()

    async def work() -> int:
        await may_end.wait()
        ended.set()
        return 1

    caller = asyncio.create_task(tasks.run_shielded(work()))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)
    may_end.set()

    await until(lambda: not len(tasks))
    assert ended.is_set()


async def test_the_caller_of_shielded_work_gets_its_result_or_its_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tasks = Tasks("work")

    async def one() -> int:
        return 1

    async def fail() -> int:
        raise KeyError("k")

    assert await tasks.run_shielded(one()) == 1
    with pytest.raises(KeyError):
        await tasks.run_shielded(fail())
    assert not caplog.records
