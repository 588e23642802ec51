from __future__ import annotations

import itertools

import pytest

from cluster.ring import Ring
from cluster.routing import CACHED, UNCACHED, Forward, peers_with_copies, route
from cluster.view import View, alone

NODES = ("a:1", "b:1", "c:1")


def view(me: str) -> View:
    return View(me=me, ring=Ring(NODES), address_by_name={})


@pytest.mark.parametrize("hops_left", [0, 1])
def test_a_node_alone_owns_every_token(hops_left: int) -> None:
    assert route(alone("a:1", is_active=True), "token", hops_left=hops_left) is CACHED


def test_a_node_that_joins_keeps_no_copies() -> None:
    assert route(alone("a:1", is_active=False), "token", hops_left=1) is UNCACHED


def test_each_token_has_one_owner_and_all_others_forward_to_it() -> None:
    for token in (f"token-{number}" for number in range(100)):
        routes = {me: route(view(me), token, hops_left=1) for me in NODES}
        (owner,) = (me for me, found in routes.items() if found is CACHED)

        assert all(found == Forward(owner) for me, found in routes.items() if me != owner)


def test_what_was_forwarded_is_answered_and_never_forwarded_on() -> None:
    for token in (f"token-{number}" for number in range(100)):
        found = [route(view(me), token, hops_left=0) for me in NODES]

        assert found.count(CACHED) == 1
        assert found.count(UNCACHED) == 2


def test_a_node_that_owns_nothing_forwards_everything() -> None:
    leaving = View(me="d:1", ring=Ring(NODES), address_by_name={})

    assert not leaving.is_alone
    assert isinstance(route(leaving, "token", hops_left=1), Forward)


@pytest.mark.parametrize("nodes", [("b:1",), ("a:1", "b:1")])
def test_only_a_ring_of_this_node_makes_it_alone(nodes: tuple[str, ...]) -> None:
    assert not View(me="a:1", ring=Ring(nodes), address_by_name={}).is_alone


def test_a_token_that_has_just_come_to_a_node_is_kept_in_no_cache_yet() -> None:
    former = (Ring(("b:1", "c:1")),)
    tokens = [f"token-{number}" for number in range(100)]
    mine = [token for token in tokens if route(view("a:1"), token, hops_left=1) is CACHED]
    young = View(me="a:1", ring=Ring(NODES), address_by_name={}, former=former)

    assert mine
    assert {route(young, token, hops_left=1) for token in mine} == {UNCACHED}


def test_a_token_that_stays_is_kept_while_others_come() -> None:
    young = View(me="a:1", ring=Ring(NODES), address_by_name={}, former=(Ring(("a:1", "b:1")),))
    last = View(me="a:1", ring=Ring(["a:1"]), address_by_name={}, former=(Ring(("a:1", "b:1")),))
    for token in (f"token-{number}" for number in range(100)):
        is_mine = NODES[0] == young.ring.owner(token)
        was_mine = young.former[0].owner(token) == "a:1"

        assert (route(young, token, hops_left=1) is CACHED) == (is_mine and was_mine)
        assert (route(last, token, hops_left=1) is CACHED) == was_mine


def dialled(me: str, *, former: tuple[Ring, ...] = (), nodes: tuple[str, ...] = NODES) -> View:
    return View(
        me=me, ring=Ring(nodes), address_by_name={name: name for name in NODES if name != me}, former=former
    )


def test_the_owner_of_a_token_may_have_a_copy_and_no_other_peer() -> None:
    now = dialled("a:1")
    for token in (f"token-{number}" for number in range(100)):
        owner = now.ring.owner(token)

        assert peers_with_copies(now, [token]) == ({} if owner == "a:1" else {owner: [token]})


def test_the_owner_by_a_former_ring_may_have_a_copy_too() -> None:
    former = Ring(("c:1",))
    now = dialled("a:1", former=(former,), nodes=("a:1", "b:1"))
    token = next(token for token in map(str, range(100)) if now.ring.owner(token) == "b:1")

    assert list(peers_with_copies(now, [token])) == ["b:1", "c:1"]


def test_a_former_owner_that_is_gone_is_no_peer() -> None:
    now = dialled("a:1", former=(Ring(("gone:1",)),), nodes=("a:1",))

    assert peers_with_copies(now, ["token"]) == {}


def test_any_peer_may_have_a_copy_of_what_has_no_token() -> None:
    assert peers_with_copies(dialled("a:1"), ["\0id"]) == {"b:1": ["\0id"], "c:1": ["\0id"]}


def test_tokens_of_one_peer_are_grouped() -> None:
    now = dialled("a:1")
    tokens = [f"token-{number}" for number in range(100)]
    tokens_by_peer = peers_with_copies(now, tokens)

    assert tokens_by_peer.keys() == {"b:1", "c:1"}
    assert sorted(itertools.chain.from_iterable(tokens_by_peer.values())) == sorted(
        token for token in tokens if now.ring.owner(token) != "a:1"
    )
