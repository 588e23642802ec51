from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.member import Member, Phase, State, names_digest
from cluster.table import Base, ProbeOrder, Table


def member(name: str, *, state: State = State.ALIVE, phase: Phase = Phase.ACTIVE, inc: int = 0) -> Member:
    return Member(name, f"{name}-address", 1, inc, state, phase, 1)


def table(*members: Member, base: Base | None = None) -> Table:
    one = Table(base or Base())
    for each in members:
        assert one.put(each)
    return one


def test_it_holds_the_last_that_was_put() -> None:
    one = table(member("a"), member("b"), member("a", inc=1))

    assert one.get("a") == member("a", inc=1)
    assert one.get("c") is None
    assert len(one) == 2
    assert list(one) == [member("a", inc=1), member("b")]
    assert [one.at(0), one.at(1)] == list(one)


def test_a_base_is_seen_through_what_differs_from_it() -> None:
    base = Base([member("a"), member("b"), member("gone", state=State.DEAD)])
    one = table(member("b", inc=1), member("c"), base=base)

    assert [each.name for each in one] == ["a", "b", "gone", "c"]
    assert [one.at(index).incarnation for index in range(4)] == [0, 1, 0, 0]
    assert one.get("a") == member("a")
    assert one.live == 3
    assert one.gone == ["gone"]


def test_a_table_on_a_base_has_the_sums_of_one_that_grew() -> None:
    members = [member(name) for name in "abc"] + [
        member("d", state=State.LEFT),
        member("e", phase=Phase.JOINING),
    ]
    on_base, grown = table(base=Base(members)), table(*members)

    assert on_base.members_hash == grown.members_hash
    assert on_base.ring_hash == grown.ring_hash == names_digest("abc")
    assert on_base.live == grown.live == 4


STATES = st.sampled_from(State)
CLAIMS = st.lists(
    st.builds(
        member, st.sampled_from("abcd"), state=STATES, phase=st.sampled_from(Phase), inc=st.integers(0, 3)
    )
)


@given(CLAIMS)
def test_its_sums_are_those_of_its_members_however_it_came_to_them(claims: list[Member]) -> None:
    one = table(*claims)
    last = {claim.name: claim for claim in claims}
    fresh = Base(list(last.values()))

    assert (one.live, one.members_hash, one.ring_hash) == (fresh.live, fresh.members_hash, fresh.ring_hash)
    assert set(one.gone) == {claim.name for claim in last.values() if claim.is_gone}


def test_what_a_view_is_made_of_is_counted_when_it_changes() -> None:
    one = table(member("a"))
    before = one.changes
    one.put(member("a", inc=1))
    one.put(member("a", inc=1, state=State.SUSPECT))
    assert one.changes == before
    one.put(member("a", inc=1, state=State.DEAD))
    one.put(member("a", inc=2)._replace(address="moved"))

    assert one.changes == before + 2


def test_there_is_room_for_so_many_and_no_more() -> None:
    one = Table(Base(), max_members=2)
    one.put(member("a"))
    one.put(member("b"))

    assert not one.put(member("c"))
    assert one.put(member("b", inc=1))
    assert len(one) == 2


def test_only_the_gone_are_forgotten_and_none_of_the_base() -> None:
    base = Base([member("a", state=State.DEAD)])
    one = table(member("b"), member("c", state=State.LEFT), member("a", state=State.LEFT), base=base)
    for name in ("a", "b", "c", "unknown"):
        one.forget(name)

    assert [each.name for each in one] == ["a", "b"]
    assert one.gone == ["a"]
    assert one.at(1) == member("b")


def test_a_pick_has_different_live_members_and_none_that_is_excluded() -> None:
    one = table(*(member(str(number)) for number in range(10)), member("gone", state=State.DEAD))
    for seed in range(50):
        names = [each.name for each in one.pick(4, Random(seed), excluding=("3",))]

        assert len(set(names)) == 4
        assert not {"3", "gone"} & set(names)


@pytest.mark.parametrize("seed", range(20))
def test_the_few_that_live_are_found_among_many_gone(seed: int) -> None:
    gone = [member(f"gone{number}", state=State.DEAD) for number in range(500)]
    one = table(*gone[:250], member("a"), *gone[250:], member("b"), member("c"))

    assert {each.name for each in one.pick(3, Random(seed), excluding=("c",))} == {"a", "b"}
    assert table(*gone).pick(3, Random(seed), excluding=()) == []


def test_a_pick_from_no_members_is_empty() -> None:
    assert table().pick(3, Random(1), excluding=()) == []


def test_every_member_is_picked_as_often() -> None:
    one, rng = table(*(member(str(number)) for number in range(5))), Random(1)
    count = Counter(each.name for _ in range(5000) for each in one.pick(1, rng, excluding=("0",)))

    assert set(count) == set("1234")
    assert max(count.values()) < 1.1 * min(count.values())


@given(st.integers(1, 200), st.integers())
def test_each_index_comes_once_a_round(size: int, seed: int) -> None:
    order = ProbeOrder(Random(seed))
    for _ in range(3):
        assert sorted(order.advance(size) for _ in range(size)) == list(range(size))


def test_rounds_differ() -> None:
    order = ProbeOrder(Random(1))
    rounds = {tuple(order.advance(50) for _ in range(50)) for _ in range(10)}

    assert len(rounds) == 10


@given(st.lists(st.integers(1, 60), min_size=1, max_size=200), st.integers())
def test_an_index_is_below_a_size_that_changes(sizes: list[int], seed: int) -> None:
    order = ProbeOrder(Random(seed))
    for size in sizes:
        assert 0 <= order.advance(size) < size


def test_an_empty_table_cannot_be_probed() -> None:
    with pytest.raises(ValueError, match="nothing to probe"):
        ProbeOrder(Random(1)).advance(0)
