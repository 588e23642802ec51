from __future__ import annotations

from dataclasses import replace

from cluster.member import Member, Phase, State
from cluster.view import View, alone
from cluster.view_change import next_view, settled


def member(name: str, *, state: State = State.ALIVE, phase: Phase = Phase.ACTIVE) -> Member:
    return Member(f"{name}:1", f"10.0.0.{ord(name)}:1", 1, 0, state, phase, 7)


A, B, C = map(member, "abc")
JOINING = A._replace(phase=Phase.JOINING)


def views(*memberships: tuple[Member, ...], me: Member = A) -> View:
    """Return the last of the views that follow one another, from that of a node which owns its tokens."""
    view = alone(me.name, is_active=True)
    for members in memberships:
        view = next_view(view, me, members)
    return view


def owners(view: View) -> list[tuple[str, ...] | None]:
    """The nodes of the former rings; None: a time in which this node owned nothing."""
    return [None if ring is None else ring.nodes for ring in view.former]


def test_only_members_that_own_tokens_are_on_the_ring() -> None:
    leaving, suspect, dead = (
        member("c", phase=Phase.LEAVING),
        member("d", state=State.SUSPECT),
        member("e", state=State.DEAD),
    )
    view = next_view(alone(A.name, is_active=True), A, [A, B, leaving, suspect, dead])

    assert view.ring.nodes == ("a:1", "b:1", "d:1")


def test_every_live_member_but_this_node_can_be_dialled() -> None:
    leaving, dead = member("c", phase=Phase.LEAVING), member("e", state=State.DEAD)
    view = next_view(alone(A.name, is_active=True), A, [A, B, leaving, dead])

    assert view.address_by_name == {B.name: B.address, leaving.name: leaving.address}


def test_a_node_without_any_owner_is_on_its_own_ring() -> None:
    view = next_view(alone(A.name, is_active=False), JOINING, [JOINING])

    assert view.is_alone
    assert not view.is_active
    assert view.former == ()


def test_a_first_node_that_found_no_other_had_owned_nothing() -> None:
    view = next_view(alone(A.name, is_active=False), A, [A])

    assert view.is_active
    assert view.former == (None,)
    assert not view.owns("token")
    assert settled(view).owns("token")


def test_the_last_ring_becomes_a_former_one() -> None:
    view = views((A, B), (A, B, C))

    assert owners(view) == [("a:1",), ("a:1", "b:1")]


def test_the_same_ring_keeps_the_former_ones() -> None:
    moved = B._replace(address="10.9.9.9:1")
    view = views((A, B), (A, moved))

    assert owners(view) == [("a:1",)]
    assert view.address_by_name == {B.name: "10.9.9.9:1"}


def test_a_node_that_joined_had_owned_nothing() -> None:
    view = next_view(alone(A.name, is_active=False), A, [A, B, C])

    assert owners(view) == [None]


def test_a_node_that_knows_peers_while_it_joins_has_owned_nothing_by_their_ring() -> None:
    joining = next_view(alone(A.name, is_active=False), JOINING, [JOINING, B])
    view = next_view(joining, A, [A, B])

    assert joining.ring.nodes == ("b:1",)
    assert owners(view) == [None, None]
    assert not any(view.owns(str(number)) for number in range(100))


def test_a_node_whose_peers_go_while_it_joins_owns_nothing_yet() -> None:
    joining = next_view(alone(A.name, is_active=False), JOINING, [JOINING, B])
    view = next_view(joining, JOINING, [JOINING, B._replace(state=State.DEAD)])

    assert view.is_alone
    assert not view.owns("token")


def test_a_node_that_leaves_owns_nothing_and_may_be_taken_for_an_owner_still() -> None:
    leaving = A._replace(phase=Phase.LEAVING)
    view = next_view(views((A, B)), leaving, [leaving, B])

    assert (view.routed, view.ring.nodes) == ("", ("b:1",))
    assert owners(view) == [("a:1",), ("a:1", "b:1")]


def test_more_former_rings_than_are_kept_count_as_a_time_without_tokens() -> None:
    memberships = [(A, *map(member, "bcdefgh"[:count])) for count in range(1, 8)]

    assert [owners(views(*memberships[:count])) for count in (4, 5, 6)] == [
        [("a:1",), ("a:1", "b:1"), ("a:1", "b:1", "c:1"), ("a:1", "b:1", "c:1", "d:1")],
        [None],
        [None, ("a:1", "b:1", "c:1", "d:1", "e:1", "f:1")],
    ]


def test_a_settled_view_differs_in_its_former_rings_alone() -> None:
    view = views((A, B))
    after = settled(view)

    assert after.former == ()
    assert after.ring is view.ring
    assert replace(after, former=view.former).address_by_name == view.address_by_name
