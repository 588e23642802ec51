from __future__ import annotations

import logging
import time
from collections import Counter

import pytest

from aio.deadline import NO_DEADLINE
from aio.rate_limit import LINES_PER_SECOND, LogRateLimiter
from mnemosyned.errors import SessionAlreadyExists, SessionNotFound, StorageUnavailable
from mnemosyned.transport.call import fail, tell_left_out
from mnemosyned.transport.methods import MethodTable


def test_lines_beyond_the_limiter_are_left_out_and_told_in_the_next_second() -> None:
    limiter = LogRateLimiter()

    assert [limiter.take(10.0) for _ in range(LINES_PER_SECOND)] == [0] * LINES_PER_SECOND
    assert [limiter.take(10.9) for _ in range(3)] == [None] * 3
    assert limiter.take(11.0) == 3
    assert limiter.take(11.1) == 0


def test_what_no_later_line_tells_is_told_when_the_second_is_over() -> None:
    limiter = LogRateLimiter(1)
    for _ in range(4):
        limiter.take(10.0)

    assert limiter.take_rest(10.9) == 0
    assert limiter.take_rest(11.0) == 3
    assert limiter.take_rest(11.0) == 0
    assert limiter.take(11.0) == 0


class Call:
    peer = "192.0.2.1:1"
    deadline = NO_DEADLINE
    certificate_names = ()

    def metadata(self, _: str) -> None:
        return None


def test_failures_by_a_callers_fault_and_others_are_logged_within_a_limit_each(
    caplog: pytest.LogCaptureFixture,
) -> None:
    table = MethodTable()
    table.add_unary("a.Service", "Get", lambda message, _: message)
    method = table.unary["/a.Service/Get"]
    unavailable = StorageUnavailable("mnemosyned: storage: unavailable")
    count = 2 * LINES_PER_SECOND
    with caplog.at_level(logging.INFO, "mnemosyned.transport.call"):
        for exc in (SessionAlreadyExists(), SessionNotFound(), unavailable, KeyError("a bug")):
            for _ in range(count):
                fail(method, Call(), exc, time.perf_counter())

    levels = Counter(record.levelname for record in caplog.records)
    assert levels == {"INFO": LINES_PER_SECOND, "WARNING": 10, "ERROR": 10}
    codes = ("ALREADY_EXISTS", "NOT_FOUND", "UNAVAILABLE", "INTERNAL")
    assert method.stats.by_code == dict.fromkeys(codes, count)


def test_each_failure_of_an_outage_is_a_line_or_is_counted_in_one(caplog: pytest.LogCaptureFixture) -> None:
    table = MethodTable()
    table.add_unary("a.Service", "Get", lambda message, _: message)
    (method,) = table.methods()
    count = 1000
    with caplog.at_level(logging.INFO, "mnemosyned.transport.call"):
        for _ in range(count):
            fail(method, Call(), StorageUnavailable("mnemosyned: storage: unavailable"), time.perf_counter())
        tell_left_out(table.methods(), time.perf_counter() + 1)
        tell_left_out(table.methods(), time.perf_counter() + 1)

    lines = Counter(record.message for record in caplog.records)
    assert lines["rpc_failed"] in {10, 20}  # 20: a second has begun meanwhile
    assert lines["rpc_failed_left_out"] == 1
    left_out = sum(vars(record).get("left_out", 0) for record in caplog.records)
    assert lines["rpc_failed"] + left_out == count
