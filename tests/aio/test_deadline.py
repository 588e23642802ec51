from __future__ import annotations

from aio.deadline import NO_DEADLINE, Deadline
from aio.units import NEVER_US


def test_without_a_deadline_a_caller_waits_without_limit_and_its_write_is_never_late() -> None:
    assert NO_DEADLINE.left_s() is None
    assert NO_DEADLINE.not_after_us == NEVER_US
    assert NO_DEADLINE.share_s(0.25) == 0.25


def test_what_is_left_runs_down_and_may_be_negative() -> None:
    left_s, passed_s = Deadline.in_s(10).left_s(), Deadline.in_s(-1).left_s()

    assert left_s is not None
    assert 9 < left_s <= 10
    assert passed_s is not None
    assert passed_s <= -1


def test_a_share_is_half_of_what_is_left_and_within_bounds() -> None:
    assert Deadline.in_s(10).share_s(0.25) == 0.25
    assert 0.04 < Deadline.in_s(0.1).share_s(0.25) <= 0.05
    assert Deadline.in_s(-1).share_s(0.25) == 0.0


def test_a_write_counts_as_sent_when_it_can_first_have_been_sent() -> None:
    deadline = Deadline(100.0, 7, waited_s=2.0)

    assert deadline.of_write() == Deadline(98.0, 7)
    assert Deadline(100.0, 7).of_write() == Deadline(100.0, 7)
    assert NO_DEADLINE.of_write() == NO_DEADLINE
