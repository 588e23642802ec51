"""Measures in the daemon itself how long its event loop stands still; on the daemon's PYTHONPATH.

A timer of one millisecond runs on every event loop of uvloop. Each time that it comes late is a line in the
file that HEARTBEAT names: when, how late, and how long the loop's thread has worked since the last time. The
work does not depend on what else the machine does; all in seconds.
"""

import asyncio
import os
import time
from pathlib import Path

import uvloop

_PERIOD_S = 0.001
_LATE_S = 0.004
_new_event_loop = uvloop.new_event_loop


def _with_heartbeat() -> asyncio.AbstractEventLoop:
    loop = _new_event_loop()
    file = Path(os.environ["HEARTBEAT"]).open("a", buffering=1)  # noqa: SIM115  # as long as the process

    def beat(due_s: float, worked_s: float) -> None:
        now_s, work_s = time.monotonic(), time.thread_time()
        if now_s - due_s > _LATE_S:
            file.write(f"{now_s} {now_s - due_s} {work_s - worked_s}\n")
        loop.call_later(_PERIOD_S, beat, now_s + _PERIOD_S, work_s)

    loop.call_later(_PERIOD_S, beat, time.monotonic() + _PERIOD_S, time.thread_time())
    return loop


if "HEARTBEAT" in os.environ:
    uvloop.new_event_loop = _with_heartbeat
