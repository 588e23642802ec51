"""Lines that no log call of this project has made, and that belong into its log all the same.

    who                                        | taken by
    -------------------------------------------+--------------------------------------------------------
    Python: `__del__`, threads                 | `log_what_python_prints`: its hooks
    the event loop: callbacks, lost exceptions | `log_loop_failure`, the loop's exception handler
    code in Python that prints to `sys.stderr` | `Prints`, in its place
    libraries in C, as grpcio's core           | `StrayOutput`, a pipe in place of the standard error
    libraries that log                         | as our own lines, but limited: `ForeignLines`

Callers or an outage can cause any number of these, and a bare line could wait for a reader of the log that
does not read. What a dying process prints (an abort, faulthandler) takes no such way.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from aio.rate_limit import LogRateLimiter, fields_of
from mnemosyned.observe.line_writer import LineWriter

log = logging.getLogger(__name__)
# Below the logger that -grpc.debug turns to DEBUG.
_native_log = logging.getLogger("mnemosyned.transport.native")

_STANDARD_ERROR: Final = 2
_OURS: Final = frozenset({"aio", "cache", "cluster", "http2", "mnemosyned"})
_LINES_PER_SECOND: Final = 10
# Names of loggers. Libraries have few; this is against one that makes a name for each object.
_MAX_LIMITERS: Final = 1_000
# As grpcio's core writes: I0000 00:00:1790000000.000000 123 file.cc:45] text
_NATIVE_LINE: Final = re.compile(r"([IWEF])\d{4} [\d:.]+ +\d+ ([\w.-]+:\d+)\] (.*)")
_NATIVE_LEVEL: Final = {"I": logging.DEBUG, "W": logging.WARNING, "E": logging.ERROR, "F": logging.CRITICAL}
_READ_BYTES: Final = 65_536
_MAX_LINE_BYTES: Final = 16_384
_LAST_LINES_TIMEOUT_S: Final = 0.5


class ForeignLines(logging.Filter):
    """Lets a library's logger write 10 lines a second of each level, and tells how many it left out.

    Lines below INFO are not limited: who asks for them wants them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._limiters: dict[tuple[str, int], LogRateLimiter] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is written."""
        if record.levelno < logging.INFO or record.name.partition(".")[0] in _OURS:
            return True
        key = record.name, record.levelno
        if key not in self._limiters and len(self._limiters) >= _MAX_LIMITERS:
            key = "", record.levelno
        left_out = self._limiters.setdefault(key, LogRateLimiter(_LINES_PER_SECOND)).take(time.monotonic())
        record.__dict__.update(fields_of(left_out or 0))
        return left_out is not None


def log_what_python_prints() -> None:
    """Log what the interpreter would print to the standard error."""
    limiter = LogRateLimiter(_LINES_PER_SECOND)

    def write(event: str, exc: BaseException | None) -> None:
        left_out = None if exc is None else limiter.take(time.monotonic())
        if left_out is not None:
            log.error(event, exc_info=exc, extra=fields_of(left_out))

    # Not the object, whose text may hold a token.
    sys.unraisablehook = lambda caught: write("exception_ignored", caught.exc_value)
    threading.excepthook = lambda caught: write("thread_failed", caught.exc_value)


def log_loop_failure(_: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
    """Log what a callback has raised, or what no task waited for: without their arguments, as secrets are."""
    task = context.get("future") or context.get("task")
    name = {"task": task.get_name()} if isinstance(task, asyncio.Task) else {}
    # asyncio appends the callback with its arguments to some texts.
    text = str(context.get("message", "")).partition("(")[0].partition("<")[0].strip()
    logging.getLogger("asyncio").error(
        "event_loop_failed", exc_info=context.get("exception"), extra={"error": text, **name}
    )


class Prints:
    """The standard error for Python code, of which each line becomes one of the log."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self._rest = ""

    def write(self, text: str) -> int:
        """Log the lines that are complete."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.strip():
                log.warning("printed", extra={"text": line[:_MAX_LINE_BYTES]})
        self._rest = self._rest[-_MAX_LINE_BYTES:]
        return len(text)

    def flush(self) -> None:
        """Do nothing: the rest of a line waits for its end."""

    def isatty(self) -> bool:
        """Tell that nobody sees colours."""
        return False


class StrayOutput:
    """What C code writes to the standard error: it goes into a pipe, and from there into the log, by lines.

    The lines of the log go to a copy of what the descriptor was. The pipe never holds the C code, which may
    have the lock of the interpreter: what does not fit is lost.
    """

    def __init__(self, writer: LineWriter) -> None:
        self._log_descriptor = os.dup(_STANDARD_ERROR)
        if faulthandler.is_enabled():
            # Nobody reads the pipe when it writes.
            faulthandler.enable(file=self._log_descriptor)
        self._reader, pipe = os.pipe()
        os.set_blocking(pipe, False)
        writer.descriptor = self._log_descriptor
        os.dup2(pipe, _STANDARD_ERROR)
        os.close(pipe)
        self._thread = threading.Thread(target=self._run, name="stray output", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give the standard error back, and log what is left."""
        os.dup2(self._log_descriptor, _STANDARD_ERROR)
        self._thread.join(_LAST_LINES_TIMEOUT_S)

    def _run(self) -> None:
        rest = b""
        with suppress(OSError):
            while content := os.read(self._reader, _READ_BYTES):
                *lines, rest = (rest + content).split(b"\n")
                for line in lines:
                    _log_native(line[:_MAX_LINE_BYTES].decode(errors="replace"))
                rest = rest[-_MAX_LINE_BYTES:]
        if rest:
            _log_native(rest.decode(errors="replace"))


def _log_native(line: str) -> None:
    known = _NATIVE_LINE.match(line)
    if known:
        _native_log.log(_NATIVE_LEVEL[known[1]], "native", extra={"place": known[2], "text": known[3]})
    elif line.strip():
        _native_log.debug("native", extra={"text": line})
