from __future__ import annotations

import pytest

from cluster import dissemination
from cluster.dissemination import Dissemination
from cluster.member import Member, Phase, State, Update


def update(name: str, *, state: State = State.ALIVE, accuser: str = "", incarnation: int = 0) -> Update:
    return Update(Member(name, name, 1, incarnation, state, Phase.ACTIVE, 1), accuser)


def waiting(*updates: Update) -> Dissemination:
    one = Dissemination(lambda _: True)
    for each in updates:
        one.put(each)
    return one


def names(updates: list[Update]) -> list[str]:
    return [one.member.name for one in updates]


def test_what_was_sent_least_often_goes_first() -> None:
    one = waiting(update("a"), update("b"), update("c"))

    assert names(one.take(2, max_sends=9)) == ["a", "b"]
    assert names(one.take(2, max_sends=9)) == ["c", "a"]


def test_each_is_sent_so_many_times_and_no_more() -> None:
    one = waiting(update("a"))
    sent = [names(one.take(5, max_sends=3)) for _ in range(5)]

    assert sent == [["a"], ["a"], ["a"], [], []]
    assert not one


def test_no_more_are_taken_than_asked_for() -> None:
    one = waiting(*(update(str(number)) for number in range(10)))

    assert one.take(0, max_sends=3) == []
    assert len(one.take(4, max_sends=3)) == 4


def test_a_newer_claim_takes_the_place_of_an_older_one() -> None:
    newer = update("a", incarnation=1)
    one = waiting(update("a"), newer)

    assert one.take(5, max_sends=1) == [newer]
    assert not one


def test_accusations_of_different_nodes_are_told_apart() -> None:
    one = waiting(*(update("a", state=State.SUSPECT, accuser=accuser) for accuser in "xyx"))

    assert [each.accuser for each in one.take(5, max_sends=1)] == ["y", "x"]


def test_what_is_no_longer_held_is_not_told() -> None:
    stale = {"b"}
    one = Dissemination(lambda each: each.member.name not in stale)
    for name in "abc":
        one.put(update(name))

    assert names(one.take(5, max_sends=2)) == ["a", "c"]
    assert len(one) == 2


def test_a_flood_displaces_what_was_sent_most_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dissemination, "MAX_QUEUED", 3)
    one = waiting(update("a"), update("b"), update("c"))
    one.take(1, max_sends=9)
    one.put(update("d"))

    assert len(one) == 3
    assert names(one.take(5, max_sends=9)) == ["b", "c", "d"]
