from __future__ import annotations

from cluster.breaker import Breaker, BreakerState


def test_one_broken_connection_opens_it() -> None:
    breaker = Breaker()
    assert breaker.is_closed
    breaker.broke(now=10.0)

    assert breaker.state is BreakerState.OPEN


def test_three_time_outs_in_a_row_open_it() -> None:
    breaker = Breaker()
    for _ in range(2):
        breaker.timed_out(now=10.0)
    assert breaker.is_closed
    breaker.timed_out(now=10.0)

    assert breaker.state is BreakerState.OPEN


def test_an_answer_between_time_outs_starts_the_count_again() -> None:
    breaker = Breaker()
    for _ in range(5):
        breaker.timed_out(now=10.0)
        breaker.timed_out(now=10.0)
        breaker.answered()

    assert breaker.is_closed


def test_a_trial_is_due_each_second_and_only_one_at_a_time() -> None:
    breaker = Breaker()
    assert not breaker.may_try(now=100.0)
    breaker.broke(now=10.0)
    assert not breaker.may_try(now=10.9)
    assert breaker.may_try(now=11.0)
    assert breaker.state is BreakerState.HALF_OPEN
    assert not breaker.may_try(now=20.0)
    breaker.broke(now=20.0)
    assert not breaker.may_try(now=20.9)

    assert breaker.may_try(now=21.0)


def test_a_trial_that_succeeds_closes_it() -> None:
    breaker = Breaker()
    breaker.broke(now=10.0)
    assert breaker.may_try(now=11.0)
    breaker.answered()

    assert breaker.is_closed
    breaker.timed_out(now=12.0)
    assert breaker.is_closed


def test_a_trial_that_times_out_is_followed_by_another() -> None:
    breaker = Breaker()
    breaker.broke(now=10.0)
    assert breaker.may_try(now=11.0)
    breaker.timed_out(now=11.25)
    assert breaker.state is BreakerState.OPEN

    assert breaker.may_try(now=12.25)
