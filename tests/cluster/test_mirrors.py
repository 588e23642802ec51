"""Grants of mirrors, and by which rings and processes a node may serve one."""

from __future__ import annotations

from cluster.mirrors import Grants, MirrorHistory
from cluster.ring import Ring
from cluster.view import View

KEEP_US = 60_000_000
ALL = ("a", "b", "c")


def new_grants(*, max_tokens: int = 10) -> Grants:
    return Grants(max_tokens=max_tokens, keep_us=KEEP_US)


def view(*nodes: str, me: str = "a", is_active: bool = True, former: tuple[Ring | None, ...] = ()) -> View:
    return View(me=me, ring=Ring(nodes), address_by_name={}, is_active=is_active, former=former)


def token_of(owner: str, *rings: Ring) -> str:
    """Return a token that this node owns by all of these rings."""
    tokens = (f"token {number}" for number in range(1000))
    return next(token for token in tokens if all(ring.owner(token) == owner for ring in rings or [Ring(ALL)]))


# Grants.


def test_the_holders_of_some_tokens_are_those_of_any_of_them() -> None:
    grants = new_grants()
    for token, node in (("t", "a"), ("t", "b"), ("u", "c")):
        assert grants.grant(token, node, now_us=0)

    assert grants.holders(["t"]) == {"a", "b"}
    assert grants.holders(["t", "u", "v"]) == {"a", "b", "c"}
    assert grants.holders(["v"]) == set()


def test_a_grant_is_remembered_for_as_long_as_a_slow_clock_takes_for_the_mirrors_time() -> None:
    for granted_us in range(0, 3 * KEEP_US, KEEP_US // 7):
        grants = new_grants()
        grants.grant("before", "b", now_us=0)
        grants.grant("t", "b", now_us=granted_us)
        last_us = granted_us + KEEP_US * 104 // 100
        for now_us in range(granted_us, last_us, KEEP_US // 9):
            grants.grant("other", "b", now_us=now_us)

        assert grants.holders(["t"]) == {"b"}


def test_a_grant_is_forgotten_some_time_after_its_mirror_has_ended() -> None:
    grants = new_grants()
    for number in range(4):
        grants.grant(f"t{number}", "b", now_us=number * KEEP_US * 11 // 10)

    assert grants.holders(["t0", "t1"]) == set()
    assert grants.holders(["t2", "t3"]) == {"b"}


def test_all_are_forgotten_after_a_long_silence() -> None:
    grants = new_grants()
    grants.grant("t", "b", now_us=0)
    grants.grant("u", "b", now_us=10 * KEEP_US)

    assert len(grants) == 1


def test_what_cannot_be_remembered_is_not_granted() -> None:
    grants = new_grants(max_tokens=1)

    assert grants.grant("t", "b", now_us=0)
    assert not grants.grant("u", "b", now_us=0)
    assert grants.grant("t", "c", now_us=0)
    assert grants.holders(["u"]) == set()


def test_a_node_that_has_dropped_its_mirror_has_none() -> None:
    grants = new_grants()
    for token, node in (("t", "b"), ("t", "c"), ("u", "b")):
        grants.grant(token, node, now_us=0)
    grants.dropped(["t", "v"], ["b"], count=grants.count)

    assert grants.holders(["t"]) == {"c"}
    assert grants.holders(["u"]) == {"b"}
    grants.dropped(["t"], ["c"], count=grants.count)
    assert len(grants) == 1


def test_a_later_grant_is_not_taken_for_dropped() -> None:
    grants = new_grants()
    grants.grant("t", "b", now_us=0)
    count = grants.count
    grants.grant("t", "b", now_us=0)
    grants.dropped(["t"], ["b"], count=count)

    assert grants.holders(["t"]) == {"b"}


# The history.


def test_nothing_is_kept_before_a_view_or_before_the_owners_process_is_known() -> None:
    token, history = token_of("b"), MirrorHistory()
    assert not history.keeps(token, 0)
    history.follow(view(*ALL), 1)
    assert not history.keeps(token, 1)
    assert history.process_of("b") == 0
    history.met({"b": 7}, 2)

    assert history.process_of("b") == 7
    assert not history.keeps(token, 1)
    assert history.keeps(token, 2)


def test_a_mirror_is_kept_as_long_as_its_owner_owns_the_token() -> None:
    with_c, without_c = Ring(ALL), Ring(["a", "b"])
    stays, moves = token_of("b", with_c, without_c), token_of("c")
    history = MirrorHistory()
    history.follow(view(*ALL), 1)
    history.met({"b": 7, "c": 8}, 2)
    history.follow(view("a", "b"), 3)
    assert history.keeps(stays, 2)
    history.follow(view(*ALL), 4)

    assert history.keeps(stays, 2)
    # Another node has owned it meanwhile.
    assert not history.keeps(moves, 2)
    assert not history.keeps(moves, 3)
    assert history.keeps(moves, 4)


def test_no_mirror_is_kept_from_before_a_ring_without_this_node() -> None:
    token = token_of("b", Ring(ALL), Ring(["b", "c"]))
    history = MirrorHistory()
    history.follow(view(*ALL), 1)
    history.met({"b": 7}, 2)
    history.follow(view("b", "c"), 3)
    assert not history.keeps(token, 2)
    history.follow(view(*ALL), 4)

    assert not history.keeps(token, 2)
    assert history.keeps(token, 4)


def test_no_mirror_is_kept_from_another_process_of_the_owner() -> None:
    token, other = token_of("b"), token_of("c")
    history = MirrorHistory()
    history.follow(view(*ALL), 1)
    history.met({"b": 7, "c": 8}, 2)
    assert not history.is_new({"c": 8, "b": 7})
    assert history.is_new({"b": 9, "c": 8})
    history.met({"b": 9, "c": 8}, 3)
    assert not history.keeps(token, 2)
    assert history.keeps(token, 3)
    assert history.keeps(other, 2)
    # Without a row, too.
    history.met({"c": 8}, 4)

    assert not history.keeps(token, 4)


def test_a_mirror_from_before_the_remembered_views_is_not_kept() -> None:
    token = token_of("b")
    history = MirrorHistory()
    history.met({"b": 7}, 1)
    for generation in range(2, 30):
        history.follow(view(*ALL), generation)

    assert not history.keeps(token, 2)
    assert history.keeps(token, 28)


# A view.


def test_a_mirror_needs_its_owner_in_each_ring_that_counts() -> None:
    with_c, without_c = Ring(ALL), Ring(["a", "b"])
    stays, moves = token_of("b", with_c, without_c), token_of("c")

    assert view(*ALL).may_mirror(stays, "b")
    assert view(*ALL, former=(without_c,)).may_mirror(stays, "b")
    assert not view(*ALL, former=(without_c,)).may_mirror(moves, "c")
    assert not view(*ALL, former=(None,)).may_mirror(stays, "b")


def test_a_node_has_no_mirrors_by_a_ring_by_which_it_owns_nothing() -> None:
    without_a = Ring(["b", "c"])
    token = token_of("b", Ring(ALL), without_a)

    assert not view("b", "c").may_mirror(token, "b")
    assert not view(*ALL, is_active=False).may_mirror(token, "b")
    assert not view(*ALL, former=(without_a,)).may_mirror(token, "b")
