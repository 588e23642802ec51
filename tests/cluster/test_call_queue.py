"""Calls for one peer, over a line that answers as a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from aio.batcher import BatchLimits
from aio.later import Later
from cluster.call_queue import CallQueue
from cluster.errors import ClusterError, PeerSkipped, PeerTimeout, PeerUnreachable
from cluster.peerpb import peer_pb2 as pb

TRY_S = 5.0


class Line:
    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.timeouts_s: list[float] = []
        self.under_way: list[Later[Sequence[pb.Answer]]] = []
        self.answered_calls = 0
        self.failures: list[tuple[type[ClusterError], float]] = []
        self.raises: Exception | None = None

    def send(self, items: list[pb.Item], timeout_s: float) -> Later[Sequence[pb.Answer]]:
        if self.raises is not None:
            raise self.raises
        self.batches.append([item.method for item in items])
        self.timeouts_s.append(timeout_s)
        self.under_way.append(Later())
        return self.under_way[-1]

    def answered(self, count: int) -> None:
        self.answered_calls += count

    def failed(self, failure: ClusterError, try_s: float) -> None:
        self.failures.append((type(failure), try_s))

    def answer(self, batch: int) -> None:
        self.under_way[batch].set_result([pb.Answer(text=method) for method in self.batches[batch]])


@pytest.fixture
def line() -> Line:
    return Line()


def queue(line: Line, *, grace_s: float = 0.1, **limits: int) -> CallQueue:
    return CallQueue(line, BatchLimits(**limits), grace_s=grace_s)


def call(calls: CallQueue, method: str, *, try_s: float = TRY_S, size: int = 0) -> Later[pb.Answer]:
    return calls.add(pb.Item(method=method, message=bytes(size)), try_s=try_s)


async def turn() -> None:
    await asyncio.sleep(0)


async def test_a_lone_call_is_sent_at_the_end_of_the_turn(line: Line) -> None:
    calls = queue(line)
    answer = call(calls, "a")
    assert line.batches == []
    await turn()
    assert line.batches == [["a"]]
    line.answer(0)

    assert (await answer).text == "a"
    assert line.answered_calls == 1


async def test_what_arrives_while_all_batches_are_under_way_shares_the_next(line: Line) -> None:
    calls = queue(line, concurrency=1)
    answers = [call(calls, "a"), call(calls, "b")]
    await turn()
    answers += [call(calls, "c"), call(calls, "d")]
    await turn()
    assert line.batches == [["a", "b"]]
    line.answer(0)
    await turn()
    line.answer(1)

    assert line.batches == [["a", "b"], ["c", "d"]]
    assert [(await answer).text for answer in answers] == ["a", "b", "c", "d"]


async def test_a_batch_is_bounded(line: Line) -> None:
    calls = queue(line, max_items=2, max_bytes=100, concurrency=9)
    for method, size in (("a", 1), ("b", 1), ("c", 60), ("d", 60), ("e", 500)):
        call(calls, method, size=size)
    await turn()

    assert line.batches == [["a", "b"], ["c"], ["d"], ["e"]]


async def test_a_call_that_finds_too_many_waiting_is_skipped(line: Line) -> None:
    calls = queue(line, max_waiting=1)
    call(calls, "a")

    with pytest.raises(PeerSkipped):
        call(calls, "b")
    assert line.failures == []


async def test_a_call_that_is_late_is_left_and_its_answer_is_dropped(line: Line) -> None:
    calls = queue(line, concurrency=1, grace_s=0.0)
    late, patient = call(calls, "a", try_s=0.01), call(calls, "b")
    await turn()
    waiting = call(calls, "c", try_s=0.02)
    for one in (late, waiting):
        with pytest.raises(PeerTimeout):
            await one
    assert line.failures == [(PeerTimeout, 0.01), (PeerTimeout, 0.02)]
    line.answer(0)
    await turn()

    assert (await patient).text == "b"
    assert line.answered_calls == 1
    assert line.batches == [["a", "b"]]


async def test_a_call_in_a_hurry_is_not_waited_for_after_its_callers_deadline(line: Line) -> None:
    calls = queue(line, grace_s=60.0)
    call(calls, "patient")
    begun_s = asyncio.get_running_loop().time()

    with pytest.raises(PeerTimeout):
        await call(calls, "a", try_s=0.01)
    assert asyncio.get_running_loop().time() - begun_s < 1.0


async def test_a_batch_gets_the_time_of_its_last_call(line: Line) -> None:
    calls = queue(line, grace_s=3.0)
    call(calls, "a", try_s=1.0)
    call(calls, "b", try_s=2.0)
    await turn()

    assert 1.5 < line.timeouts_s[0] <= 2.0


async def test_no_timer_runs_for_calls_that_are_answered(line: Line) -> None:
    calls = queue(line, grace_s=0.0)
    call(calls, "a", try_s=0.01)
    await turn()
    line.answer(0)
    await asyncio.sleep(0.03)

    assert calls._timer is None


async def test_a_batch_that_fails_is_each_calls_failure(line: Line) -> None:
    calls = queue(line)
    answers = [call(calls, "a"), call(calls, "b")]
    await turn()
    line.under_way[0].set_exception(PeerUnreachable("broke"))

    for answer in answers:
        with pytest.raises(PeerUnreachable):
            await answer
    assert line.failures == [(PeerUnreachable, TRY_S)] * 2


async def test_a_bug_is_no_failure_of_the_peer(line: Line) -> None:
    line.raises = ZeroDivisionError()

    with pytest.raises(ZeroDivisionError):
        await call(queue(line), "a")
    assert line.failures == []


async def test_a_batch_is_cancelled_when_all_its_callers_are_gone(line: Line) -> None:
    calls = queue(line, concurrency=1)
    answers = [call(calls, "a"), call(calls, "b")]
    await turn()
    answers[0].cancel()
    assert not line.under_way[0].done()
    answers[1].cancel()
    assert line.under_way[0].done()
    gone = call(calls, "c")
    gone.cancel()
    call(calls, "d")
    await turn()

    assert line.batches == [["a", "b"], ["d"]]


async def test_calls_of_a_queue_that_is_closed_are_unreachable(line: Line) -> None:
    calls = queue(line, concurrency=1)
    answers = [call(calls, "a")]
    await turn()
    answers.append(call(calls, "b"))
    calls.close()

    for answer in answers:
        with pytest.raises(PeerUnreachable):
            await answer
    assert line.under_way[0].done()
