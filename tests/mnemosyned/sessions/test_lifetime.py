from __future__ import annotations

from mnemosyned.sessions.lifetime import Lifetime

LIFETIME = Lifetime(idle_us=60_000_000, cache_us=5_000_000, touch_interval_us=6_000_000)


def test_a_get_extends_to_whole_milliseconds() -> None:
    assert LIFETIME.extended_us(1_234_567) == 61_234_000
    assert LIFETIME.extended_us(1_234_999) == LIFETIME.extended_us(1_234_000)


def test_a_copy_is_served_for_its_time_from_when_it_was_asked_for() -> None:
    assert LIFETIME.copy_fresh_until_us(1_000_000, row_expires_at_us=61_000_000) == 6_000_000


def test_a_copy_is_not_served_in_the_last_two_touch_intervals_of_its_row() -> None:
    assert LIFETIME.copy_fresh_until_us(1_000_000, row_expires_at_us=14_000_000) == 2_000_000


def test_that_there_is_no_session_is_remembered_for_the_time_of_a_copy() -> None:
    assert LIFETIME.negative_fresh_until_us(1_000_000) == 6_000_000
