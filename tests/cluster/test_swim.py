"""The rules of membership, one node at a time; whole clusters are in tests/simulation."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.member import Event, EventKind, Kind, Member, Packet, Phase, Send, State, Update
from cluster.swim import Settings, Swim

NOW_S = 100.0
# No traffic but what a test asks for.
QUIET = Settings(
    probe_interval_s=1000.0,
    sync_interval_s=1e6,
    heal_interval_s=1e6,
    suspicion_factor=0.004,
    early_probes=0.0,
)


def member(name: str, *, state: State = State.ALIVE) -> Member:
    return Member(name, f"{name}:1", 7, 0, state, Phase.ACTIVE, sum(name.encode()))


ME, A, B, C, D = map(member, ("me", "a", "b", "c", "d"))


def swim(*others: Member, me: Member = ME, settings: Settings = QUIET, seed: int = 1) -> Swim:
    """A node that knows these others and has nothing left to say."""
    one = Swim(me, settings=settings, rng=Random(seed), now=NOW_S)
    for other in others:
        one.receive(gossip(A, Update(other)) if A in others else gossip(other), now=NOW_S)
    while one._updates:
        one._updates.take(16, max_sends=1)
    one._gossip_s = math.inf
    one.take()
    return one


def gossip(sender: Member, *updates: Update, ring_hash: int = 0) -> Packet:
    return Packet(Kind.GOSSIP, sender, target="me", ring_hash=ring_hash, updates=updates)


def suspected(about: Member, *accusers: str, is_refused: bool = False) -> tuple[Update, ...]:
    suspect = about._replace(state=State.SUSPECT)
    return tuple(Update(suspect, accuser, is_refused) for accuser in accusers)


def sent(one: Swim, kind: Kind | None = None) -> list[Send]:
    sends, _ = one.take()
    return [send for send in sends if kind in {None, send.packet.kind}]


def emitted(one: Swim) -> list[tuple[EventKind, str]]:
    _, events = one.take()
    return [(event.kind, event.member.name) for event in events]


def event_of(one: Swim, kind: EventKind) -> Event:
    _, events = one.take()
    return next(event for event in events if event.kind is kind)


def state_of(one: Swim, name: str) -> State:
    held = one.table.get(name)
    assert held is not None
    return held.state


def told(one: Swim) -> list[Update]:
    return one._updates.take(16, max_sends=99)


# -- claims


def test_a_newcomer_is_told_to_the_others() -> None:
    one = swim(A)
    one.receive(gossip(A, Update(B)), now=NOW_S)

    assert emitted(one) == [(EventKind.JOINED, "b"), (EventKind.ACTIVE, "b")]
    assert told(one) == [Update(B)]
    assert one.next_deadline() <= NOW_S + 0.02


@pytest.mark.parametrize("older", [B, B._replace(state=State.DEAD), B._replace(incarnation=2)])
def test_older_news_change_nothing(older: Member) -> None:
    newer = B._replace(incarnation=3)
    one = swim(A, newer)
    one.receive(gossip(A, Update(older)), now=NOW_S)

    assert one.table.get("b") == newer
    assert emitted(one) == []
    assert told(one) == []


@pytest.mark.parametrize("state", [State.ALIVE, State.SUSPECT, State.DEAD])
def test_a_restarted_node_replaces_its_former_self_wherever_it_is(state: State) -> None:
    one = swim(A, B._replace(incarnation=99))
    one.receive(gossip(A, Update(B._replace(incarnation=99, state=state))), now=NOW_S)
    one.take()
    reborn = B._replace(generation=8, address="moved:1", phase=Phase.JOINING, instance=1)
    one.receive(gossip(reborn), now=NOW_S)

    assert one.table.get("b") == reborn
    assert emitted(one) == [(EventKind.JOINED, "b"), (EventKind.MOVED, "b")]
    assert one.counters.false_suspicions == 0
    one.receive(gossip(reborn._replace(incarnation=1, phase=Phase.ACTIVE)), now=NOW_S)
    assert emitted(one) == [(EventKind.ACTIVE, "b")]


def test_a_dead_member_that_was_not_known_is_remembered_without_an_event() -> None:
    one = swim(A)
    one.receive(gossip(A, Update(B._replace(state=State.DEAD))), now=NOW_S)
    assert (emitted(one), told(one)) == ([], [])
    one.receive(gossip(A, Update(B)), now=NOW_S)

    assert state_of(one, "b") is State.DEAD


def test_a_member_that_leaves_is_told_and_so_is_its_end() -> None:
    one = swim(A, B)
    one.receive(gossip(B._replace(incarnation=1, phase=Phase.LEAVING)), now=NOW_S)
    assert emitted(one) == [(EventKind.LEAVING, "b")]
    one.receive(gossip(B._replace(incarnation=2, phase=Phase.LEAVING, state=State.LEFT)), now=NOW_S)

    assert emitted(one) == [(EventKind.LEFT, "b")]
    assert one.table.live == 2


def test_no_more_updates_are_read_than_are_ever_sent() -> None:
    one = swim(A)
    one.receive(gossip(A, *(Update(member(f"n{number}")) for number in range(20))), now=NOW_S)

    assert len(one.table) == 2 + 16


def test_a_full_table_takes_no_more() -> None:
    one = swim(A, settings=Settings(max_members=2))
    one.receive(gossip(B), now=NOW_S)

    assert one.table.get("b") is None
    assert emitted(one) == []


def test_a_packet_for_another_node_at_this_address_is_not_answered() -> None:
    one = swim(A)

    assert one.receive(Packet(Kind.PING, B, target="former-tenant"), now=NOW_S) is None
    assert one.table.get("b") is None


STATES = st.builds(
    lambda base, generation, incarnation, state: base._replace(
        generation=generation, incarnation=incarnation, state=state
    ),
    st.sampled_from([B, C, D]),
    st.integers(1, 3),
    st.integers(0, 3),
    st.sampled_from(State),
)


@given(st.lists(STATES, max_size=12), st.randoms(use_true_random=False))
def test_claims_lead_to_the_same_in_any_order_and_however_often(claims: list[Member], rng: Random) -> None:
    """Merging is commutative, associative and idempotent."""
    shuffled = claims + rng.choices(claims, k=3) if claims else []
    rng.shuffle(shuffled)
    one, other = swim(A), swim(A)
    for claim in claims:
        one.receive(gossip(A, Update(claim, "x")), now=NOW_S)
    for claim in shuffled:
        other.receive(gossip(A, Update(claim, "x")), now=NOW_S)

    assert sorted(one.table) == sorted(other.table)
    assert one.table.members_hash == other.table.members_hash


NAMES = st.sampled_from(["me", "a", "b", "c", ""])
NUMBERS = st.integers(0, 3) | st.integers(0, 2**62 - 1)
ANY_MEMBERS = st.builds(
    Member,
    name=NAMES.filter(bool),
    address=st.sampled_from(["me:1", "a:1", "b:1", "nonsense"]),
    generation=st.integers(6, 8) | NUMBERS,
    incarnation=NUMBERS,
    state=st.sampled_from(State),
    phase=st.sampled_from(Phase),
    instance=st.sampled_from([ME.instance, 0, 2**63 - 1]),
)
ANY_UPDATES = st.lists(st.builds(Update, ANY_MEMBERS, NAMES, st.booleans()), max_size=4).map(tuple)
ANY_PACKETS = st.builds(
    Packet,
    kind=st.sampled_from(Kind),
    sender=ANY_MEMBERS,
    target=NAMES,
    sequence=NUMBERS,
    subject=NAMES,
    members_hash=NUMBERS,
    ring_hash=NUMBERS,
    updates=ANY_UPDATES,
    table=ANY_UPDATES,
)


@pytest.mark.fuzz
@given(st.lists(st.tuples(ANY_PACKETS, st.floats(0.0, 5.0), st.booleans()), max_size=12))
def test_nothing_that_the_network_sends_raises(packets: list[tuple[Packet, float, bool]]) -> None:
    one, now = swim(A, B, settings=Settings()), NOW_S
    for packet, pause_s, stalls in packets:
        now += pause_s
        if stalls:
            one.stalled(pause_s)
        one.receive(packet, now=now)
        one.refused(packet.sender.name, now=now)
        one.dropped(packet.subject, now=now)
        one.tick(now=now)
        assert one.table.get("me") is one.me
        assert one.health_score <= 8
        assert all(len(send.packet.updates) <= 16 for send in one.take()[0])
        assert one.next_deadline() > -math.inf


# -- probes


def probing(*others: Member) -> Swim:
    """A node that has just sent its first ping."""
    settings = Settings(sync_interval_s=1e6, heal_interval_s=1e6, early_probes=0.0)
    one = swim(*others, settings=settings)
    one.tick(now=NOW_S + 1.0)
    return one


def test_a_probe_that_is_answered_leads_to_nothing() -> None:
    one = probing(A)
    (ping,) = sent(one, Kind.PING)
    assert (ping.address, ping.packet.target) == ("a:1", "a")
    one.receive(Packet(Kind.ACK, A, target="me", sequence=ping.packet.sequence), now=NOW_S + 1.1)
    one.tick(now=NOW_S + 1.9)

    assert sent(one, Kind.PING_REQUEST) == []
    assert one.counters.probes_acked == 1


def test_others_are_asked_when_an_answer_is_late_and_the_member_suspected_when_none_comes() -> None:
    one = probing(A, B, C, D)
    (ping,) = sent(one, Kind.PING)
    one.tick(now=NOW_S + 1.5)
    requests = sent(one, Kind.PING_REQUEST)
    assert {request.packet.subject for request in requests} == {ping.packet.target}
    assert {request.packet.target for request in requests} == {"a", "b", "c", "d"} - {ping.packet.target}
    one.tick(now=NOW_S + 2.0)

    assert state_of(one, ping.packet.target) is State.SUSPECT
    assert one.counters.probes_failed == 1
    # No helper sent a NACK, so the fault may be this node's own.
    assert one.health_score == 3


def test_helpers_that_could_not_reach_it_either_clear_this_node_of_doubt() -> None:
    one = probing(A, B, C, D)
    (ping,) = sent(one, Kind.PING)
    one.tick(now=NOW_S + 1.5)
    for request in sent(one, Kind.PING_REQUEST):
        helper = one.table.get(request.packet.target)
        assert helper is not None
        one.receive(Packet(Kind.NACK, helper, target="me", sequence=request.packet.sequence), now=NOW_S + 1.9)
    one.receive(Packet(Kind.NACK, A, target="me", sequence=99), now=NOW_S + 1.9)
    one.tick(now=NOW_S + 2.0)

    assert state_of(one, ping.packet.target) is State.SUSPECT
    assert one.health_score == 0


def test_a_helpers_ping_is_answered_for_the_asker() -> None:
    one = swim(A, B)
    one.receive(Packet(Kind.PING_REQUEST, A, target="me", sequence=5, subject="b"), now=NOW_S)
    (ping,) = sent(one, Kind.PING)
    assert (ping.address, ping.packet.kind) == ("b:1", Kind.PING)
    one.receive(Packet(Kind.ACK, B, target="me", sequence=ping.packet.sequence), now=NOW_S + 0.1)
    (ack,) = sent(one, Kind.ACK)

    assert (ack.address, ack.packet.kind, ack.packet.sequence) == ("a:1", Kind.ACK, 5)


def test_a_helper_that_hears_nothing_says_so_in_time() -> None:
    one = swim(A, B)
    one.receive(Packet(Kind.PING_REQUEST, A, target="me", sequence=5, subject="b"), now=NOW_S)
    (ping,) = sent(one, Kind.PING)
    assert one.next_deadline() == NOW_S + 0.4
    one.tick(now=NOW_S + 0.4)
    (nack,) = sent(one, Kind.NACK)
    one.receive(Packet(Kind.ACK, B, target="me", sequence=ping.packet.sequence), now=NOW_S + 0.45)

    assert (nack.address, nack.packet.sequence) == ("a:1", 5)
    assert sent(one, Kind.ACK) == []


def test_an_answer_that_waited_in_a_stalled_helper_is_not_passed_on() -> None:
    one = swim(A, B)
    one.receive(Packet(Kind.PING_REQUEST, A, target="me", sequence=5, subject="b"), now=NOW_S)
    (ping,) = sent(one, Kind.PING)
    one.receive(Packet(Kind.ACK, B, target="me", sequence=ping.packet.sequence), now=NOW_S + 0.6)

    assert sent(one, Kind.ACK) == []


def test_plain_swim_knows_no_nacks() -> None:
    one = swim(A, B, settings=Settings(max_health_score=0, sync_interval_s=math.inf, heal_interval_s=1e6))
    one.receive(Packet(Kind.PING_REQUEST, A, target="me", sequence=5, subject="b"), now=NOW_S)
    one.tick(now=NOW_S + 0.4)

    assert sent(one, Kind.NACK) == []


def test_a_ping_request_for_an_unknown_node_and_one_too_many_are_ignored() -> None:
    one = swim(A, B)
    for sequence in range(300):
        one.receive(Packet(Kind.PING_REQUEST, A, target="me", sequence=sequence, subject="b"), now=NOW_S)
    one.receive(Packet(Kind.PING_REQUEST, A, target="me", sequence=1, subject="unknown"), now=NOW_S)

    assert len(one._relays) == len(sent(one, Kind.PING)) == 256


def test_a_member_is_probed_once_at_a_time_and_so_many_members_at_most() -> None:
    one = swim(*(member(f"n{number}") for number in range(100)))
    for now in (NOW_S, NOW_S + 1.0):
        for number in range(100):
            one.dropped(f"n{number}", now=now)
        one.tick(now=now + 0.1)

    assert len(one._probes) == len(sent(one, Kind.PING)) == 64


def test_a_member_whose_connection_was_lost_is_probed_at_once_and_not_too_often() -> None:
    one = swim(A)
    one.dropped("a", now=NOW_S)
    one.dropped("a", now=NOW_S + 0.01)
    assert NOW_S <= one.next_deadline() <= NOW_S + 0.02
    one.tick(now=NOW_S + 0.02)

    assert len(sent(one, Kind.PING)) == 1


def test_lost_connections_are_remembered_within_a_bound() -> None:
    one = swim(*(member(f"n{number}") for number in range(300)))
    for number in range(300):
        one.dropped(f"n{number}", now=NOW_S)

    assert len(one._drops_s) <= 256


def test_lost_connections_of_unknown_and_dead_nodes_are_ignored() -> None:
    one = swim(A, B._replace(state=State.DEAD))
    for name in ("unknown", "b"):
        one.dropped(name, now=NOW_S)
        one.refused(name, now=NOW_S)
    one.refused("me", now=NOW_S)
    one.tick(now=NOW_S + 0.1)

    assert (sent(one), emitted(one)) == ([], [])


def test_a_member_that_died_before_its_early_probe_is_not_probed() -> None:
    one = swim(A, B)
    one.dropped("b", now=NOW_S)
    one._early_s["unknown"] = NOW_S
    one.receive(gossip(A, Update(B._replace(state=State.DEAD))), now=NOW_S)
    one.tick(now=NOW_S + 0.1)

    assert sent(one, Kind.PING) == []


def test_a_probe_of_a_member_that_left_meanwhile_accuses_no_member() -> None:
    one = probing(A, B)
    (ping,) = sent(one, Kind.PING)
    gone = one.table.get(ping.packet.target)
    assert gone is not None
    one.receive(gossip(gone._replace(incarnation=1, state=State.LEFT)), now=NOW_S + 1.1)
    one.tick(now=NOW_S + 2.0)

    assert state_of(one, gone.name) is State.LEFT


def test_no_member_is_probed_when_all_others_are_gone() -> None:
    one = swim(A._replace(state=State.DEAD), settings=Settings(sync_interval_s=1e6, heal_interval_s=1e6))
    one.tick(now=NOW_S + 1.0)

    assert sent(one) == []


# -- suspicion


def test_a_suspect_that_does_not_refute_is_dead() -> None:
    one = swim(A, B, C, D)
    one.receive(gossip(A, *suspected(B, "a")), now=NOW_S)
    assert emitted(one) == [(EventKind.SUSPECT, "b")]
    one.receive(gossip(C, *suspected(B, "c")), now=NOW_S + 1.0)
    one.receive(gossip(D, *suspected(B, "d")), now=NOW_S + 1.0)
    one.tick(now=NOW_S + 3.9)
    assert state_of(one, "b") is State.SUSPECT
    one.tick(now=NOW_S + 4.0)
    death = event_of(one, EventKind.DEAD)

    assert (death.member.name, death.evidence, death.confirmations, death.seconds) == ("b", "silent", 2, 4.0)
    assert Update(B._replace(state=State.DEAD)) in told(one)
    assert one.counters.deaths == 1


def test_a_suspect_that_speaks_up_is_cleared() -> None:
    one = swim(A, B, C, D)
    one.receive(gossip(A, *suspected(B, "a")), now=NOW_S)
    one.take()
    one.receive(gossip(B._replace(incarnation=1)), now=NOW_S + 2.0)
    refuted = event_of(one, EventKind.REFUTED)
    one.tick(now=NOW_S + 60.0)

    assert refuted.seconds == 2.0
    assert one.counters.false_suspicions == 1
    assert state_of(one, "b") is State.ALIVE


def test_a_confirmation_is_passed_on_once() -> None:
    one = swim(A, B, C, D)
    one.receive(gossip(A, *suspected(B, "a")), now=NOW_S)
    told(one)
    for _ in range(2):
        one.receive(gossip(C, *suspected(B, "c")), now=NOW_S)
    heard = {update.accuser for update in told(one)}
    one.receive(gossip(D, Update(B._replace(state=State.SUSPECT))), now=NOW_S)

    assert heard == {"a", "c"}
    assert one._suspicions["b"].confirmations == 1


def test_a_suspect_is_told_first_that_it_is_one() -> None:
    one = swim(A, B, C, D)
    one.receive(gossip(A, *suspected(B, "a")), now=NOW_S)
    answer = one.receive(Packet(Kind.PING, B, target="me", sequence=1), now=NOW_S)

    assert answer is not None
    assert answer.updates[0] == Update(B._replace(state=State.SUSPECT), "me")


def test_plain_swim_knows_no_buddies() -> None:
    one = swim(A, B, C, D, settings=Settings(has_buddy_rule=False, sync_interval_s=1e6, heal_interval_s=1e6))
    one.receive(gossip(A, *suspected(B, "a")), now=NOW_S)
    answer = one.receive(Packet(Kind.PING, B, target="me", sequence=1), now=NOW_S)

    assert answer is not None
    assert answer.updates[0].accuser == "a"


def test_the_dead_are_told_that_they_are() -> None:
    one = swim(A, B._replace(state=State.DEAD))
    answer = one.receive(Packet(Kind.PING, B, target="me", sequence=1), now=NOW_S)

    assert answer is not None
    assert answer.updates[0] == Update(B._replace(state=State.DEAD))


def test_a_refused_connection_is_enough_among_three() -> None:
    one = swim(A, B)
    one.refused("b", now=NOW_S)
    one.tick(now=NOW_S + 0.5)

    assert event_of(one, EventKind.DEAD).evidence == "refused"


def test_among_more_a_second_member_must_be_refused_too() -> None:
    one = swim(A, B, C, D)
    one.refused("b", now=NOW_S)
    one.tick(now=NOW_S + 0.6)
    assert state_of(one, "b") is State.SUSPECT
    one.receive(gossip(A, *suspected(B, "a", is_refused=True)), now=NOW_S + 0.6)
    one.tick(now=NOW_S + 0.6)

    assert state_of(one, "b") is State.DEAD


def test_a_leaving_member_may_close_its_port() -> None:
    one = swim(A, B._replace(phase=Phase.LEAVING))
    one.refused("b", now=NOW_S)

    assert state_of(one, "b") is State.ALIVE


def test_some_who_hear_of_a_suspicion_look_for_themselves() -> None:
    settings = Settings(probe_interval_s=1000.0, sync_interval_s=1e6, heal_interval_s=1e6)
    one = swim(A, B, C, settings=settings)
    one.receive(gossip(A, *suspected(B, "a")), now=NOW_S)
    one.tick(now=NOW_S + 0.02)

    assert [ping.packet.target for ping in sent(one, Kind.PING)] == ["b"]


def test_in_a_sync_the_dead_are_suspects_until_they_have_had_a_chance_to_speak() -> None:
    one = swim(A, B, C, D)
    dead = Update(B._replace(state=State.DEAD))
    one.receive(Packet(Kind.SYNC_PUSH, A, target="me", table=(dead,)), now=NOW_S)
    assert state_of(one, "b") is State.SUSPECT
    began_s = one._suspicions["b"].began_s
    one.receive(Packet(Kind.SYNC_PUSH, A, target="me", table=(dead,)), now=NOW_S + 1.0)

    assert one._suspicions["b"].began_s == began_s


# -- about this node


@pytest.mark.parametrize("state", [State.SUSPECT, State.DEAD, State.LEFT])
def test_a_node_contradicts_what_is_said_of_it(state: State) -> None:
    one = swim(A)
    one.receive(gossip(A, Update(ME._replace(incarnation=4, state=state), "a")), now=NOW_S)

    assert one.me == ME._replace(incarnation=5)
    assert told(one) == [Update(one.me)]
    assert one.health_score == 1


def test_old_accusations_need_no_answer() -> None:
    one = swim(A, me=ME._replace(incarnation=5))
    one.receive(gossip(A, Update(ME._replace(incarnation=4, state=State.DEAD))), now=NOW_S)
    one.receive(gossip(A, Update(ME._replace(incarnation=5))), now=NOW_S)
    one.receive(gossip(A, Update(ME._replace(generation=6, incarnation=9, state=State.DEAD))), now=NOW_S)

    assert one.me.incarnation == 5
    assert told(one) == []


def test_a_node_stands_above_what_it_is_said_to_have_said() -> None:
    one = swim(A)
    one.receive(gossip(A, Update(ME._replace(incarnation=9))), now=NOW_S)

    assert one.me.incarnation == 10
    assert one.health_score == 0


def test_a_node_whose_clock_went_back_stands_above_its_former_self() -> None:
    one = swim(A)
    former = ME._replace(generation=50, instance=5, state=State.DEAD)
    one.receive(gossip(A, Update(former)), now=NOW_S)

    assert one.me.generation == 51
    assert one.me.phase is Phase.ACTIVE


def test_of_two_live_nodes_with_one_name_the_smaller_instance_leaves() -> None:
    one = swim(A)
    rival = ME._replace(generation=50, instance=ME.instance + 1)
    one.receive(gossip(rival), now=NOW_S)
    assert one.me.generation == 51
    one.receive(gossip(rival._replace(generation=52)), now=NOW_S)

    assert (EventKind.CONFLICT, "me") in emitted(one)
    assert one.me.phase is Phase.LEAVING


def test_the_greater_instance_keeps_the_name() -> None:
    one = swim(A)
    rival = ME._replace(generation=50, instance=ME.instance - 1)
    for number in range(3):
        one.receive(gossip(rival._replace(generation=50 + 2 * number)), now=NOW_S)

    assert one.me.phase is Phase.ACTIVE
    assert one.me.generation == 55


def test_rivals_are_remembered_within_a_bound() -> None:
    one = swim(A)
    for number in range(50):
        one.receive(gossip(ME._replace(generation=100 * number, instance=number)), now=NOW_S)

    assert len(one._rivals) <= 8


def test_its_own_packets_are_nothing_new() -> None:
    one = swim(A)

    assert one.receive(Packet(Kind.SYNC, ME), now=NOW_S) is None
    assert (one.take(), told(one)) == (([], []), [])


# -- health and stalls


def test_a_quick_answer_halves_the_doubt_and_a_slow_one_takes_a_point() -> None:
    one = probing(A)
    (ping,) = sent(one, Kind.PING)
    one.health_score = 8
    one.receive(Packet(Kind.ACK, A, target="me", sequence=ping.packet.sequence), now=NOW_S + 1.1)
    assert one.health_score == 4
    one.tick(now=NOW_S + 6.1)
    (ping,) = sent(one, Kind.PING)
    one.receive(Packet(Kind.ACK, A, target="me", sequence=ping.packet.sequence), now=NOW_S + 7.0)

    assert one.health_score == 3


def test_a_slow_answer_to_a_healthy_node_leaves_it_healthy() -> None:
    one = probing(A)
    (ping,) = sent(one, Kind.PING)
    one.receive(Packet(Kind.ACK, A, target="me", sequence=ping.packet.sequence), now=NOW_S + 1.8)

    assert one.health_score == 0


def test_doubt_makes_a_node_patient() -> None:
    one = probing(A, B)
    (first,) = sent(one, Kind.PING)
    one.health_score = 3
    one.tick(now=NOW_S + 2.0)
    (second,) = sent(one, Kind.PING)
    one.tick(now=NOW_S + 5.9)

    assert second.packet.target != first.packet.target
    assert sent(one, Kind.PING) == []
    assert state_of(one, second.packet.target) is State.ALIVE


def test_a_stall_moves_every_open_deadline() -> None:
    one = probing(A, B, C, D)
    (ping,) = sent(one, Kind.PING)
    target = ping.packet.target
    asker = next(each for each in (A, B, C, D) if each.name != target)
    suspect = next(each for each in (A, B, C, D) if each.name not in {target, asker.name})
    now = NOW_S + 1.0
    one.receive(Packet(Kind.PING_REQUEST, asker, target="me", sequence=5, subject=target), now=now)
    one.receive(gossip(asker, *suspected(suspect, asker.name)), now=now)
    deadline_s = one._suspicions[suspect.name].deadline_s
    one.stalled(0.6)
    sent(one)
    one.tick(now=NOW_S + 2.0)

    assert sent(one, Kind.PING_REQUEST) == []
    assert one._suspicions[suspect.name].deadline_s == pytest.approx(deadline_s + 0.6)
    assert one._relays == {} or all(relay.ends_s > NOW_S + 2.0 for relay in one._relays.values())
    assert state_of(one, target) is State.ALIVE
    assert one.health_score == 3
    assert one.counters.stalls == 1


# -- joining and leaving


def joining(*others: Member) -> Swim:
    return swim(*others, me=ME._replace(phase=Phase.JOINING))


def test_a_node_that_joins_asks_for_the_whole_table() -> None:
    one = joining()
    one.join(["x:1", "y:1"])

    assert [(send.address, send.packet.kind, send.packet.target) for send in sent(one)] == [
        ("x:1", Kind.SYNC, ""),
        ("y:1", Kind.SYNC, ""),
    ]


def test_a_sync_is_answered_with_the_table_where_hashes_differ() -> None:
    one = swim(A, B)
    same = one.receive(
        Packet(Kind.SYNC, A, target="me", members_hash=one.table.members_hash, ring_hash=one.table.ring_hash),
        now=NOW_S,
    )
    other = one.receive(Packet(Kind.SYNC, A, target="me", members_hash=1), now=NOW_S)

    assert same is not None
    assert same.table == ()
    assert other is not None
    assert {update.member.name for update in other.table} == {"me", "a", "b"}


def test_a_node_that_knows_more_than_the_reply_pushes_its_table() -> None:
    one = swim(A, B)
    one.receive(Packet(Kind.SYNC_REPLY, A, target="me", members_hash=1, updates=(Update(C),)), now=NOW_S)
    (push,) = sent(one)
    one.receive(Packet(Kind.SYNC_REPLY, A, target="me", members_hash=one.table.members_hash), now=NOW_S)

    assert (push.packet.kind, push.address) == (Kind.SYNC_PUSH, "a:1")
    assert {update.member.name for update in push.packet.table} == {"me", "a", "b", "c"}
    assert sent(one, Kind.SYNC_PUSH) == []
    assert one.counters.syncs == 2


@pytest.mark.parametrize("kind", [Kind.SYNC, Kind.SYNC_REPLY])
def test_a_node_that_was_found_owns_tokens_a_little_later(kind: Kind) -> None:
    one = joining()
    one.receive(Packet(kind, A, target=""), now=NOW_S)
    one.receive(Packet(kind, A, target=""), now=NOW_S + 0.2)
    one.tick(now=NOW_S + 0.29)
    assert not one.me.is_routable
    one.tick(now=NOW_S + 0.3)

    assert one.me.is_routable
    assert one.next_deadline() < math.inf


def test_a_node_owns_tokens_when_it_is_told_to_and_only_once() -> None:
    one = joining()
    one.activate(now=NOW_S)
    first = one.me
    one.activate(now=NOW_S)

    assert first.is_routable
    assert one.me == first


def test_a_node_that_leaves_tells_every_member_and_owns_nothing() -> None:
    one = swim(A, B, C)
    one.leave(now=NOW_S)
    one.leave(now=NOW_S)
    sends = sent(one)

    assert not one.me.is_routable
    assert {send.address for send in sends} == {"a:1", "b:1", "c:1"}
    assert len(sends) == 3
    assert all(send.packet.sender.phase is Phase.LEAVING for send in sends)


def test_in_a_large_cluster_a_leaver_tells_some() -> None:
    one = swim(*(member(f"n{number}") for number in range(50)))
    one.leave(now=NOW_S)

    assert len(sent(one)) == 3


def test_after_it_has_left_a_node_says_no_more_of_itself() -> None:
    one = swim(A, B)
    one.leave(now=NOW_S)
    one.left(now=NOW_S)
    one.left(now=NOW_S)
    sends = [send for send in sent(one) if send.packet.sender.state is State.LEFT]
    announce_left = one.me
    one.receive(gossip(A, Update(announce_left._replace(incarnation=99, state=State.DEAD))), now=NOW_S)

    assert len(sends) == 2
    assert one.me == announce_left


# -- gossip and repair


def test_news_go_to_a_few_until_they_were_sent_often_enough() -> None:
    one, now = swim(A, B, C, D), NOW_S
    one.receive(gossip(A, Update(member("new"))), now=now)
    packets = 0
    for _ in range(20):
        now += 0.2
        one.tick(now=now)
        packets += len(sent(one, Kind.GOSSIP))

    # 4 · ceil(log10(6 + 1)) sends.
    assert packets == 4
    assert one._gossip_s == math.inf


def test_one_that_died_lately_is_told_with_the_rest() -> None:
    one, now = swim(A, B), NOW_S
    one.receive(gossip(A, Update(B._replace(state=State.DEAD))), now=now)
    one.tick(now=now + 0.02)
    addresses = {send.address for send in sent(one, Kind.GOSSIP)}

    assert addresses == {"a:1", "b:1"}


def test_one_that_left_or_died_long_ago_is_told_nothing() -> None:
    one = swim(A, B, C)
    one.receive(gossip(A, Update(B._replace(state=State.DEAD))), now=NOW_S)
    one.receive(gossip(C._replace(incarnation=1, state=State.LEFT)), now=NOW_S + 20.0)
    told(one)
    one.take()
    one.receive(gossip(A, Update(D)), now=NOW_S + 40.0)
    for number in range(3):
        one.tick(now=NOW_S + 41.0 + number)

    assert {send.address for send in sent(one, Kind.GOSSIP)} <= {"a:1", "d:1"}


def test_updates_wait_until_there_is_a_member_to_send_them_to() -> None:
    one = swim()
    one.activate(now=NOW_S)
    one.leave(now=NOW_S)
    one.tick(now=NOW_S + 0.1)

    assert sent(one) == []
    assert one._gossip_s == math.inf


def test_another_ring_leads_to_a_sync_but_not_too_often() -> None:
    one = swim(A, B)
    for at_s in (0.0, 0.5, 1.0):
        one.receive(gossip(A, ring_hash=1), now=NOW_S + at_s)

    assert [send.address for send in sent(one, Kind.SYNC)] == ["a:1", "a:1"]


def test_rings_may_differ_while_news_are_under_way() -> None:
    one = swim(A, B)
    one.receive(gossip(A, Update(B), ring_hash=1), now=NOW_S)
    one.receive(gossip(A, Update(C), ring_hash=1), now=NOW_S)
    one.receive(gossip(A, ring_hash=1), now=NOW_S)

    assert sent(one, Kind.SYNC) == []


def test_hashes_are_compared_with_some_member_now_and_then() -> None:
    one = swim(A, settings=Settings(probe_interval_s=1000.0, heal_interval_s=1e6))
    one.tick(now=NOW_S + 10.0)
    assert len(sent(one, Kind.SYNC)) == 1
    one.tick(now=NOW_S + 19.0)
    assert sent(one, Kind.SYNC) == []
    one.tick(now=NOW_S + 20.0)

    assert len(sent(one, Kind.SYNC)) == 1


HEALING = Settings(probe_interval_s=1e6, sync_interval_s=1e6, forget_dead_s=100.0, forget_left_s=50.0)


def test_the_seeds_and_one_of_the_dead_are_tried_again() -> None:
    one = swim(A, B._replace(state=State.DEAD), C._replace(state=State.LEFT), settings=HEALING)
    one.tick(now=NOW_S + 15.0)

    assert one.wants_seeds
    assert [(send.address, send.packet.kind, send.packet.target) for send in sent(one)] == [
        ("b:1", Kind.SYNC, "")
    ]


def test_without_dead_the_seeds_are_tried_alone() -> None:
    one = swim(A, C._replace(state=State.LEFT), settings=HEALING)
    one.tick(now=NOW_S + 15.0)

    assert one.wants_seeds
    assert sent(one) == []


def test_in_a_large_cluster_three_look_for_what_was_lost() -> None:
    looked = 0
    for seed in range(100):
        one = swim(*(member(f"n{number}") for number in range(29)), settings=HEALING, seed=seed)
        one.tick(now=NOW_S + 15.0)
        looked += one.wants_seeds

    assert 3 <= looked <= 20


def test_the_gone_are_forgotten_in_their_time_or_when_there_are_too_many() -> None:
    one = swim(A, B._replace(state=State.DEAD), C._replace(state=State.LEFT), settings=HEALING)
    one.tick(now=NOW_S + 51.0)
    assert (one.table.get("b"), one.table.get("c")) == (B._replace(state=State.DEAD), None)
    one.tick(now=NOW_S + 101.0)
    assert one.table.get("b") is None

    few = swim(A, settings=Settings(probe_interval_s=1e6, sync_interval_s=1e6, max_gone=3))
    for number in range(10):
        few.receive(gossip(A, Update(member(f"n{number}", state=State.DEAD))), now=NOW_S)
    few.tick(now=NOW_S + 15.0)
    assert few.table.gone == ["n7", "n8", "n9"]


def test_a_public_address_survives_nodes_that_do_not_know_the_field() -> None:
    told = A._replace(public="clients:1")
    one = swim(B)

    # First by a node of an older release, which leaves the field out; then by the member itself.
    one.receive(gossip(B, Update(A)), now=NOW_S)
    one.receive(gossip(told), now=NOW_S)
    assert one.table.get("a") == told

    # A newer claim that an older node has passed on.
    one.receive(gossip(B, Update(A._replace(incarnation=1))), now=NOW_S)
    assert one.table.get("a") == told._replace(incarnation=1)

    # Another process of that name says it for itself.
    one.receive(gossip(A._replace(generation=8, instance=1)), now=NOW_S)
    held = one.table.get("a")
    assert held is not None
    assert not held.public
