from __future__ import annotations

import asyncio

import pytest

from aio.later import Later, begun
from aio.tasks import Tasks
from cache.singleflight import SingleFlight

TASKS = Tasks("flights")


class Work:
    def __init__(self) -> None:
        self.begun = 0
        self.was_cancelled = False
        self.gate = asyncio.Event()

    def fly(self) -> Later[int]:
        return begun(self._fly(), TASKS)

    async def _fly(self) -> int:
        self.begun += 1
        result = self.begun
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        return result


async def turn() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_callers_at_the_same_time_share_one_flight() -> None:
    flights: SingleFlight[int] = SingleFlight()
    work = Work()
    callers = [asyncio.ensure_future(flights.run("k", work.fly)) for _ in range(10)]
    await turn()
    work.gate.set()

    assert await asyncio.gather(*callers) == [1] * 10
    assert len(flights) == 0


async def test_different_keys_fly_apart() -> None:
    flights: SingleFlight[int] = SingleFlight()
    work = Work()
    work.gate.set()

    assert await asyncio.gather(flights.run("a", work.fly), flights.run("b", work.fly)) == [1, 2]


async def test_a_failure_reaches_every_caller_and_is_not_remembered() -> None:
    flights: SingleFlight[int] = SingleFlight()

    async def crash() -> int:
        raise ValueError("crashed")

    results = await asyncio.gather(
        *(flights.run("k", lambda: begun(crash(), TASKS)) for _ in range(3)), return_exceptions=True
    )
    work = Work()
    work.gate.set()

    assert all(isinstance(result, ValueError) for result in results)
    assert await flights.run("k", work.fly) == 1


async def test_a_flight_outlives_a_cancelled_caller() -> None:
    flights: SingleFlight[int] = SingleFlight()
    work = Work()
    leaves, stays = (asyncio.ensure_future(flights.run("k", work.fly)) for _ in range(2))
    await turn()
    leaves.cancel()
    await turn()
    work.gate.set()

    assert await stays == 1
    assert not work.was_cancelled


async def test_a_flight_that_nobody_waits_for_is_cancelled_and_a_new_one_begins() -> None:
    flights: SingleFlight[int] = SingleFlight()
    work = Work()
    gone = asyncio.ensure_future(flights.run("k", work.fly))
    await turn()
    gone.cancel()
    late = asyncio.ensure_future(flights.run("k", work.fly))
    await turn()
    work.gate.set()

    assert await late in {1, 2}
    with pytest.raises(asyncio.CancelledError):
        await gone


async def test_after_forget_a_caller_begins_anew_while_the_old_flight_lands() -> None:
    flights: SingleFlight[int] = SingleFlight()
    work = Work()
    early = asyncio.ensure_future(flights.run("k", work.fly))
    await turn()
    flights.forget("k")
    late = asyncio.ensure_future(flights.run("k", work.fly))
    await turn()
    work.gate.set()

    assert await asyncio.gather(early, late) == [1, 2]
    assert len(flights) == 0
