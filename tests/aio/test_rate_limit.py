from __future__ import annotations

import logging
import time

import pytest

from aio.deadline import NO_DEADLINE
from aio.rate_limit import LINES_PER_SECOND, LogRateLimiter
from mnemosyned.errors import SessionNotFound, StorageUnavailable
from mnemosyned.transport.call import fail
from mnemosyned.transport.methods import MethodTable


def test_lines_beyond_the_limiter_are_left_out_and_told_in_the_next_second() -> None:
    limiter = LogRateLimiter()

    assert [limiter.take(10.0) for _ in range(LINES_PER_SECOND)] == [0] * LINES_PER_SECOND
    assert [limiter.take(10.9) for _ in range(3)] == [None] * 3
    assert limiter.take(11.0) == 3
    assert limiter.take(11.1) == 0


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
    with caplog.at_level(logging.INFO, "mnemosyned.transport.call"):
        for exc in (SessionNotFound(), StorageUnavailable("mnemosyned: storage: unavailable")):
            for _ in range(2 * LINES_PER_SECOND):
                fail(method, Call(), exc, time.perf_counter())

    levels = [record.levelname for record in caplog.records]
    assert (levels.count("INFO"), levels.count("WARNING")) == (LINES_PER_SECOND, LINES_PER_SECOND)
    assert method.stats.by_code == {"NOT_FOUND": 2 * LINES_PER_SECOND, "UNAVAILABLE": 2 * LINES_PER_SECOND}
