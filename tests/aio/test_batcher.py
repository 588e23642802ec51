from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from aio.batcher import Batcher, BatchLimits, QueueFull


class Backend:
    """Answers each item with its double, when told to."""

    def __init__(self, *, is_open: bool = True) -> None:
        self.batches: list[list[int]] = []
        self.gate = asyncio.Event()
        self.was_cancelled = False
        if is_open:
            self.gate.set()

    async def run(self, items: Sequence[int]) -> list[int | LookupError]:
        self.batches.append(list(items))
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        return [KeyError() if item < 0 else 2 * item for item in items]


async def until(condition: object) -> None:
    async with asyncio.timeout(5):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0)


async def test_a_lone_item_goes_out_at_once() -> None:
    backend = Backend()
    batcher = Batcher(backend.run, limits=BatchLimits())

    assert await batcher.submit(3) == 6
    assert backend.batches == [[3]]


async def test_items_of_one_turn_of_the_loop_share_a_batch() -> None:
    backend = Backend()
    batcher = Batcher(backend.run, limits=BatchLimits())

    assert await asyncio.gather(*(batcher.submit(n) for n in range(64))) == [2 * n for n in range(64)]
    assert backend.batches == [list(range(64))]


async def test_what_arrives_during_a_batch_forms_the_next() -> None:
    backend = Backend(is_open=False)
    batcher = Batcher(backend.run, limits=BatchLimits())
    first = asyncio.create_task(batcher.submit(1))
    await until(lambda: backend.batches)
    rest = [asyncio.create_task(batcher.submit(n)) for n in (2, 3, 4)]
    await asyncio.sleep(0)
    backend.gate.set()

    assert await asyncio.gather(first, *rest) == [2, 4, 6, 8]
    assert backend.batches == [[1], [2, 3, 4]]


async def test_an_item_fails_alone() -> None:
    batcher = Batcher(Backend().run, limits=BatchLimits())

    good, bad = await asyncio.gather(batcher.submit(1), batcher.submit(-1), return_exceptions=True)

    assert good == 2
    assert isinstance(bad, KeyError)


async def test_a_failed_batch_fails_each_of_its_items_with_an_exception_of_its_own() -> None:
    async def run(_: Sequence[int]) -> list[int]:
        raise ConnectionError("gone")

    batcher: Batcher[int, int] = Batcher(run, limits=BatchLimits())
    one, other = await asyncio.gather(batcher.submit(1), batcher.submit(2), return_exceptions=True)

    assert isinstance(one, ConnectionError)
    assert isinstance(other, ConnectionError)
    assert one is not other
    assert str(one) == str(other) == "gone"


async def test_a_batcher_works_on_after_a_failure() -> None:
    backend = Backend()
    calls = 0

    async def run(items: Sequence[int]) -> list[int | LookupError]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ValueError("a bug")
        return await backend.run(items)

    batcher = Batcher(run, limits=BatchLimits())
    with pytest.raises(ValueError, match="a bug"):
        await batcher.submit(1)

    assert await batcher.submit(1) == 2


async def test_batches_are_bounded_by_items_and_bytes() -> None:
    backend = Backend()
    batcher = Batcher(
        backend.run, limits=BatchLimits(max_items=3, max_bytes=10), size_bytes=lambda item: item
    )

    await asyncio.gather(*(batcher.submit(n) for n in (1, 1, 1, 1, 20, 8, 2)))

    assert backend.batches == [[1, 1, 1], [1], [20], [8, 2]]


async def test_a_full_queue_refuses_at_once() -> None:
    backend = Backend(is_open=False)
    batcher = Batcher(backend.run, limits=BatchLimits(max_waiting=2))
    under_way = asyncio.create_task(batcher.submit(0))
    await until(lambda: backend.batches)
    waiting = [asyncio.create_task(batcher.submit(n)) for n in (1, 2)]
    await asyncio.sleep(0)

    with pytest.raises(QueueFull):
        await batcher.submit(3)

    backend.gate.set()
    await asyncio.gather(under_way, *waiting)


async def test_a_cancelled_caller_takes_its_item_out_of_the_queue() -> None:
    backend = Backend(is_open=False)
    batcher = Batcher(backend.run, limits=BatchLimits())
    first = asyncio.create_task(batcher.submit(1))
    await until(lambda: backend.batches)
    leaves, stays = asyncio.create_task(batcher.submit(2)), asyncio.create_task(batcher.submit(3))
    await asyncio.sleep(0)
    leaves.cancel()
    await asyncio.wait([leaves])
    backend.gate.set()

    assert await asyncio.gather(first, stays) == [2, 6]
    assert backend.batches == [[1], [3]]


async def test_a_batch_goes_on_while_one_of_its_callers_waits() -> None:
    backend = Backend(is_open=False)
    batcher = Batcher(backend.run, limits=BatchLimits())
    leaves, stays = asyncio.create_task(batcher.submit(1)), asyncio.create_task(batcher.submit(2))
    await until(lambda: backend.batches)
    leaves.cancel()
    await asyncio.wait([leaves])
    backend.gate.set()

    assert await stays == 4
    assert not backend.was_cancelled


async def test_a_batch_that_nobody_waits_for_is_cancelled_and_the_next_runs() -> None:
    backend = Backend(is_open=False)
    batcher = Batcher(backend.run, limits=BatchLimits())
    gone = asyncio.create_task(batcher.submit(1))
    await until(lambda: backend.batches)
    gone.cancel()
    await until(lambda: backend.was_cancelled)
    backend.gate.set()

    assert await batcher.submit(2) == 4


async def test_a_batch_that_must_know_its_outcome_runs_on_without_callers() -> None:
    backend = Backend(is_open=False)
    batcher = Batcher(backend.run, limits=BatchLimits(is_abandonable=False))
    gone = asyncio.create_task(batcher.submit(1))
    await until(lambda: backend.batches)
    gone.cancel()
    next_one = asyncio.create_task(batcher.submit(2))
    await asyncio.sleep(0)
    backend.gate.set()

    assert await next_one == 4
    assert not backend.was_cancelled


async def test_batches_run_side_by_side() -> None:
    backend = Backend(is_open=False)
    batcher = Batcher(backend.run, limits=BatchLimits(concurrency=2))
    first = asyncio.create_task(batcher.submit(1))
    await until(lambda: len(backend.batches) == 1)
    second = asyncio.create_task(batcher.submit(2))
    await until(lambda: len(backend.batches) == 2)
    backend.gate.set()

    assert await asyncio.gather(first, second) == [2, 4]


async def test_close_cancels_what_is_under_way_and_what_waits() -> None:
    backend = Backend(is_open=False)
    batcher = Batcher(backend.run, limits=BatchLimits())
    under_way = asyncio.create_task(batcher.submit(1))
    await until(lambda: backend.batches)
    waiting = asyncio.create_task(batcher.submit(2))
    await asyncio.sleep(0)
    await batcher.close()

    for task in (under_way, waiting):
        with pytest.raises(asyncio.CancelledError):
            await task
    assert backend.was_cancelled


async def test_eager_items_of_one_turn_share_a_batch_and_a_lone_one_is_run_by_its_caller() -> None:
    backend = Backend(is_open=False)
    batcher = Batcher(backend.run, limits=BatchLimits(concurrency=2, is_eager=True))
    lone = asyncio.create_task(batcher.submit(1))
    await until(lambda: backend.batches)
    assert not batcher._workers
    calls = [lone, *(asyncio.create_task(batcher.submit(n)) for n in (2, 3, 4))]
    await until(lambda: len(backend.batches) == 2)
    late = asyncio.create_task(batcher.submit(5))
    await asyncio.sleep(0)
    assert backend.batches == [[1], [2, 3, 4]]

    backend.gate.set()
    assert await asyncio.gather(*calls, late) == [2, 4, 6, 8, 10]


async def test_eager_items_that_arrive_together_share_a_batch() -> None:
    backend = Backend()
    batcher = Batcher(backend.run, limits=BatchLimits(is_eager=True))

    assert await asyncio.gather(*(batcher.submit(n) for n in (1, 2, 3))) == [2, 4, 6]
    assert [sorted(batch) for batch in backend.batches] == [[1, 2, 3]]


async def test_what_gathers_with_an_eager_item_goes_out_when_its_caller_is_cancelled() -> None:
    backend = Backend()
    batcher = Batcher(backend.run, limits=BatchLimits(is_eager=True))
    first, second = (asyncio.create_task(batcher.submit(n)) for n in (1, 2))
    await asyncio.sleep(0)
    first.cancel()

    assert await second == 4
    assert backend.batches == [[2]]


async def test_an_eager_item_fails_alone_and_leaves_its_place() -> None:
    backend = Backend()
    batcher = Batcher(backend.run, limits=BatchLimits(is_eager=True))

    with pytest.raises(KeyError):
        await batcher.submit(-1)
    assert await batcher.submit(1) == 2


async def test_what_waited_for_an_eager_item_goes_out_when_its_caller_is_cancelled() -> None:
    backend = Backend(is_open=False)
    batcher = Batcher(backend.run, limits=BatchLimits(concurrency=1, is_eager=True))
    first = asyncio.create_task(batcher.submit(1))
    await until(lambda: backend.batches)
    second = asyncio.create_task(batcher.submit(2))
    await asyncio.sleep(0)
    first.cancel()
    backend.gate.set()

    assert await second == 4
    assert backend.was_cancelled
