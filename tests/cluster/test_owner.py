"""One peer's record, without a peer: `forward` and `notify` do as a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from aio.later import Later, begun
from aio.tasks import Tasks
from cluster import owner as owners
from cluster.errors import ClusterError, PeerSkipped, PeerTimeout, PeerUnreachable
from cluster.owner import Owner
from cluster.peerpb import peer_pb2 as pb
from cluster.timing import TRY_S

ADDRESS = "10.0.0.1:1"


class FakeStream:
    def __init__(self, address: str = ADDRESS) -> None:
        self.address = address
        self.is_open = True
        self.is_ended = False

    def end(self) -> None:
        self.is_ended = True


class Sender:
    """What an Owner sends with."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.notices: list[str] = []
        self.fails_with: Exception | None = None
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.tasks = Tasks("answer")
        self.answered_calls = 0
        self.failures: list[type[ClusterError]] = []

    def send(self, items: Sequence[pb.Item], timeout_s: float) -> Later[Sequence[pb.Answer]]:
        assert timeout_s <= TRY_S
        self.batches.append([item.method for item in items])
        return begun(self.answers(items), self.tasks)

    def answered(self, count: int) -> None:
        self.answered_calls += count

    def failed(self, failure: ClusterError, try_s: float) -> None:
        assert try_s > 0
        self.failures.append(type(failure))

    async def answers(self, items: Sequence[pb.Item]) -> Sequence[pb.Answer]:
        await self.may_answer.wait()
        if self.fails_with is not None:
            raise self.fails_with
        return [pb.Answer(text=item.method) for item in items]

    async def notify(self, tokens: Sequence[str]) -> Sequence[None]:
        self.notices += tokens
        if self.fails_with is not None:
            raise self.fails_with
        return [None] * len(tokens)


@pytest.fixture
def sender() -> Sender:
    return Sender()


@pytest.fixture
async def owner(sender: Sender) -> Owner:
    return Owner(sender, sender.notify)


async def ask(
    owner: Owner, method: str = "Get", *, is_write: bool = False, try_s: float = TRY_S
) -> pb.Answer:
    return await owner.forward(pb.Item(method=method), is_write=is_write, try_s=try_s)


async def test_a_read_and_a_write_never_share_a_batch(owner: Owner, sender: Sender) -> None:
    sender.may_answer.clear()
    calls = [
        asyncio.create_task(ask(owner, kind, is_write=kind == "write")) for kind in ("read", "write") * 4
    ]
    await asyncio.sleep(0.01)
    sender.may_answer.set()
    answers = await asyncio.gather(*calls)

    assert sender.answered_calls == 8
    assert all(len(set(batch)) == 1 for batch in sender.batches)
    assert len(sender.batches) < 8
    assert [answer.text for answer in answers] == ["read", "write"] * 4


async def test_a_batch_that_fails_is_each_items_failure(owner: Owner, sender: Sender) -> None:
    sender.fails_with = PeerUnreachable("broke")

    with pytest.raises(PeerUnreachable):
        await ask(owner)
    assert isinstance(await owner.notify("t", tell_s=5.0), PeerUnreachable)


async def test_a_call_that_shares_a_batch_of_a_slow_peer_times_out(owner: Owner, sender: Sender) -> None:
    sender.may_answer.clear()
    first, second = (asyncio.create_task(ask(owner, try_s=0.01)) for _ in range(2))

    for call in (first, second):
        with pytest.raises(PeerTimeout):
            await call
    assert sender.failures == [PeerTimeout] * 2


async def test_a_bug_is_no_failure_of_the_peer(owner: Owner, sender: Sender) -> None:
    sender.fails_with = ZeroDivisionError()

    with pytest.raises(ZeroDivisionError):
        await ask(owner)


async def test_a_call_that_finds_too_many_waiting_is_skipped(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = owners.BatchLimits(max_waiting=1, concurrency=1, is_eager=True)
    monkeypatch.setattr(owners, "_BATCHES", limits)
    owner = Owner(sender, sender.notify)
    sender.may_answer.clear()
    calls = []
    for _ in range(2):
        calls.append(asyncio.create_task(ask(owner)))
        await asyncio.sleep(0.01)

    with pytest.raises(PeerSkipped):
        await ask(owner)
    await owner.close()
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


async def test_calls_to_a_peer_that_has_left_are_unreachable(owner: Owner, sender: Sender) -> None:
    sender.may_answer.clear()
    # One in each of the two batches that may be under way, and two that wait.
    calls = []
    for _ in range(4):
        calls.append(asyncio.create_task(ask(owner)))
        await asyncio.sleep(0.01)
    assert len(sender.batches) == 2
    await owner.close()
    failures = await asyncio.gather(*calls, return_exceptions=True)

    assert all(isinstance(failure, PeerUnreachable) for failure in failures)
    assert not sender.tasks.running()


async def test_a_caller_that_is_cancelled_is_cancelled(owner: Owner, sender: Sender) -> None:
    sender.may_answer.clear()
    call = asyncio.create_task(ask(owner))
    await asyncio.sleep(0.01)
    call.cancel()

    with pytest.raises(asyncio.CancelledError):
        await call


async def test_tokens_to_drop_are_sent(owner: Owner, sender: Sender) -> None:
    assert await owner.notify("t", tell_s=5.0) is None
    assert sender.notices == ["t"]


def give_back(owner: Owner, *streams: FakeStream) -> None:
    for stream in streams:
        # The fake does what an Owner asks of a stream.
        one: Any = stream
        owner.give_back(one)


async def test_the_stream_that_was_used_last_is_used_next(owner: Owner) -> None:
    streams = [FakeStream(), FakeStream()]
    give_back(owner, *streams)

    assert [owner.take_stream(ADDRESS) for _ in range(3)] == [streams[1], streams[0], None]


async def test_a_stream_that_was_closed_or_leads_to_another_address_is_not_used(owner: Owner) -> None:
    good, closed, moved = FakeStream(), FakeStream(), FakeStream("10.0.0.2:1")
    closed.is_open = False
    give_back(owner, good, closed, moved)

    assert owner.take_stream(ADDRESS) is good


async def test_only_streams_that_were_idle_for_long_are_ended(owner: Owner) -> None:
    old, young = FakeStream(), FakeStream()
    give_back(owner, old, young)
    # As if it had been given back half a minute earlier.
    since_s, stream = owner._idle[0]
    owner._idle[0] = (since_s - 30.0, stream)
    owner.end_idle(20.0)

    assert (old.is_ended, young.is_ended) == (True, False)
    assert owner.take_stream(ADDRESS) is young


async def test_a_record_that_is_closed_ends_its_streams(owner: Owner) -> None:
    stream = FakeStream()
    give_back(owner, stream)
    await owner.close()

    assert stream.is_ended
