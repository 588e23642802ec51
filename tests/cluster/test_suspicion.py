from __future__ import annotations

import pytest

from cluster.suspicion import Suspicion


def suspicion(*, confirmations: int = 2, refusals_needed: int = 2) -> Suspicion:
    """Begun at 100 s, by a: 4 to 24 s, and 0.5 s after a refusal."""
    one = Suspicion(
        now=100.0,
        min_s=4.0,
        max_s=24.0,
        confirmations=confirmations,
        refused_s=0.5,
        refusals_needed=refusals_needed,
    )
    one.accuse("a", is_refused=False, now=100.0)
    return one


def test_a_lone_accuser_waits_longest() -> None:
    one = suspicion()

    assert one.deadline_s == 124.0
    assert one.confirmations == 0


def test_each_confirmation_shortens_it_down_to_the_least() -> None:
    """Lifeguard, section IV-B: max - (max - min) · log(C + 1) / log(K + 1)."""
    one = suspicion()
    one.accuse("b", is_refused=False, now=101.0)
    assert one.deadline_s == pytest.approx(124.0 - 20.0 * 0.63093)
    one.accuse("c", is_refused=False, now=101.0)
    assert one.deadline_s == 104.0
    one.accuse("d", is_refused=False, now=101.0)

    assert one.deadline_s == 104.0


def test_the_same_accuser_counts_once() -> None:
    one = suspicion()

    assert not one.accuse("a", is_refused=False, now=101.0)
    assert one.confirmations == 0


def test_only_as_many_accusations_are_passed_on_as_change_something() -> None:
    one = suspicion()

    assert [one.accuse(name, is_refused=False, now=101.0) for name in "bcde"] == [True, True, False, False]


def test_accusers_are_remembered_within_a_bound() -> None:
    one = suspicion()
    for number in range(100):
        one.accuse(str(number), is_refused=True, now=101.0)

    assert one.confirmations == 15
    assert len(one._refusers) == 2


def test_where_no_member_can_confirm_it_takes_the_least_time() -> None:
    assert suspicion(confirmations=0).deadline_s == 104.0


def test_enough_refusals_make_it_short() -> None:
    one = suspicion()
    assert one.accuse("b", is_refused=True, now=101.0)
    assert not one.is_refused
    assert one.deadline_s > 110.0
    assert one.accuse("c", is_refused=True, now=101.3)

    assert one.is_refused
    assert one.deadline_s == 101.5


def test_an_accuser_may_see_a_refusal_later() -> None:
    one = suspicion(refusals_needed=1)

    assert one.accuse("a", is_refused=True, now=102.0)
    assert one.deadline_s == 102.5


def test_a_refusal_never_makes_it_longer() -> None:
    one = suspicion(confirmations=0, refusals_needed=1)
    one.accuse("b", is_refused=True, now=103.9)

    assert one.deadline_s == 104.0


def test_a_shift_moves_all_its_times() -> None:
    slow, quick = suspicion(confirmations=0), suspicion(refusals_needed=1)
    quick.accuse("b", is_refused=True, now=101.0)
    for one in (slow, quick):
        one.shift(2.5)

    assert (slow.deadline_s, quick.deadline_s) == (106.5, 104.0)
