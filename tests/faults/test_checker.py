"""Histories written by hand: what breaks each promise is found, and what may happen is not."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping

import pytest
from faults.checker import LATE_BY_S, Anomaly, check
from faults.history import Kind, Operation, Outcome

A, DONE, ABSENT, MAYBE = "a", Outcome.DONE, Outcome.ABSENT, Outcome.MAYBE


def call(
    kind: Kind,
    began_s: float,
    ended_s: float,
    outcome: Outcome = DONE,
    *,
    writes: Mapping[str, int] | None = None,
    sees: Mapping[str, int] | None = None,
    deadline_s: float | None = None,
) -> Operation:
    return Operation(
        token="t",
        kind=kind,
        node="n0",
        began_s=began_s,
        ended_s=ended_s,
        deadline_s=began_s + 3 if deadline_s is None else deadline_s,
        outcome=outcome,
        written=writes or {},
        seen=sees or {},
    )


def start(began_s: float, ended_s: float, value: int = 1, outcome: Outcome = DONE) -> Operation:
    return call(Kind.START, began_s, ended_s, outcome, writes={A: value})


def change(began_s: float, ended_s: float, value: int, outcome: Outcome = DONE) -> Operation:
    return call(
        Kind.SET, began_s, ended_s, outcome, writes={A: value}, sees={A: value} if outcome is DONE else {}
    )


def end(began_s: float, ended_s: float, outcome: Outcome = DONE, kind: Kind = Kind.ABANDON) -> Operation:
    return call(kind, began_s, ended_s, outcome)


def get(began_s: float, ended_s: float, value: int | None) -> Operation:
    if value is None:
        return call(Kind.GET, began_s, ended_s, ABSENT)
    return call(Kind.GET, began_s, ended_s, sees={A: value})


def other_key(began_s: float, ended_s: float, value: int) -> Operation:
    """Set another key; the answer has the whole bag of the storage."""
    return call(Kind.SET, began_s, ended_s, writes={"b": 99}, sees={A: value, "b": 99})


GOOD: dict[str, list[Operation]] = {
    "absent before all": [get(0, 1, None)],
    "a life": [start(0, 1), get(2, 3, 1), change(4, 5, 2), get(6, 7, 2), end(8, 9), get(10, 11, None)],
    "seen before the answer": [start(0, 5), get(1, 2, 1)],
    "not seen before the answer": [start(0, 5), get(1, 2, None)],
    "old bag during a change": [start(0, 1), change(2, 9, 2), get(3, 4, 2), get(5, 6, 1)],
    "read across an end": [start(0, 1), get(2, 9, 1), end(3, 4)],
    "read across a start": [get(0, 9, None), start(1, 2)],
    "a failed change is seen": [start(0, 1), change(2, 3, 2, MAYBE), get(4, 5, 2)],
    "a failed change is not seen": [start(0, 1), change(2, 3, 2, MAYBE), get(9, 10, 1)],
    "a failed change comes at its deadline": [
        start(0, 1),
        change(2, 2.5, 2, MAYBE),
        change(4, 4.5, 3),
        get(5, 6, 2),
    ],
    "a failed end is seen": [start(0, 1), end(2, 3, MAYBE), get(4, 5, None)],
    "a failed end comes after a start": [
        start(0, 1),
        end(2, 2.5, MAYBE),
        end(2.6, 2.7, ABSENT),
        start(3, 4, 2),
        get(5, 6, None),
    ],
    "a failed start is seen": [start(0, 1, 1, MAYBE), get(2, 3, 1)],
    "a failed start is ended": [start(0, 1, 1, MAYBE), end(4, 5), get(6, 7, None)],
    "changes at once in any order": [
        start(0, 1),
        change(2, 5, 2),
        change(3, 4, 3),
        get(6, 7, 2),
        get(8, 9, 3),
    ],
    "ends at once": [start(0, 1), end(2, 5), end(3, 4, ABSENT), get(6, 7, None)],
    "deleted": [start(0, 1), end(2, 3, kind=Kind.DELETE), get(4, 5, None)],
    "deleted by its own first try": [start(0, 1), end(2, 3, ABSENT, Kind.DELETE), get(4, 5, None)],
    "started again": [start(0, 1), end(2, 3), start(4, 5, 2), get(6, 7, 2)],
    "never sent": [start(0, 1), end(2, 3, Outcome.UNSENT), get(4, 5, 1)],
    "taken by its own first try": [start(0, 1, 1, Outcome.TAKEN), get(2, 3, 1)],
    "a read that failed": [start(0, 1), call(Kind.GET, 2, 3, MAYBE)],
}

BAD: dict[str, tuple[Anomaly, list[Operation]]] = {
    "served after its end": (Anomaly.STALE, [start(0, 1), end(2, 3), get(4, 5, 1)]),
    "served after its delete": (Anomaly.STALE, [start(0, 1), end(2, 3, kind=Kind.DELETE), get(4, 5, 1)]),
    "exists after its end": (Anomaly.STALE, [start(0, 1), end(2, 3), call(Kind.EXISTS, 4, 5)]),
    "served after it was said to be gone": (
        Anomaly.STALE,
        [start(0, 1), end(2, 3, MAYBE), end(4, 5, ABSENT), get(6, 7, 1)],
    ),
    "served after its end and a failed start": (
        Anomaly.STALE,
        [start(0, 1), end(2, 3), start(4, 5, 2, MAYBE), get(6, 7, 1)],
    ),
    "changed during its end and served after it": (
        Anomaly.STALE,
        [start(0, 1), end(2, 5), change(3, 4, 2), get(6, 7, 2)],
    ),
    "the bag before": (Anomaly.OLD_BAG, [start(0, 1), change(2, 3, 2), get(4, 5, 1)]),
    "the bag before the last": (
        Anomaly.OLD_BAG,
        [start(0, 1), change(2, 3, 2), change(4, 5, 3), get(6, 7, 2)],
    ),
    "the bag of the session before": (
        Anomaly.OLD_BAG,
        [start(0, 1), end(2, 3), start(4, 5, 2), get(6, 7, 1)],
    ),
    "the bag of a failed change": (
        Anomaly.OLD_BAG,
        [start(0, 1), change(2, 3, 2, MAYBE), change(5 + LATE_BY_S + 0.1, 7, 3), get(8, 9, 2)],
    ),
    "denied after its start": (Anomaly.HIDDEN, [start(0, 1), get(2, 3, None)]),
    "exists not after its start": (Anomaly.HIDDEN, [start(0, 1), call(Kind.EXISTS, 2, 3, ABSENT)]),
    "denied after it was started again": (
        Anomaly.HIDDEN,
        [start(0, 1), end(2, 3), start(4, 5, 2), get(6, 7, None)],
    ),
    "a start is lost": (Anomaly.LOST, [start(0, 1), end(2, 3, ABSENT)]),
    "a start is not found by a change": (Anomaly.LOST, [start(0, 1), change(2, 3, 2, ABSENT)]),
    "a change is lost": (Anomaly.LOST, [start(0, 1), change(2, 3, 2), other_key(4, 5, 1)]),
    "an end is lost": (Anomaly.LOST, [start(0, 1), end(2, 3), change(4, 5, 2)]),
    "a failed change comes after its deadline": (
        Anomaly.LATE,
        [start(0, 1), change(2, 3, 2, MAYBE), change(5 + LATE_BY_S + 0.1, 7, 3), other_key(8, 9, 2)],
    ),
    "a failed start comes after its deadline": (
        Anomaly.LATE,
        [start(0, 1, 1, MAYBE), end(3 + LATE_BY_S + 0.1, 5, ABSENT), other_key(6, 7, 1)],
    ),
    "a failed end comes after its deadline": (
        Anomaly.LATE,
        [
            start(0, 1),
            end(2, 3, MAYBE),
            end(3.5, 4, ABSENT),
            start(5 + LATE_BY_S + 0.1, 7, 2),
            change(8, 9, 3, ABSENT),
        ],
    ),
    "a failed end comes after another one": (
        Anomaly.LATE,
        [
            start(0, 1),
            end(2, 3, MAYBE, Kind.DELETE),
            end(6, 7),
            start(8, 9, 2),
            change(10, 11, 3, ABSENT),
        ],
    ),
    "a value that was never written": (Anomaly.OLD_BAG, [start(0, 1), get(2, 3, 7)]),
}


@pytest.mark.parametrize("history", GOOD.values(), ids=GOOD)
def test_what_may_happen_is_no_anomaly(history: list[Operation]) -> None:
    assert check(history) == []


@pytest.mark.parametrize(("anomaly", "history"), BAD.values(), ids=BAD)
def test_what_breaks_a_promise_is_found_once(anomaly: Anomaly, history: list[Operation]) -> None:
    (finding,) = check(history)

    assert finding.anomaly is anomaly


def test_sessions_are_judged_alone() -> None:
    other = start(0, 1, 5)
    other.token = "another"

    assert check([other, get(2, 3, None)]) == []


def test_the_history_is_judged_in_any_order() -> None:
    _, history = BAD["the bag before the last"]
    turned = list(reversed(history))

    assert [finding.seen for finding in check(turned)] == [history[-1]]


def test_a_register_that_takes_effect_at_random_instants_is_never_accused() -> None:
    for seed in range(300):
        findings = check(simulated(random.Random(seed), calls=60))
        assert findings == [], seed


def test_a_cache_that_is_never_told_is_accused() -> None:
    accused = sum(bool(check(simulated(random.Random(seed), calls=200, cached=0.2))) for seed in range(100))

    assert accused > 50


def test_a_long_history_is_judged_in_seconds() -> None:
    history = simulated(random.Random(1), calls=50_000)
    began_s = time.process_time()
    check(history)

    assert time.process_time() - began_s < 10


def simulated(rng: random.Random, *, calls: int, cached: float = 0.0) -> list[Operation]:
    """A correct register: each call takes effect at one instant of its interval, or a failed one not at all.

    A share `cached` of the reads is answered with what the session was some time before.
    """
    instants: list[tuple[float, Operation]] = []
    for number in range(1, calls + 1):
        began_s = rng.uniform(0, calls / 2)
        took_s = rng.expovariate(1)
        kind = rng.choice([*Kind, Kind.SET, Kind.GET, Kind.GET])
        one = call(
            kind, began_s, began_s + took_s, writes={A: number} if kind in {Kind.START, Kind.SET} else {}
        )
        latest_s = one.ended_s
        if rng.random() < 0.2 and kind not in {Kind.GET, Kind.EXISTS}:
            one.outcome, latest_s = MAYBE, one.deadline_s
        instants.append((rng.uniform(one.began_s, max(latest_s, one.began_s)), one))
    value: int | None = None
    before: list[int | None] = [None]
    for _, one in sorted(instants, key=lambda pair: pair[0]):
        if one.outcome is MAYBE and rng.random() < 0.5:
            continue
        served = value
        if one.kind in {Kind.GET, Kind.EXISTS} and rng.random() < cached:
            served = rng.choice(before[-10:])
        value = effect(one, value, served)
        before.append(value)
    return [one for _, one in instants]


def effect(one: Operation, value: int | None, served: int | None) -> int | None:
    """Answer a call, and return what the session is then."""
    is_known = one.outcome is not MAYBE
    if one.kind in {Kind.GET, Kind.EXISTS}:
        one.outcome = ABSENT if served is None else DONE
        one.seen = {A: served} if one.kind is Kind.GET and served is not None else {}
        return value
    if one.kind is Kind.START:
        if is_known and value is not None:
            one.outcome = Outcome.TAKEN
        return one.written[A] if value is None else value
    if is_known and value is None:
        one.outcome = ABSENT
    if one.kind is not Kind.SET:
        return None
    if value is None:
        return None
    one.seen = dict(one.written) if is_known else {}
    return one.written[A]
