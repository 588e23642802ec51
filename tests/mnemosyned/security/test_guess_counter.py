from __future__ import annotations

import math
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemosyned.security.guess_counter import MAX_CALLERS, GuessCounter

WINDOW_S = 60.0
# (caller, seconds since the guess before), of few callers, so that they meet.
GUESSES = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from([0.0, 0.1, 5.0, 29.0, 61.0, 130.0])), max_size=200
)


def counted(counter: GuessCounter[str], caller: str, times: int, *, now_s: float) -> int:
    """Count so many guesses at once; return what the counter says after the last."""
    return [counter.count(caller, now_s=now_s) for _ in range(times)][-1]


def test_a_callers_guesses_within_the_window_are_counted_exactly() -> None:
    counter = GuessCounter[str](WINDOW_S)

    assert counter.count("a", now_s=1000.0) == 1
    assert counter.count("b", now_s=1001.0) == 1
    assert counter.count("a", now_s=1059.9) == 2
    assert counter.callers(now_s=1059.9) == 2


def test_guesses_on_both_sides_of_a_windows_end_count_together() -> None:
    counter = GuessCounter[str](WINDOW_S)
    counter.count("other", now_s=0.0)
    counted(counter, "a", 100, now_s=59.9)

    assert counted(counter, "a", 100, now_s=60.1) == 199


def test_guesses_of_the_window_before_count_less_with_time() -> None:
    counter = GuessCounter[str](WINDOW_S)
    counted(counter, "a", 100, now_s=0.0)

    assert counter.count("a", now_s=75.0) == 1 + 75
    assert counter.count("a", now_s=90.0) == 2 + 50
    assert counter.count("a", now_s=119.9) == 3


@pytest.mark.parametrize("pause_s", [120.0, 1e6])
def test_a_pause_of_two_windows_forgets_everything(pause_s: float) -> None:
    counter = GuessCounter[str](WINDOW_S)
    counted(counter, "a", 100, now_s=0.0)

    assert counter.callers(now_s=pause_s) == 0
    assert counter.count("a", now_s=pause_s) == 1
    # The window begins with that guess, wherever the former ones began.
    assert counted(counter, "a", 9, now_s=pause_s + 59.9) == 10


def test_a_steady_rate_is_told_as_it_is() -> None:
    counter = GuessCounter[str](WINDOW_S)
    found = [counter.count("a", now_s=number / 10) for number in range(6000)]

    # 10 a second make 600 a minute.
    assert all(595 <= count <= 601 for count in found[600:])


def test_a_caller_is_reported_once_in_a_window() -> None:
    counter = GuessCounter[str](WINDOW_S)
    reported_at_s = []
    for now_s in range(200):
        counter.count("a", now_s=float(now_s))
        if counter.may_report("a", now_s=float(now_s)):
            reported_at_s.append(now_s)

    assert reported_at_s == [0, 60, 120, 180]


def test_a_caller_is_not_reported_twice_because_a_window_ends() -> None:
    counter = GuessCounter[str](WINDOW_S)
    counter.count("a", now_s=0.0)
    counter.count("a", now_s=59.0)

    assert counter.may_report("a", now_s=59.0)
    counter.count("a", now_s=61.0)
    assert not counter.may_report("a", now_s=61.0)
    counter.count("a", now_s=119.0)
    assert counter.may_report("a", now_s=119.0)


def test_callers_are_reported_independently() -> None:
    counter = GuessCounter[str](WINDOW_S)
    for caller in "ab":
        counter.count(caller, now_s=0.0)

    assert counter.may_report("a", now_s=0.0)
    assert counter.may_report("b", now_s=0.0)


def test_many_addresses_flush_no_heavy_guesser_and_accuse_no_other_caller() -> None:
    counter = GuessCounter[str](WINDOW_S, capacity=64)
    for number in range(1000):
        counter.count("guesser", now_s=number / 1000)
    most = max(counter.count(f"address {number}", now_s=1.0) for number in range(50_000))

    assert counter.callers(now_s=1.0) == 64
    assert most == 1
    assert counter.count("guesser", now_s=1.0) == 1001


def test_a_heavy_guesser_among_many_addresses_is_found_while_they_come() -> None:
    counter = GuessCounter[str](WINDOW_S, capacity=64)
    last = 0
    for number in range(20_000):
        counter.count(f"address {number}", now_s=0.0)
        # A twentieth of all guesses, more than the 64th that is always kept.
        if number % 20 == 0:
            last = counter.count("guesser", now_s=0.0)

    assert last > 900


def test_a_step_costs_the_same_however_callers_come() -> None:
    def took_s(guesses: int) -> float:
        counter = GuessCounter[int](WINDOW_S)
        begun_s = time.process_time()
        for number in range(guesses):
            counter.count(number, now_s=0.0)
        return time.process_time() - begun_s

    few, many = took_s(2 * MAX_CALLERS), took_s(20 * MAX_CALLERS)

    # Ten times as many, all of which take another caller's place; a search would make it a thousand times.
    assert many < 40 * few


@given(GUESSES, st.integers(1, 15))
def test_the_count_is_never_more_than_the_caller_has_made(
    guesses: list[tuple[int, float]], capacity: int
) -> None:
    counter, now_s = GuessCounter[int](WINDOW_S, capacity=capacity), 0.0
    made: list[tuple[int, float]] = []
    for caller, pause_s in guesses:
        now_s += pause_s
        made.append((caller, now_s))
        count = counter.count(caller, now_s=now_s)

        assert 1 <= count <= sum(1 for one, at_s in made if one == caller and at_s > now_s - 2 * WINDOW_S)
        assert counter.callers(now_s=now_s) <= capacity


@given(st.lists(st.integers(0, 12), max_size=200), st.integers(1, 15))
def test_a_caller_with_more_than_its_share_is_in_the_table(guesses: list[int], capacity: int) -> None:
    counter = GuessCounter[int](WINDOW_S, capacity=capacity)
    for caller in guesses:
        counter.count(caller, now_s=0.0)
    table = counter._current  # the invariants at the top of the module
    true = Counter(guesses)

    found = {caller: tally for caller in true if (tally := table.get(caller)) is not None}
    assert len(found) == len(table) <= capacity
    assert sum(tally.count for tally in found.values()) == len(guesses)
    assert all(tally.sure <= true[caller] <= tally.count for caller, tally in found.items())
    assert {caller for caller, made in true.items() if made > len(guesses) / capacity} <= found.keys()


@given(GUESSES)
def test_with_room_for_all_the_first_window_is_exact(guesses: list[tuple[int, float]]) -> None:
    counter, now_s = GuessCounter[int](WINDOW_S), 0.0
    began_s, made = -math.inf, Counter[int]()
    for caller, pause_s in guesses:
        now_s += pause_s
        if now_s - began_s >= 2 * WINDOW_S:
            began_s, made = now_s, Counter()
        elif now_s - began_s >= WINDOW_S:
            return
        made[caller] += 1

        assert counter.count(caller, now_s=now_s) == made[caller]
