from __future__ import annotations

import asyncio
import inspect
from collections.abc import Coroutine
from typing import Any

import pytest

from aio.later import Later, Outcome, begun, failed
from aio.tasks import Tasks


def plus_one(outcome: Outcome[int]) -> Outcome[int]:
    return outcome + 1 if isinstance(outcome, int) else outcome


async def test_who_waits_gets_the_result_in_the_step_in_which_it_is_known() -> None:
    later: Later[int] = Later()
    taken: list[Outcome[int]] = []
    later.through(plus_one).through(plus_one).then(taken.append)
    later.set_result(1)

    assert taken == [3]
    assert later.done()


async def test_steps_and_takers_that_come_after_the_result_have_it_too() -> None:
    later: Later[int] = Later()
    later.set_result(1)
    taken: list[Outcome[int]] = []
    later.through(plus_one).then(taken.append)

    assert taken == [2]


async def test_what_a_step_raises_is_its_outcome() -> None:
    def refuse(_: Outcome[int]) -> Outcome[int]:
        raise ValueError

    early, late = Later[int](), Later[int]()
    early.through(refuse).through(plus_one)
    early.set_result(1)
    late.set_result(1)
    late.through(refuse).through(plus_one)

    for later in (early, late):
        with pytest.raises(ValueError):  # noqa: PT011  # it has no text
            await later


async def test_only_the_first_outcome_counts() -> None:
    later: Later[int] = Later()
    later.set_result(1)
    later.set_exception(ValueError())
    later.set_result(2)
    later.cancel()

    assert await later == 1


async def test_who_awaits_is_woken() -> None:
    later: Later[int] = Later()
    asyncio.get_running_loop().call_soon(later.set_result, 1)

    assert await later.through(plus_one) == 2


async def test_who_awaits_gets_the_failure() -> None:
    later: Later[int] = Later()
    asyncio.get_running_loop().call_soon(later.set_exception, ValueError("no"))

    with pytest.raises(ValueError, match="no"):
        await later
    with pytest.raises(ValueError, match="never"):
        await failed(ValueError("never"))


async def test_an_outcome_may_go_on_as_a_coroutine() -> None:
    async def go_on() -> int:
        return 5

    def instead(_: Outcome[int]) -> Outcome[int]:
        return go_on()

    later: Later[int] = Later()
    asyncio.get_running_loop().call_soon(later.set_result, 1)

    assert await later.through(instead) == 5


async def test_the_source_hears_of_who_waits_no_more_and_the_steps_see_it() -> None:
    later: Later[int] = Later()
    left: list[bool] = []
    seen: list[Outcome[int]] = []

    def see(outcome: Outcome[int]) -> Outcome[int]:
        seen.append(outcome)
        return outcome

    later.on_cancel = lambda: left.append(True)
    waiting = asyncio.ensure_future(awaiting(later.through(see)))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    later.cancel()

    assert left == [True]
    assert isinstance(seen[0], asyncio.CancelledError)


async def test_who_gives_up_says_why_and_the_source_hears_of_it() -> None:
    later: Later[int] = Later()
    told: list[str] = []
    later.on_cancel = lambda: told.append("source")
    later.give_up(LookupError("too late"))
    later.give_up(KeyError())

    assert told == ["source"]
    with pytest.raises(LookupError, match="too late"):
        await later


async def later_on(number: int) -> int:
    await asyncio.sleep(0)
    return number


@pytest.mark.parametrize("goes_on", [False, True])
async def test_a_result_is_made_into_another_one(*, goes_on: bool) -> None:
    later: Later[int] = Later()
    text = later.through(lambda outcome: later_on(2) if goes_on else outcome).map(str)
    later.set_result(2)

    assert await text == "2"


async def test_a_failure_is_made_into_nothing_else() -> None:
    later: Later[int] = Later()
    text = later.map(str)
    later.set_exception(LookupError())
    with pytest.raises(LookupError):
        await text


async def test_a_later_that_is_closed_leaves_no_coroutine_behind() -> None:
    """The work with which it would go on has begun nothing, and says nothing of that."""
    work = later_on(1)
    later: Later[int] = Later()
    text = later.through(lambda _: work).map(str)
    later.set_result(1)
    text.close()

    assert inspect.getcoroutinestate(work) == inspect.CORO_CLOSED


async def test_a_later_that_is_closed_before_its_result_is_cancelled() -> None:
    later: Later[int] = Later()
    later.close()
    with pytest.raises(asyncio.CancelledError):
        await later


async def test_a_caller_that_is_cancelled_as_the_outcome_comes_leaves_no_coroutine_behind() -> None:
    begun_work: list[Coroutine[Any, Any, int]] = []

    async def go_on() -> int:
        return 5

    def instead(_: Outcome[int]) -> Outcome[int]:
        begun_work.append(go_on())
        return begun_work[0]

    later: Later[int] = Later()
    waiting = asyncio.ensure_future(awaiting(later.through(instead)))
    await asyncio.sleep(0)
    later.set_result(1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    with pytest.raises(RuntimeError, match="cannot reuse"):
        await begun_work[0]


async def test_a_bug_of_who_waits_is_reported_and_none_of_the_source() -> None:
    def take(_: Outcome[int]) -> None:
        raise ZeroDivisionError

    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
    later: Later[int] = Later()
    later.then(take)
    later.set_result(1)

    assert isinstance(reported[0], ZeroDivisionError)


async def test_work_runs_as_a_task_and_is_cancelled_with_its_later() -> None:
    tasks, ended = Tasks("work"), asyncio.Event()

    async def work() -> int:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        return 1

    async def short() -> int:
        return 1

    assert await begun(short(), tasks) == 1
    later = begun(work(), tasks)
    await asyncio.sleep(0)
    later.cancel()
    async with asyncio.timeout(5):
        await ended.wait()


async def test_work_whose_tasks_are_closed_is_cancelled() -> None:
    async def work() -> int:
        return 1

    tasks = Tasks("work")
    early = begun(work(), tasks)
    await tasks.close()

    for later in (early, begun(work(), tasks)):
        with pytest.raises(asyncio.CancelledError):
            await later


async def awaiting(later: Later[int]) -> int:
    return await later
