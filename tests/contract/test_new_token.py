"""Tokens that a clustered node chooses for sessions that are started on it."""

from __future__ import annotations

from typing import Any, cast

import pytest

from cluster.ring import Ring
from cluster.view import View
from mnemosyned.api.router import ClusterRouter

ME = "a:1"
NOBODY = cast("Any", None)


def router(view: View) -> ClusterRouter:
    return ClusterRouter(
        NOBODY,
        NOBODY,
        view=lambda: view,
        gate=NOBODY,
        mirrors=NOBODY,
        is_away=lambda: False,
        trace_context=lambda _: {},
    )


def view(count: int, *, is_active: bool = True, former: tuple[Ring | None, ...] = ()) -> View:
    names = [ME, *(f"b:{number}" for number in range(1, count))]
    return View(
        me=ME,
        ring=Ring(names),
        address_by_name={name: name for name in names[1:]},
        is_active=is_active,
        former=former,
    )


def share_of_own(view: View) -> float:
    """Which part of 400 new tokens is this node's own."""
    chooses = router(view)
    return sum(view.ring.owner(chooses.new_token()) == ME for _ in range(400)) / 400


@pytest.mark.parametrize(("count", "least"), [(1, 1.0), (2, 0.98), (3, 0.95), (10, 0.55)])
async def test_a_node_chooses_tokens_of_its_own(count: int, least: float) -> None:
    assert share_of_own(view(count)) >= least


async def test_a_node_that_another_one_may_still_take_for_no_owner_chooses_by_both_rings() -> None:
    before = Ring([ME, "b:1", "c:1"])
    now = view(2, former=(before,))
    chooses = router(now)
    tokens = [chooses.new_token() for _ in range(100)]

    assert sum(before.owner(token) == ME for token in tokens) >= 95


@pytest.mark.parametrize("count", [40, 100])
async def test_in_a_large_cluster_a_node_takes_the_first_token(count: int) -> None:
    assert share_of_own(view(count)) < 0.1


async def test_a_node_that_owns_nothing_takes_the_first_token() -> None:
    assert 0.3 < share_of_own(view(2, is_active=False)) < 0.7


async def test_no_two_tokens_are_equal() -> None:
    chooses = router(view(3))

    assert len({chooses.new_token() for _ in range(1000)}) == 1000
