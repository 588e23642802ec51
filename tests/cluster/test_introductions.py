from __future__ import annotations

from cluster.introductions import MAX_ASKED, Introductions
from cluster.member import Kind, Member, Packet, Phase, State, Update
from cluster.table import Base, Table


def member(name: str, **fields: object) -> Member:
    return Member(name, f"{name}:1", 7, 0, State.ALIVE, Phase.ACTIVE, sum(name.encode()))._replace(**fields)  # type: ignore[arg-type]


ME, A, B, C = map(member, ("me", "a", "b", "c"))


def table(*members: Member) -> Table:
    one = Table(Base())
    for each in (ME, *members):
        one.put(each)
    return one


def introductions(*, may_vouch: bool = True, forbidden: str = "", max_candidates: int = 100) -> Introductions:
    return Introductions(
        "me",
        may_vouch=may_vouch,
        may_dial=lambda address: address != forbidden,
        max_candidates=max_candidates,
    )


def gossip(sender: Member, *members: Member) -> Packet:
    return Packet(Kind.GOSSIP, sender, updates=tuple(map(Update, members)))


def asked(one: Introductions) -> list[str]:
    return [candidate.name for candidate in one.next()]


def test_a_process_is_proven_where_it_is_held_and_while_it_lives() -> None:
    one, held = introductions(), table(A, B._replace(state=State.DEAD))

    assert one.is_proven(held, A._replace(incarnation=9, phase=Phase.LEAVING))
    for claim in (
        A._replace(instance=1),
        A._replace(generation=8),
        A._replace(address="x:1"),
        B._replace(incarnation=1),
        C,
    ):
        assert not one.is_proven(held, claim)


def test_a_senders_own_word_makes_it_a_candidate_only() -> None:
    one = introductions()

    assert one.sift(gossip(C, A), table(), now=0.0) is None
    assert asked(one) == ["c"]


def test_an_answer_from_where_the_sender_says_it_is_proves_it() -> None:
    one = introductions()
    sifted = one.sift(gossip(C, A), table(), now=0.0, dialled="c:1")

    assert sifted == gossip(C, A)
    assert one.sift(gossip(C, A), table(), now=0.0, dialled="another:1") is None
    assert asked(one) == ["c"]


def test_what_a_member_says_of_others_is_believed_where_packets_are_signed() -> None:
    held = table(A)

    assert introductions().sift(gossip(A, B, C), held, now=0.0) == gossip(A, B, C)
    one = introductions(may_vouch=False)
    assert one.sift(gossip(A, B, A, C), held, now=0.0) == gossip(A, A)
    assert asked(one) == ["b", "c"]


def test_addresses_that_may_not_be_a_nodes_are_never_asked() -> None:
    for may_vouch in (True, False):
        one = introductions(may_vouch=may_vouch, forbidden="b:1")

        assert one.sift(gossip(A, B), table(A), now=0.0) == gossip(A)
        assert one.sift(gossip(B), table(A), now=0.0) is None
        assert asked(one) == []


def test_the_gone_and_old_claims_are_no_candidates() -> None:
    one = introductions(may_vouch=False)
    dead, moved = B._replace(state=State.DEAD), A._replace(address="x:1", generation=6)

    assert one.sift(gossip(A, dead, moved), table(A), now=0.0) == gossip(A)
    assert one.sift(gossip(dead), table(A), now=0.0) is None
    assert asked(one) == []


def test_few_are_asked_at_once_and_those_that_have_called_first() -> None:
    one = introductions(may_vouch=False, max_candidates=20)
    others = [member(f"n{number}") for number in range(40)]
    one.sift(gossip(A, *others), table(A), now=0.0)
    assert len(one) == 20
    first = one.next()
    assert [candidate.name for candidate in first] == [f"n{number}" for number in range(MAX_ASKED)]
    one.sift(gossip(C), table(A), now=0.0)
    assert asked(one) == []
    one.done(first[0], is_proven=False, now=0.0)

    assert asked(one) == ["c"]
    assert one.failed == 1


def test_the_last_waits_no_longer_when_one_calls_itself_and_there_is_no_room() -> None:
    one = introductions(may_vouch=False, max_candidates=2)
    one.sift(gossip(A, B, C), table(A), now=0.0)
    one.sift(gossip(member("d")), table(A), now=0.0)

    assert asked(one) == ["d", "b"]


def test_one_that_failed_is_asked_again_at_once_on_its_own_word_and_later_on_others() -> None:
    one = introductions(may_vouch=False)
    one.sift(gossip(A, B), table(A), now=0.0)
    (candidate,) = one.next()
    one.done(candidate, is_proven=False, now=0.0)
    one.sift(gossip(A, B), table(A), now=4.9)
    assert asked(one) == []
    one.sift(gossip(A, B), table(A), now=5.1)
    (candidate,) = one.next()
    one.done(candidate, is_proven=False, now=6.0)
    one.sift(gossip(B), table(A), now=6.1)

    assert asked(one) == ["b"]


def test_claims_about_this_node_reach_the_core_and_without_a_proof_no_rival_lives() -> None:
    suspect, rival = ME._replace(state=State.SUSPECT), ME._replace(instance=1)

    assert introductions().sift(gossip(A, suspect, rival), table(A), now=0.0) == gossip(A, suspect, rival)
    one = introductions(may_vouch=False)
    wanted = gossip(A, suspect, rival._replace(state=State.DEAD))
    assert one.sift(gossip(A, suspect, rival), table(A), now=0.0) == wanted
    sifted = one.sift(gossip(rival), table(A), now=0.0)
    assert sifted is not None
    assert sifted.sender.state is State.DEAD
