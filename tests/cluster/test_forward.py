"""Forwarding against peers that answer as a test says; real ones are in tests/contract and tests/e2e."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from aio.deadline import NO_DEADLINE, Deadline
from aio.later import Later, begun
from aio.tasks import Tasks
from cluster.breaker import BreakerState
from cluster.errors import ClusterError, MalformedPacket, PeerSkipped, PeerTimeout, PeerUnreachable
from cluster.forward import Forwarder
from cluster.peerpb import peer_pb2 as pb
from cluster.ring import Ring
from cluster.timing import HALF_OPEN_S, TRY_S
from cluster.view import View

INSTANCE = 7
ME, B, C = "me:1", "b:1", "c:1"


def storage_now_us() -> int:
    return time.time_ns() // 1000


@dataclass
class Peer:
    """What one peer does, and what it has seen."""

    fails_with: type[ClusterError] | None = None
    is_slow: bool = False
    answers: list[pb.Answer] | None = None
    asked: int = 0
    streams: int = 0
    ended: int = 0
    tellings: int = 0
    told: list[str] = field(default_factory=list)
    instance: int = INSTANCE
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: Tasks = field(default_factory=lambda: Tasks("answer"))

    async def respond(self, timeout_s: float) -> None:
        if self.fails_with is not None:
            raise self.fails_with("as the test says")
        if self.is_slow:
            try:
                async with asyncio.timeout(timeout_s):
                    await self.may_answer.wait()
            except TimeoutError:
                raise PeerTimeout("no answer in time") from None


class FakeStream:
    def __init__(self, address: str, peer: Peer) -> None:
        self.address = address
        self.is_open = True
        self._peer = peer

    def ask(self, batch: bytes, *, timeout_s: float) -> Later[bytes]:
        return begun(self._answered(batch, timeout_s), self._peer.tasks)

    async def _answered(self, batch: bytes, timeout_s: float) -> bytes:
        self._peer.asked += 1
        try:
            await self._peer.respond(timeout_s)
        except BaseException:
            self.is_open = False
            raise
        items = pb.Batch.FromString(batch).items
        answers = [pb.Answer() for _ in items] if self._peer.answers is None else self._peer.answers
        return pb.Answers(answers=answers).SerializeToString()

    def end(self) -> None:
        self._peer.ended += 1


class FakePeers:
    def __init__(self, peers: dict[str, Peer]) -> None:
        self._peers = peers

    def open_stream(self, address: str, callee: str) -> FakeStream:
        assert callee
        self._peers[address].streams += 1
        return FakeStream(address, self._peers[address])

    async def call(
        self,
        address: str,
        _method: str,
        body: bytes,
        *,
        timeout_s: float,
        channel_kind: object,
        callee: str,
    ) -> bytes:
        assert channel_kind
        assert callee
        self._peers[address].tellings += 1
        await self._peers[address].respond(timeout_s)
        request = pb.InvalidateRequest.FromString(body)
        self._peers[address].told += request.tokens
        return pb.InvalidateResponse(instance=self._peers[address].instance).SerializeToString()


class Suspicious:
    def __init__(self) -> None:
        self.names: list[str] = []

    def probe(self, name: str) -> None:
        self.names.append(name)


@dataclass
class Setup:
    forwarder: Forwarder
    peers: dict[str, Peer]
    suspicious: Suspicious

    async def ask(
        self, name: str = B, *, left_s: float | None = None, try_s: float | None = None
    ) -> pb.Answer:
        return await self.forwarder.ask(
            name,
            pb.Item(method="Get"),
            is_write=False,
            deadline=NO_DEADLINE if left_s is None else Deadline.in_s(left_s),
            try_s=try_s,
        )

    async def tell(self, *keys: str, names: Sequence[str] = (B, C), timeout_s: float = 0.3) -> list[str]:
        return await self.forwarder.tell(dict.fromkeys(names, INSTANCE), keys, timeout_s=timeout_s)


def view(*ring: str, members: Sequence[str] = (B, C)) -> View:
    return View(me=ME, ring=Ring(ring), address_by_name={name: name for name in members})


@asynccontextmanager
async def forwarding() -> AsyncIterator[Setup]:
    peers = {B: Peer(), C: Peer()}
    # The fakes do what a Forwarder asks of Peers.
    fakes: Any = FakePeers(peers)
    forwarder = Forwarder(fakes, storage_now_us=storage_now_us)
    suspicious = Suspicious()
    forwarder.bind(lambda name: pb.Origin(callee=name), suspicious)
    forwarder.follow(view(ME, B, C))
    running = asyncio.create_task(forwarder.run())
    try:
        yield Setup(forwarder, peers, suspicious)
    finally:
        assert not running.done()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await forwarder.close()


async def until(is_met: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not is_met():
            await asyncio.sleep(0.01)


async def test_a_broken_connection_opens_the_breaker_and_the_next_call_is_not_sent() -> None:
    async with forwarding() as setup:
        setup.peers[B].fails_with = PeerUnreachable
        with pytest.raises(PeerUnreachable):
            await setup.ask()
        with pytest.raises(PeerSkipped):
            await setup.ask()

        assert setup.peers[B].asked == 1
        assert setup.suspicious.names == [B]
        assert setup.forwarder.breaker_states()[B] is BreakerState.OPEN


async def test_a_peer_that_is_back_is_asked_again() -> None:
    async with forwarding() as setup:
        setup.peers[B].fails_with = PeerUnreachable
        with pytest.raises(PeerUnreachable):
            await setup.ask()
        setup.peers[B].fails_with = None
        await until(lambda: setup.forwarder.breaker_states()[B] is BreakerState.CLOSED)

        assert (await setup.ask()).code == 0


async def test_a_peer_of_which_there_is_a_sign_is_asked_again_at_once() -> None:
    async with forwarding() as setup:
        setup.peers[B].fails_with = PeerUnreachable
        with pytest.raises(PeerUnreachable):
            await setup.ask()
        setup.forwarder.answers_again(B)
        await until(lambda: setup.peers[B].tellings == 1)
        assert setup.forwarder.breaker_states()[B] is BreakerState.OPEN
        setup.peers[B].fails_with = None
        began_s = time.monotonic()
        setup.forwarder.answers_again(B)
        await until(lambda: setup.forwarder.breaker_states()[B] is BreakerState.CLOSED)

        assert time.monotonic() - began_s < HALF_OPEN_S / 2
        assert (await setup.ask()).code == 0


async def test_a_call_with_nothing_to_fall_back_on_is_waited_for_and_keeps_no_other_waiting() -> None:
    async with forwarding() as setup:
        peer = setup.peers[B]
        peer.is_slow = True
        patient = [asyncio.create_task(setup.ask(try_s=5.0)) for _ in range(3)]
        await until(lambda: peer.asked == 3)
        await asyncio.sleep(2 * TRY_S)
        assert not any(task.done() for task in patient)
        peer.is_slow = False
        assert (await setup.ask()).code == 0
        peer.may_answer.set()

        assert [(await task).code for task in patient] == [0] * 3
        assert setup.forwarder.breaker_states()[B] is BreakerState.CLOSED


async def test_a_peer_that_is_slow_gets_a_quarter_of_a_second() -> None:
    async with forwarding() as setup:
        setup.peers[B].is_slow = True
        began_s = time.monotonic()
        with pytest.raises(PeerTimeout):
            await setup.ask()

        assert 0.2 < time.monotonic() - began_s < 1.0


async def test_callers_in_a_hurry_do_not_open_a_breaker() -> None:
    async with forwarding() as setup:
        setup.peers[B].is_slow = True
        for _ in range(5):
            with pytest.raises(PeerTimeout):
                await setup.ask(left_s=0.02)

        assert setup.forwarder.breaker_states()[B] is BreakerState.CLOSED


async def test_a_slow_peer_is_told_and_waited_for_though_it_is_not_asked() -> None:
    async with forwarding() as setup:
        peer = setup.peers[B]
        peer.is_slow = True
        for _ in range(3):
            with pytest.raises(PeerTimeout):
                await setup.ask()
        assert setup.forwarder.breaker_states()[B] is BreakerState.OPEN
        telling = asyncio.create_task(setup.tell("t", timeout_s=5.0))
        await until(lambda: setup.peers[C].told == ["t"])
        assert not telling.done()
        peer.may_answer.set()

        assert await telling == []
        assert peer.told == ["t"]


async def test_those_who_have_not_confirmed_in_time_are_named() -> None:
    async with forwarding() as setup:
        setup.peers[B].is_slow = True
        began_s = time.monotonic()

        assert await setup.tell("t") == [B]
        assert 0.25 < time.monotonic() - began_s < 1.0
        assert setup.peers[C].told == ["t"]
        setup.peers[C].fails_with = PeerUnreachable
        assert await setup.tell("t", "u") == [B, C]
        assert await setup.tell("t", names=["gone:1"]) == ["gone:1"]


async def test_without_tokens_a_peer_is_asked_whether_it_answers() -> None:
    async with forwarding() as setup:
        setup.peers[C].fails_with = PeerUnreachable

        assert await setup.tell() == [C]
        assert setup.peers[B].told == []


async def test_many_tokens_are_told_and_none_twice() -> None:
    async with forwarding() as setup:
        tokens = [str(number) for number in range(2500)]

        assert await setup.tell(*tokens, timeout_s=5.0) == []
        assert setup.peers[B].told == setup.peers[C].told == tokens


async def test_a_peer_that_confirms_is_asked_again_at_once() -> None:
    async with forwarding() as setup:
        setup.peers[B].fails_with = PeerUnreachable
        with pytest.raises(PeerUnreachable):
            await setup.ask()
        setup.peers[B].fails_with = None
        assert await setup.tell("t") == []

        assert (await setup.ask()).code == 0


async def test_only_members_are_known() -> None:
    async with forwarding() as setup:
        assert setup.forwarder.knows(B)
        assert not setup.forwarder.knows("stranger:1")
        setup.forwarder.follow(view(ME, members=[]))
        assert not setup.forwarder.knows(B)


async def test_a_peer_whose_connection_broke_is_told_all_the_same() -> None:
    async with forwarding() as setup:
        peer = setup.peers[B]
        peer.fails_with = PeerUnreachable
        with pytest.raises(PeerUnreachable):
            await setup.ask()
        # Only this node's connection had broken.
        peer.fails_with = None

        assert await setup.tell("t") == []
        assert peer.told == ["t"]


async def test_only_the_process_that_was_meant_can_confirm() -> None:
    async with forwarding() as setup:
        setup.peers[B].instance = INSTANCE + 1

        assert await setup.tell("t") == [B]
        assert await setup.tell("t", "u") == [B]


async def test_time_outs_are_counted_in_a_row() -> None:
    async with forwarding() as setup:
        peer = setup.peers[B]
        for _ in range(5):
            peer.is_slow = True
            assert await setup.tell("t", timeout_s=0.1) == [B]
            peer.is_slow = False
            assert await setup.tell("t") == []

        assert setup.forwarder.breaker_states()[B] is BreakerState.CLOSED


async def test_a_new_peer_may_be_asked_while_an_old_ones_stream_ends() -> None:
    async with forwarding() as setup:
        await setup.ask(B)
        setup.forwarder.follow(view(ME, C, members=[C]))
        ended = setup.peers[B]
        async with asyncio.timeout(5):
            while not ended.ended:
                with suppress(ClusterError):
                    await setup.ask(C)
                await asyncio.sleep(0.001)

        assert (await setup.ask(C)).code == 0
        await until(lambda: B not in setup.forwarder.breaker_states())


async def test_a_stream_is_used_again_unless_the_peer_has_moved() -> None:
    async with forwarding() as setup:
        for _ in range(3):
            await setup.ask(B)
        assert setup.peers[B].streams == 1
        setup.forwarder.follow(View(me=ME, ring=Ring([ME, B]), address_by_name={B: C}))
        await setup.ask(B)

        assert (setup.peers[B].streams, setup.peers[C].streams) == (1, 1)


async def test_a_peer_that_is_no_member_is_unreachable() -> None:
    async with forwarding() as setup:
        with pytest.raises(PeerUnreachable, match="no member"):
            await setup.ask("unknown:1")


@pytest.mark.parametrize("answers", [[], [pb.Answer(), pb.Answer()]])
async def test_a_wrong_number_of_answers_is_malformed(answers: list[pb.Answer]) -> None:
    async with forwarding() as setup:
        setup.peers[B].answers = answers

        with pytest.raises(MalformedPacket, match="answers to 1 items"):
            await setup.ask()


async def test_the_owners_own_error_is_an_answer() -> None:
    async with forwarding() as setup:
        setup.peers[B].answers = [pb.Answer(code=5, text="gone")]

        assert (await setup.ask()).text == "gone"
        assert setup.forwarder.breaker_states()[B] is BreakerState.CLOSED


async def test_a_write_may_be_repeated_when_the_owner_has_stopped_trying() -> None:
    async with forwarding() as setup:
        setup.peers[B].fails_with = PeerUnreachable
        item = pb.Item(method="Abandon")
        with pytest.raises(PeerUnreachable):
            await setup.forwarder.ask(B, item, is_write=True, deadline=NO_DEADLINE)
        assert storage_now_us() < item.deadline_us
        await setup.forwarder.wait_until_expired(item)
        assert storage_now_us() >= item.deadline_us
        began_s = time.monotonic()
        await setup.forwarder.wait_until_expired(item)

        assert time.monotonic() - began_s < 0.1


async def test_alone_it_sets_no_timer() -> None:
    fakes: Any = FakePeers({})
    forwarder = Forwarder(fakes, storage_now_us=storage_now_us)
    forwarder.follow(view(ME, members=[]))
    running = asyncio.create_task(forwarder.run())
    await asyncio.sleep(0.05)
    loop: Any = asyncio.get_running_loop()

    assert not [timer for timer in loop._scheduled if not timer.cancelled()]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
