from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.ring import Ring
from cluster.routing import CACHED, UNCACHED, Forward, route
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


def test_what_a_node_owned_before_it_owned_nothing_has_not_settled() -> None:
    young = View(me="a:1", ring=Ring(NODES), address_by_name={}, former=(Ring(NODES), None))

    assert not any(young.owns(f"token-{number}") for number in range(100))
    assert route(alone("a:1", is_active=True), "token", hops_left=0) is CACHED
    assert route(replace(alone("a:1", is_active=True), former=(None,)), "token", hops_left=0) is UNCACHED


def test_a_node_shows_a_ring_only_while_it_owns_tokens_by_it() -> None:
    on_it = view("a:1")

    assert on_it.routed == view("b:1").routed == Ring(NODES).fingerprint
    assert view("d:1").routed == ""
    assert replace(on_it, is_active=False).routed == ""


def test_a_node_that_joins_owns_no_token() -> None:
    joining = replace(view("a:1"), is_active=False)

    assert not any(joining.owns(f"token-{number}") for number in range(100))
    assert not alone("a:1", is_active=False).owns("token")
