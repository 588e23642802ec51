from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from aio.stalls import StallWatch
from aio.units import NS_PER_S


class Uptime:
    s = 100.0

    def __call__(self) -> int:
        return round(self.s * NS_PER_S)


@pytest.fixture
def uptime() -> Uptime:
    return Uptime()


@pytest.fixture
async def watch(uptime: Uptime) -> AsyncIterator[StallWatch]:
    watch = StallWatch(uptime, memory_s=0.1)
    watch.start()
    yield watch
    watch.stop()


async def test_what_is_read_in_time_is_new(watch: StallWatch, uptime: Uptime) -> None:
    uptime.s += 0.09

    assert watch.waited_s() == 0


async def test_what_is_read_first_after_a_stall_may_be_as_old_as_the_last_beat(
    watch: StallWatch, uptime: Uptime
) -> None:
    uptime.s += 2

    assert watch.waited_s() == pytest.approx(2)


def come_round(watch: StallWatch, times: int = 3) -> None:
    for _ in range(times):
        watch.count_round()


async def test_a_stall_is_remembered_for_a_while_after_its_end(watch: StallWatch, uptime: Uptime) -> None:
    uptime.s += 2
    watch.beat()
    come_round(watch)
    uptime.s += 0.05
    watch.beat()

    assert watch.waited_s() == pytest.approx(2.05)

    uptime.s += 0.06
    watch.beat()

    assert watch.waited_s() == 0


async def test_a_stall_is_remembered_until_the_loop_has_come_round(watch: StallWatch, uptime: Uptime) -> None:
    """The first reading of what has come in the stall may take longer than the memory."""
    uptime.s += 2
    watch.beat()
    uptime.s += 1
    watch.beat()
    come_round(watch, 2)
    watch.beat()

    assert watch.waited_s() == pytest.approx(3)

    for _ in range(3):
        come_round(watch)
        uptime.s += 0.09
        watch.beat()

    assert watch.waited_s() == 0


async def test_a_long_stall_is_remembered_for_longer() -> None:
    uptime = Uptime()
    watch = StallWatch(uptime, memory_s=0.1, memory_part=0.5)
    watch.start()
    try:
        uptime.s += 2
        watch.beat()
        come_round(watch)
        for _ in range(12):
            uptime.s += 0.09
            watch.beat()

        assert watch.waited_s() == pytest.approx(3.08)

        uptime.s += 0.09
        watch.beat()

        assert watch.waited_s() == 0
    finally:
        watch.stop()


async def test_the_loop_counts_its_rounds_after_a_stall_and_then_no_more() -> None:
    uptime = Uptime()
    watch = StallWatch(uptime, memory_s=0.0)
    watch.start()
    try:
        uptime.s += 2
        watch.beat()
        for _ in range(10):
            await asyncio.sleep(0)
        uptime.s += 0.01
        watch.beat()

        assert watch.waited_s() == 0
    finally:
        watch.stop()


async def test_a_loop_that_is_always_late_measures_its_last_stalls_only(
    watch: StallWatch, uptime: Uptime
) -> None:
    for _ in range(100):
        uptime.s += 0.12
        watch.beat()
        watch.count_round()

    assert watch.waited_s() == pytest.approx(0.36)


async def test_without_beats_no_stall_is_seen(uptime: Uptime) -> None:
    watch = StallWatch(uptime)
    watch.stop()
    uptime.s += 2

    assert watch.waited_s() == 0
