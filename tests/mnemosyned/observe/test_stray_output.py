"""Whatever writes to the standard error of a daemon, each line of it has the form of the log."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from typing import Any

from mnemosyned.observe.stray_output import ForeignLines

PROGRAM = """
import asyncio, faulthandler, gc, logging, os, sys, threading, warnings
from mnemosyned.observe import logs
from mnemosyned.observe.stray_output import log_loop_failure

class Broken:
    def __del__(self): raise ValueError("in __del__")
    def __str__(self): raise ValueError("in __str__")
    __repr__ = __str__

def fail(secret): raise ValueError("in a callback")

async def fail_unseen(): raise ValueError("in a task")

async def main():
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(log_loop_failure)
    loop.call_soon(fail, "the-token-of-somebody")
    task = loop.create_task(fail_unseen())
    await asyncio.wait([task])
    del task
    gc.collect()

faulthandler.enable()
logs.configure("production", "info")
logs.capture_native_output()
os.write(2, b"E1126 13:19:50.161266   30753 log.cc:110] a library in C\\nW0000 00:00:17.2 1 a.cc:1] cut")
print("a library in Python", file=sys.stderr)
warnings.warn("a warning")
thread = threading.Thread(target=fail, args=("",))
thread.start()
thread.join()
Broken()
logging.getLogger("mnemosyned.test").info("unreadable", extra={"field": Broken()})
asyncio.run(main())
logs.close()
"""


def lines_of(program: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    assert "the-token-of-somebody" not in done.stderr
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_every_stray_line_has_the_form_of_the_log() -> None:
    lines = lines_of(PROGRAM)

    found = {(line["logger"], line["msg"].split(":")[0], line["level"]) for line in lines}
    assert found >= {
        ("mnemosyned.transport.native", "native", "error"),
        ("mnemosyned.transport.native", "native", "warning"),
        ("mnemosyned.observe.stray_output", "printed", "warning"),
        ("mnemosyned.observe.stray_output", "thread_failed", "error"),
        ("mnemosyned.observe.stray_output", "exception_ignored", "error"),
        ("mnemosyned.observe.logs", "log_line_failed", "error"),
        ("asyncio", "event_loop_failed", "error"),
    }
    texts = {line["text"] for line in lines if "text" in line}
    assert texts == {"a library in C", "a library in Python", "cut"}
    tracebacks = "".join(line.get("exception", "") for line in lines)
    for place in ("__del__", "a callback", "a task"):
        assert f"in {place}" in tracebacks


def test_a_crash_is_told_where_the_log_goes() -> None:
    program = PROGRAM.replace("logs.close()", "faulthandler._sigsegv()")
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False
    )

    assert done.returncode < 0
    assert "Fatal Python error: Segmentation fault" in done.stderr


def record(name: str, level: int = logging.ERROR) -> logging.LogRecord:
    return logging.LogRecord(name, level, "", 0, "text", None, None)


def test_a_library_logs_ten_lines_a_second_and_the_next_one_says_what_is_missing() -> None:
    foreign = ForeignLines()
    written = [foreign.filter(record("asyncio")) for _ in range(500)]
    others = [foreign.filter(record(name)) for name in ("asyncpg", "grpc._cython", "py.warnings")]
    ours = [foreign.filter(record("mnemosyned.api")) for _ in range(500)]

    assert sum(written) in {10, 20}  # 20: a second has begun meanwhile
    assert all(others)
    assert all(ours)
    late = record("asyncio")
    waited = threading.Event()
    while not foreign.filter(late):
        waited.wait(0.05)
    assert late.__dict__["left_out"] >= 500 - 20
