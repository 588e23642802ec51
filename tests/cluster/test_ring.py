from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from cluster.ring import Ring

TOKENS = [f"{Random(n).getrandbits(512):0128x}" for n in range(20_000)]


def names(count: int) -> list[str]:
    return [f"10.0.0.{n}:8080" for n in range(count)]


def test_rings_of_the_same_nodes_are_equal_in_any_order() -> None:
    nodes = names(5)
    one, other = Ring(nodes), Ring(reversed(nodes))

    assert one.fingerprint == other.fingerprint
    assert all(one.owner(token) == other.owner(token) for token in TOKENS[:2000])


def test_rings_of_different_nodes_have_different_fingerprints() -> None:
    assert Ring(names(3)).fingerprint != Ring(names(4)).fingerprint


@pytest.mark.parametrize("count", range(3, 10))
def test_load_is_spread_within_a_bound(count: int) -> None:
    ring = Ring(names(count))
    load = Counter(ring.owner(token) for token in TOKENS)

    assert max(load.values()) / (len(TOKENS) / count) <= 1.12


@pytest.mark.parametrize("count", range(3, 10))
def test_a_new_node_takes_little_more_than_its_share_and_nothing_else_moves(count: int) -> None:
    before, after = Ring(names(count)), Ring(names(count + 1))
    newcomer = names(count + 1)[-1]
    moved = [token for token in TOKENS if before.owner(token) != after.owner(token)]

    assert len(moved) <= 1.15 / (count + 1) * len(TOKENS)
    assert {after.owner(token) for token in moved} == {newcomer}


def test_a_ring_without_nodes_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a node"):
        Ring([])


def test_shares_are_what_the_tokens_show_and_add_up_to_one() -> None:
    ring = Ring(names(3))
    load = Counter(ring.owner(token) for token in TOKENS)
    shares = ring.shares()

    assert sum(shares.values()) == pytest.approx(1.0)
    assert all(shares[node] == pytest.approx(load[node] / len(TOKENS), abs=0.01) for node in ring.nodes)
    assert Ring(["a:1"]).shares() == {"a:1": 1.0}
