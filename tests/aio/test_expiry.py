from __future__ import annotations

import asyncio
import weakref

import pytest
import uvloop
from clusters import until

from aio.expiry import Expiry


async def test_each_future_fails_at_its_instant_and_not_before() -> None:
    loop, expiry = asyncio.get_running_loop(), Expiry()
    ends: dict[float, float] = {}
    begun_s = loop.time()

    async def waits(seconds: float) -> None:
        future = loop.create_future()
        expiry.add(future, seconds)
        with pytest.raises(TimeoutError):
            await future
        ends[seconds] = loop.time() - begun_s

    await asyncio.gather(*(waits(seconds) for seconds in (0.03, 0.01, 0.02)))

    assert list(ends) == [0.01, 0.02, 0.03]
    assert all(took_s >= seconds for seconds, took_s in ends.items())


async def test_a_future_that_is_done_is_left_alone() -> None:
    loop, expiry = asyncio.get_running_loop(), Expiry()
    answered, cancelled, late = (loop.create_future() for _ in range(3))
    for future in (answered, cancelled, late):
        expiry.add(future, 0.01)
    answered.set_result(1)
    cancelled.cancel()

    with pytest.raises(TimeoutError):
        await late
    assert (answered.result(), cancelled.cancelled()) == (1, True)


async def test_futures_that_are_done_keep_no_timer_running() -> None:
    loop, expiry = asyncio.get_running_loop(), Expiry()
    for _ in range(1000):
        future = loop.create_future()
        expiry.add(future, 0.01)
        future.set_result(None)
    await asyncio.sleep(0.03)

    assert expiry._heap == []
    assert expiry._timer is None


async def test_after_the_close_nothing_fails() -> None:
    loop, expiry = asyncio.get_running_loop(), Expiry()
    future = loop.create_future()
    expiry.add(future, 0.01)
    expiry.close()
    await asyncio.sleep(0.03)

    assert not future.done()
    future.cancel()


def test_an_instant_that_is_over_already_harms_no_later_one() -> None:
    async def run() -> None:
        loop, expiry = asyncio.get_running_loop(), Expiry()
        futures = [loop.create_future() for _ in range(3)]
        for future, seconds in zip(futures, (0.0, -1.0, 0.01), strict=True):
            expiry.add(future, seconds)
        failures = await asyncio.gather(*futures, return_exceptions=True)
        assert [type(one) for one in failures] == [TimeoutError] * 3

    # As the daemon does: its loop's handle of such an instant is no TimerHandle.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


async def test_what_expires_is_given_to_who_wants_it() -> None:
    expired: list[asyncio.Future[None]] = []
    loop, expiry = asyncio.get_running_loop(), Expiry(expired.append)
    future = loop.create_future()
    expiry.add(future, 0.001)
    await until(lambda: expired == [future])

    assert not future.done()


async def test_futures_that_are_done_are_not_kept_until_their_instants() -> None:
    loop, expiry = asyncio.get_running_loop(), Expiry()
    waiting = [loop.create_future() for _ in range(10)]
    for future in waiting:
        expiry.add(future, 3600)
    kept: set[weakref.ref[asyncio.Future[None]]] = set()
    for _ in range(20_000):
        future = loop.create_future()
        kept.add(weakref.ref(future, kept.discard))
        future.set_result(None)
        expiry.add(future, 3600)

    assert len(kept) < 3000
    expiry.close()
