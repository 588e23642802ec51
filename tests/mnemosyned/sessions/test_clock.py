from __future__ import annotations

import math

import pytest

from aio.deadline import NO_DEADLINE, Deadline
from aio.units import NEVER_US
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


def synchronised(*, round_trip_us: int) -> StorageClock:
    uptime = Uptime()
    clock = StorageClock(uptime, wall_us=0)
    sent_us = uptime.us
    uptime.us += round_trip_us
    clock.observe(90_000_000, sent_us=sent_us, received_us=uptime.us)
    return clock


def test_the_deadline_of_a_caller_is_on_the_storages_clock_and_early_by_its_error() -> None:
    clock = synchronised(round_trip_us=2_000)
    limit_us = clock.limit_us(Deadline.in_s(10))

    assert limit_us == pytest.approx(clock.now_us() + 10_000_000 - 1_000, abs=500_000)
    assert limit_us <= clock.now_us() + 10_000_000 - 1_000


def test_a_short_deadline_keeps_most_of_its_time_far_from_the_storage() -> None:
    clock = synchronised(round_trip_us=400_000)

    assert clock.limit_us(Deadline.in_s(0.05)) > clock.now_us()


def test_what_a_call_waited_in_its_socket_is_taken_off() -> None:
    clock = synchronised(round_trip_us=0)

    assert clock.limit_us(Deadline.in_s(10, waited_s=8)) < clock.now_us() + 2_000_000 + 1
    assert clock.limit_us(Deadline.in_s(0.3, waited_s=2)) < clock.now_us()


def test_a_limit_that_is_known_is_kept_and_no_deadline_has_none() -> None:
    clock = synchronised(round_trip_us=0)

    assert clock.limit_us(Deadline.in_s(10, not_after_us=7)) == 7
    assert clock.limit_us(NO_DEADLINE) == NEVER_US
    assert clock.limit_us(Deadline(math.inf, waited_s=3)) == NEVER_US


def test_before_the_storage_has_answered_there_is_no_limit() -> None:
    assert StorageClock(Uptime(), wall_us=0).limit_us(Deadline.in_s(1)) == NEVER_US


def test_uptime_never_goes_back() -> None:
    assert uptime_ns() <= uptime_ns()
