from __future__ import annotations

from mnemosyned.sessions.clock import StorageClock, uptime_ns


class Uptime:
    us = 1_000_000

    def __call__(self) -> int:
        return self.us * 1000


def test_until_it_is_told_better_it_is_the_machines_own_clock() -> None:
    uptime = Uptime()
    clock = StorageClock(uptime, wall_us=50_000_000)
    uptime.us += 10

    assert clock.now_us() == 50_000_010


def test_it_follows_the_storage_half_way_between_question_and_answer() -> None:
    uptime = Uptime()
    clock = StorageClock(uptime, wall_us=0)
    clock.observe(90_000_000, sent_us=1_000_000, received_us=1_000_400)
    uptime.us = 1_000_200

    assert clock.now_us() == 90_000_000


def test_a_slow_answer_does_not_move_a_clock_that_was_set() -> None:
    uptime = Uptime()
    clock = StorageClock(uptime, wall_us=0)
    clock.observe(90_000_000, sent_us=1_000_000, received_us=1_000_000)
    clock.observe(70_000_000, sent_us=1_000_000, received_us=3_000_000)

    assert clock.now_us() == 90_000_000


def test_a_slow_first_answer_is_better_than_none() -> None:
    uptime = Uptime()
    clock = StorageClock(uptime, wall_us=0)
    clock.observe(90_000_000, sent_us=1_000_000, received_us=3_000_000)

    assert clock.now_us() == 89_000_000


def test_uptime_never_goes_back() -> None:
    assert uptime_ns() <= uptime_ns()
