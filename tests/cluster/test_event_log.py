from __future__ import annotations

import logging

import pytest

from cluster import event_log
from cluster.event_log import RefusalLog, log_event
from cluster.member import Event, EventKind, Member, Phase, State

MEMBER = Member("a:1", "10.0.0.1:1", 5, 2, State.DEAD, Phase.ACTIVE, 7)


def fields(record: logging.LogRecord) -> dict[str, object]:
    names = (
        "node",
        "address",
        "generation",
        "incarnation",
        "evidence",
        "accuser",
        "confirmations",
        "seconds",
    )
    return {name: vars(record)[name] for name in names if name in vars(record)}


def test_an_event_is_a_line_with_what_is_known_of_it(caplog: pytest.LogCaptureFixture) -> None:
    log_event(Event(EventKind.DEAD, MEMBER, "silent", accuser="b:1", confirmations=2, seconds=1.23456))

    (record,) = caplog.records
    assert (record.message, record.levelno) == ("member_dead", logging.WARNING)
    assert fields(record) == {
        "node": "a:1",
        "address": "10.0.0.1:1",
        "generation": 5,
        "incarnation": 2,
        "evidence": "silent",
        "accuser": "b:1",
        "confirmations": 2,
        "seconds": 1.235,
    }


def test_fields_that_say_nothing_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        log_event(Event(EventKind.JOINED, MEMBER))

    (record,) = caplog.records
    assert (record.message, record.levelno) == ("member_joined", logging.INFO)
    assert fields(record).keys() == {"node", "address", "generation", "incarnation"}


def test_a_refusal_is_logged_once_per_peer_and_event_in_ten_seconds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    refusals = RefusalLog()
    for now in (0.0, 9.9, 10.0):
        refusals.write("peer_refused", "a:1", "why", now=now)
    refusals.write("peer_refused", "b:1", "why", now=10.0)
    refusals.write("peer_refuses_us", "a:1", "why", now=10.0)

    assert [record.message for record in caplog.records] == ["peer_refused"] * 3 + ["peer_refuses_us"]
    assert [vars(record).get("left_out") for record in caplog.records] == [None, 1, None, None]


def test_events_are_logged_within_a_limit_and_the_next_one_says_what_is_missing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1e9
    monkeypatch.setattr(event_log.time, "monotonic", lambda: now_s)
    for _ in range(500):
        log_event(Event(EventKind.DEAD, MEMBER))
    now_s += 1
    log_event(Event(EventKind.DEAD, MEMBER))

    assert len(caplog.records) == 101
    assert vars(caplog.records[-1])["left_out"] == 400


def test_refusals_are_remembered_within_a_bound(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "_MAX_REMEMBERED", 2)
    refusals = RefusalLog()
    for name in "abc":
        refusals.write("peer_refused", name * 1000, "why", now=0.0)

    assert len(refusals._logged_s) == 1
    assert [vars(record)["peer_node"] for record in caplog.records] == ["a" * 300, "b" * 300, "c" * 300]
