"""The shell around the core, on peers that are not there; clusters of real ones are in tests/e2e."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cluster import failure_signs, wire
from cluster.errors import MalformedPacket, PeerRefused, PeerTimeout, PeerUnreachable
from cluster.gossip import Gossip
from cluster.identity import Identity
from cluster.member import EventKind, Kind, Member, Packet, Phase, Send, State, Update
from cluster.swim import Settings
from cluster.view import View

ME = Member("127.0.0.1:1", "127.0.0.1:1", 1, 0, State.ALIVE, Phase.JOINING, 7)
OTHER = Member("127.0.0.1:2", "127.0.0.1:2", 1, 0, State.ALIVE, Phase.ACTIVE, 9)
IDENTITY = Identity(label="ours", storage_fingerprint=b"f")


class FakePeers:
    """Peers that are unreachable, or whatever a test makes of them."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.fails_with: Exception = PeerUnreachable("not there")
        self.forgotten: list[str] = []
        # Addresses that are not dialled before `dial_soon`, as after a dial in vain.
        self.paused: set[str] = set()
        # By address: who proves to be there when asked for the first time.
        self.proving: dict[str, Member] = {}
        self.sockets: dict[str, str] = {}  # of other processes of this daemon, by address

    async def call(self, address: str, _method: str, body: bytes, **_: object) -> bytes:
        self.called.append(address)
        if address in self.paused:
            raise PeerUnreachable("not dialled")
        _, packet, _ = wire.parse_request(body)
        member = self.proving.get(address)
        if member is None or packet.target != member.name:
            raise self.fails_with
        del self.proving[address]
        return wire.response(Packet(Kind.SYNC_REPLY, member, target=ME.name))

    async def keep_connected(self, _address: str, _lost: object) -> None:
        await asyncio.Event().wait()

    def socket_at(self, address: str) -> str:
        return self.sockets.get(address, "")

    def forget(self, address: str) -> None:
        self.forgotten.append(address)

    def dial_soon(self, address: str) -> None:
        self.paused.discard(address)


class Shell(Gossip):
    def __init__(self, seeds: Sequence[str], *, may_vouch: bool = True, max_members: int = 1000) -> None:
        self.peers = FakePeers()
        self.views: list[View] = []
        # The fake does what a Gossip asks of Peers.
        fake: Any = self.peers
        super().__init__(
            ME,
            IDENTITY,
            fake,
            seeds=seeds,
            on_view=self.views.append,
            may_vouch=may_vouch,
            settings=Settings(max_members=max_members),
        )

    def hear(self, packet: Packet) -> Packet | None:
        """Have a packet of a node that is where it says."""
        self.peers.proving[packet.sender.address] = packet.sender
        return self.hear_stranger(packet)

    async def meet(self, member: Member) -> None:
        """Have a member join."""
        self.hear(Packet(Kind.SYNC, member))
        await until(lambda: self.introductions.is_proven(self.swim.table, member))

    def hear_stranger(self, packet: Packet) -> Packet | None:
        answer = self.answer(wire.request(packet, IDENTITY.message()))
        assert isinstance(answer, bytes)
        return wire.parse_response(answer)[0]


@asynccontextmanager
async def gossiping(*seeds: str, may_vouch: bool = True, max_members: int = 1000) -> AsyncIterator[Shell]:
    one = Shell(seeds, may_vouch=may_vouch, max_members=max_members)
    one.start()
    try:
        yield one
    finally:
        await one.close()


async def until(is_met: Callable[[], bool], within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not is_met():
            await asyncio.sleep(0.005)


def timers() -> list[asyncio.TimerHandle]:
    loop: Any = asyncio.get_running_loop()
    return [timer for timer in loop._scheduled if not timer.cancelled()]


async def test_without_seeds_a_node_owns_everything_and_sets_no_timer() -> None:
    async with gossiping() as one:
        await until(lambda: len(one.views) == 1)

        assert one.view.is_alone
        assert one.view.is_active
        assert one.view.former == (None,)
        assert timers() == []
        assert one.peers.called == []


async def test_a_node_that_is_joined_late_has_not_stalled() -> None:
    async with gossiping() as one:
        await until(lambda: len(one.views) == 1)
        # As if it had been alone for an hour.
        one.swim._probe_s -= 3600.0
        answer = one.hear(Packet(Kind.SYNC, OTHER))
        await until(lambda: OTHER.name in one.view.ring.nodes)

        assert answer is not None
        assert one.swim.counters.stalls == 0
        assert one.swim.health_score == 0
        assert one.timer.max_lag_s < 1.0


async def test_a_stalled_loop_is_noticed_and_the_inbox_read_first() -> None:
    async with gossiping() as one:
        await one.meet(OTHER)
        assert one.timer._timer is not None
        one.timer._due_s -= 0.5
        one.timer._timer.cancel()
        one.timer._on_timer()
        deadline_s = one.timer._due_s
        one.hear(Packet(Kind.PING, OTHER, target=ME.name, sequence=1))

        assert one.swim.counters.stalls == 1
        assert one.timer._due_s == deadline_s == 0.0
        await until(lambda: one.timer._due_s > 0.0)


def owners(view: View) -> list[tuple[str, ...] | None]:
    return [None if ring is None else ring.nodes for ring in view.former]


async def test_what_came_to_this_node_by_a_new_ring_has_not_settled_before_it_is_told() -> None:
    async with gossiping() as one:
        await until(lambda: one.view.is_active)
        first = one.view
        one.settle(first)
        assert one.view.former == ()
        one.hear(Packet(Kind.SYNC, OTHER))
        await until(lambda: len(one.view.ring.nodes) == 2)
        assert owners(one.view) == [(ME.name,)]
        second = one.view
        one.hear(Packet(Kind.GOSSIP, OTHER._replace(incarnation=1, state=State.LEFT), target=ME.name))
        await until(lambda: len(one.view.ring.nodes) == 1)
        assert owners(one.view) == [(ME.name,), (ME.name, OTHER.name)]
        for former in (first, second):
            one.settle(former)
        assert len(one.view.former) == 2

        one.settle(one.view)
        assert one.view.former == ()
        assert one.views[-1] is one.view


async def test_a_node_that_joins_owned_nothing_before() -> None:
    async with gossiping("127.0.0.1:2") as one:
        one.hear(Packet(Kind.SYNC, OTHER))
        await until(lambda: one.view.is_active)

        assert one.view.ring.nodes == (ME.name, OTHER.name)
        assert owners(one.view)[0] is None
        assert not any(one.view.owns(str(number)) for number in range(9))


async def test_former_rings_are_kept_within_a_bound() -> None:
    async with gossiping() as one:
        await until(lambda: one.view.is_active)
        for number in range(8):
            name = f"10.0.0.{number}:1"
            one.hear(Packet(Kind.SYNC, OTHER._replace(name=name, address=name)))
            await until(lambda count=number: len(one.view.ring.nodes) == count + 2)  # type: ignore[misc]

        assert len(one.view.former) <= 4
        assert one.view.former[0] is None


async def test_when_no_seed_answers_a_node_serves_alone_and_goes_on_asking() -> None:
    async with gossiping("127.0.0.1:2", "127.0.0.1:3") as one:
        await until(lambda: one.view.is_active)

        assert one.view.is_alone
        await until(lambda: one.peers.called.count("127.0.0.1:3") >= 2)


@pytest.mark.parametrize(("sibling", "levels"), [("", ["WARNING"]), ("/s/peers-2", ["DEBUG"])])
async def test_the_silence_of_a_process_of_the_same_daemon_is_no_news(
    sibling: str, levels: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    async with gossiping("127.0.0.1:2") as one:
        one.peers.sockets = {"127.0.0.1:2": sibling}
        await until(lambda: one.view.is_active)

    found = [record.levelname for record in caplog.records if record.msg == "no_seed_answers"]
    assert found == levels


@pytest.mark.parametrize("seed", ["a..b:80", f"{'x' * 70}.local:80"])
async def test_a_seed_that_is_no_name_does_not_keep_a_node_from_joining(seed: str) -> None:
    async with gossiping(seed, "127.0.0.1:2") as one:
        await until(lambda: one.peers.called != [])
        assert set(one.peers.called) == {"127.0.0.1:2"}
        await until(lambda: one.view.is_active)


async def test_another_sign_while_a_member_is_dialled_leads_to_another_dial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dialled: list[str] = []

    async with gossiping() as one:

        async def is_refused(address: str, _: str) -> bool:
            dialled.append(address)
            if len(dialled) == 1:
                # A process that ends may close its connections before its port.
                one.probe(OTHER.name)
            return len(dialled) > 1

        monkeypatch.setattr(failure_signs, "is_refused", is_refused)
        # Its answers get lost, which is no sign of a connection.
        one.peers.fails_with = PeerTimeout("no answer in time")
        one.hear(Packet(Kind.SYNC, OTHER))
        one.probe(OTHER.name)
        await until(lambda: any(timed.event.kind is EventKind.DEAD for timed in one.events))

        assert dialled == [OTHER.address] * 2
        assert next(t.event for t in one.events if t.event.kind is EventKind.DEAD).evidence == "refused"
        await until(lambda: not one._signs._dials)


async def test_a_member_of_which_there_was_one_sign_is_dialled_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dialled: list[str] = []

    async def is_refused(address: str, _: str) -> bool:
        dialled.append(address)
        return False

    monkeypatch.setattr(failure_signs, "is_refused", is_refused)
    async with gossiping() as one:
        one.peers.fails_with = PeerTimeout("no answer in time")
        one.hear(Packet(Kind.SYNC, OTHER))
        one.probe(OTHER.name)
        await until(lambda: not one._signs._dials)

        assert dialled == [OTHER.address]


async def test_unknown_nodes_and_those_that_are_gone_are_not_dialled() -> None:
    async with gossiping() as one:
        one.probe("127.0.0.1:99")
        await until(lambda: not one._signs._dials)

        assert not one.events


async def test_a_packet_of_another_cluster_is_refused_and_a_refusal_logged_now_and_then(
    caplog: pytest.LogCaptureFixture,
) -> None:
    foreign = Identity(label="theirs", storage_fingerprint=b"f")
    async with gossiping("127.0.0.1:2") as one:
        one.peers.fails_with = PeerRefused("another cluster's label")
        for _ in range(3):
            answer = one.answer(wire.request(Packet(Kind.SYNC, OTHER), foreign.message()))
        await until(lambda: one.peers.called != [])

        assert isinstance(answer, bytes)
        assert "'theirs' on the other" in wire.parse_response(answer)[2]
        assert len(one.swim.table) == 1
        await until(lambda: {"peer_refused", "peer_refuses_us"} <= {one.message for one in caplog.records})
        assert [record.message for record in caplog.records].count("peer_refused") == 1


async def test_a_bug_in_holding_a_connection_is_logged_and_the_node_goes_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(FakePeers, "keep_connected", fail)
    async with gossiping() as one:
        one.hear(Packet(Kind.SYNC, OTHER))
        await until(lambda: "gossip_failed" in [record.message for record in caplog.records])

        assert one.hear(Packet(Kind.PING, OTHER, target=ME.name, sequence=1)) is not None


async def test_garbage_is_malformed() -> None:
    async with gossiping() as one:
        with pytest.raises(MalformedPacket):
            one.answer(b"\xff\xff")


async def test_nothing_is_sent_after_the_end() -> None:
    async with gossiping() as one:
        await one.meet(OTHER)
        await one.announce_left()
        called = len(one.peers.called)
        one.hear(Packet(Kind.GOSSIP, OTHER._replace(incarnation=5), target=ME.name))
        one.probe(OTHER.name)
        await asyncio.sleep(0.05)

        assert called >= 1
        assert len(one.peers.called) == called
        assert timers() == []


async def test_a_member_that_answers_after_a_lost_packet_is_told_of() -> None:
    async with gossiping() as one:
        await one.meet(OTHER)
        heard: list[str] = []
        one.on_answering = heard.append
        ping = Send(OTHER.address, Packet(Kind.PING, ME, target=OTHER.name, sequence=5))
        for _ in range(2):
            # The shell's own packets have found no peer, so only the second answer follows another.
            heard.clear()
            one.peers.proving[OTHER.address] = OTHER
            await one._deliver(ping)
        assert heard == []
        one.peers.fails_with = PeerTimeout("no answer in time")
        await one._deliver(ping)
        one.peers.proving[OTHER.address] = OTHER
        await one._deliver(ping)

        assert heard == [OTHER.name]


async def test_the_name_at_an_address_is_that_of_the_live_member_there() -> None:
    gone = OTHER._replace(name="former.example:1", address="10.0.0.5:1")
    there = OTHER._replace(name="present.example:1", address="10.0.0.5:1")
    async with gossiping("127.0.0.1:3") as one:
        await one.meet(gone)
        one.hear(Packet(Kind.GOSSIP, gone._replace(state=State.DEAD), target=ME.name))
        await one.meet(there)

        assert one.host_at("10.0.0.5:1") == "present.example"
        assert one.host_at("127.0.0.1:3") == "127.0.0.1"
        assert one.host_at("10.0.0.9:1") == "10.0.0.9"


def made_up(count: int) -> list[Member]:
    return [
        OTHER._replace(name=f"127.0.0.2:{n}", address=f"127.0.0.2:{n}", instance=n) for n in range(1, count)
    ]


async def test_a_stranger_is_answered_and_nothing_that_it_says_is_believed() -> None:
    async with gossiping() as one:
        await until(lambda: one.view.is_active)
        liar = OTHER._replace(address="127.0.0.1:3")
        claims = tuple(map(Update, made_up(5)))
        answer = one.hear_stranger(Packet(Kind.SYNC, liar, updates=claims, table=claims))
        await until(lambda: one.introductions.failed == 1)

        assert answer is not None
        assert answer.kind is Kind.SYNC_REPLY
        assert [member.name for member in one.swim.table] == [ME.name]
        assert one.peers.called == ["127.0.0.1:3"]
        assert one.peers.forgotten == ["127.0.0.1:3"]


async def test_a_process_that_was_dialled_in_vain_before_its_start_proves_itself_at_once() -> None:
    async with gossiping(may_vouch=False) as one:
        await until(lambda: one.view.is_active)
        one.peers.paused.add(OTHER.address)

        await one.meet(OTHER)

        assert one.introductions.failed == 0


async def test_a_member_that_vouches_is_believed() -> None:
    async with gossiping() as one:
        await one.meet(OTHER)
        called = len(one.peers.called)
        friends = tuple(map(Update, made_up(200)))
        request = wire.request(Packet(Kind.SYNC_PUSH, OTHER, table=friends), IDENTITY.message())
        answer = one.answer(request)
        assert not isinstance(answer, bytes)
        await answer

        assert len(one.swim.table) == 2 + len(friends)
        assert {*one.peers.called[called:]} <= {friend.member.address for friend in friends} | {OTHER.address}


async def test_without_a_proof_each_process_is_asked_itself_a_few_at_once() -> None:
    async with gossiping(may_vouch=False) as one:
        await until(lambda: one.view.is_active)
        await one.meet(OTHER)
        claims = made_up(300)
        one.peers.proving = {claims[7].address: claims[7]}
        request = wire.request(
            Packet(Kind.SYNC_PUSH, OTHER, table=tuple(map(Update, claims))), IDENTITY.message()
        )
        answer = one.answer(request)
        assert not isinstance(answer, bytes)
        await answer
        assert len(one.introductions._asked) <= 8
        await until(lambda: not one.introductions)

        assert {member.name for member in one.swim.table} == {ME.name, OTHER.name, claims[7].name}
        assert one.introductions.failed == len(claims) - 1


async def test_a_table_beyond_the_bound_and_too_many_tables_are_refused() -> None:
    async with gossiping(max_members=98) as one:
        await one.meet(OTHER)
        large = Packet(Kind.SYNC_PUSH, OTHER, table=tuple(map(Update, made_up(100))))
        with pytest.raises(MalformedPacket, match="more than 98 members"):
            one.answer(wire.request(large, IDENTITY.message()))
        large = large._replace(table=large.table[:98])
        answers = [one.answer(wire.request(large, IDENTITY.message())) for _ in range(9)]
        outcomes = await asyncio.gather(*answers, return_exceptions=True)  # type: ignore[arg-type]

        assert [str(outcome) for outcome in outcomes if isinstance(outcome, Exception)] == [
            "too many tables at once"
        ]
        assert one._tables_waiting == 0


async def test_a_process_with_this_nodes_name_cannot_make_it_leave_without_a_proof() -> None:
    async with gossiping(may_vouch=False) as one:
        await until(lambda: one.view.is_active)
        rival = ME._replace(generation=5, instance=2**62, phase=Phase.ACTIVE)
        for _ in range(3):
            one.hear_stranger(Packet(Kind.GOSSIP, rival._replace(generation=one.swim.me.generation + 5)))

        assert one.swim.me.phase is Phase.ACTIVE
