from __future__ import annotations

import math

import pytest

from mnemosyned.transport.input_age import InputAge


@pytest.fixture
def age() -> InputAge:
    return InputAge()


def test_input_that_nothing_delayed_is_new(age: InputAge) -> None:
    assert age.since_s == math.inf
    assert not age.ask(1.0)


def test_all_that_comes_before_the_echo_may_be_as_old_as_the_delay(age: InputAge) -> None:
    age.delayed_since(10.0)

    assert age.ask(15.0)
    assert not age.ask(15.1)
    assert age.since_s == 10.0

    age.echoed()

    assert age.since_s == math.inf
    assert not age.ask(15.3)


def test_of_several_delays_the_first_counts(age: InputAge) -> None:
    for instant_s in (11.0, 10.0, 12.0):
        age.delayed_since(instant_s)

    assert age.since_s == 10.0


def test_a_delay_after_the_ping_needs_an_echo_of_its_own(age: InputAge) -> None:
    age.delayed_since(10.0)
    age.ask(15.0)
    age.delayed_since(14.0)

    age.echoed()

    assert age.since_s == 14.0
    assert age.ask(16.0)
    age.echoed()
    assert age.since_s == math.inf


def test_a_client_that_does_not_answer_is_late(age: InputAge) -> None:
    assert not age.is_late(1e9)

    age.delayed_since(10.0)
    age.ask(15.0)

    assert not age.is_late(34.0)
    assert age.is_late(36.0)


def test_an_echo_that_nobody_asked_for_makes_no_input_new(age: InputAge) -> None:
    age.echoed()
    age.delayed_since(10.0)
    age.echoed()

    assert age.since_s == 10.0
    assert age.ask(15.0)
