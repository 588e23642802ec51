"""Structured logs: JSON for machines, colours for people, Stackdriver's form for Google Cloud.

    log.warning("storage_not_ready", extra={"error": …}) ──> one handler ──> one line on the stream
       the standard library, in every module                 structlog's processors, here

Modules log through the standard library: an event's name, and fields in `extra`. They need not know this
module, and a library's lines take the same way. The event's name is a constant, so that logs can be searched
and counted by it; all that varies is in the fields.

Secrets. No module logs a token, a bag or an address of the storage; a token is logged by its fingerprint
(fingerprint.py). Two nets are below that rule:

- Fields with the name of a secret are redacted: those of `_SECRET_FIELDS`, and the flags that are declared
  secret.
- Loggers of libraries that would log keys or statements have a least level, also under `-log.level=debug`.

Strangers. Any field may hold what a client, another node or a file has sent. Characters that forge a line or
drive a terminal are escaped in all three forms (printable.py). A traceback in development has many lines, and
each of them is indented.

Failing to log never fails a call, and never delays it: a thread writes the lines (line_writer.py). A reader
that does not read, a full disk or a closed pipe loses lines, which are counted.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Final, TextIO, cast

import structlog
from structlog.typing import EventDict, ExcInfo, Processor, WrappedLogger

from mnemosyned import __version__
from mnemosyned.observe import stray_output
from mnemosyned.observe.line_writer import LineWriter
from mnemosyned.observe.printable import printable, printable_block, printable_json
from mnemosyned.observe.stray_output import ForeignLines, Prints, StrayOutput

_LEVEL_BY_NAME: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    # zap's three names for the worst.
    "dpanic": logging.CRITICAL,
    "panic": logging.CRITICAL,
    "fatal": logging.CRITICAL,
}
_SEVERITY_BY_LEVEL: Final = {"warn": "WARNING", "warning": "WARNING", "exception": "ERROR"}
# Fields of calls and sessions. `configure` adds the flags that are declared secret.
_SECRET_FIELDS: Final = {
    "token", "access_token", "refresh_token", "bag", "dsn", "password", "authorization", "secret",
}  # fmt: skip
_TRACEBACK_INDENT: Final = "    | "
_STANDARD_ERROR: Final = 2
# A stop waits this long for a reader of the log that may be stuck.
CLOSE_TIMEOUT_S: Final = 1.0
LEAST_LEVEL_BY_LOGGER: Final = {
    # Logs keys at debug, and our keys are tokens.
    "aiocache": logging.INFO,
    "asyncio": logging.WARNING,
    # Warns of each lost connection with a traceback; our own `storage_lost` says it in one line.
    "asyncpg": logging.ERROR,
    "grpc": logging.WARNING,
    # Logs each command at debug, with its documents.
    "pymongo": logging.WARNING,
}


def configure(
    environment: str,
    level: str,
    *,
    secret_flags: Iterable[str] = (),
    stream: TextIO | None = None,
    worker: int | None = None,
) -> None:
    """Send all logs of the process to the stream; without one, to the standard error, by a thread.

    `environment` is production, development or stackdriver; `level` is one of the names of -log.level. Fields
    that are named like one of `secret_flags`, with _ for dots, are redacted. With `worker`, each line says
    which process of the daemon has written it. Call it once, at the start: it replaces the handlers of the
    root logger.
    """
    _SECRET_FIELDS.update(name.replace(".", "_") for name in secret_flags)
    # Otherwise the standard library prints a traceback for each line that cannot be written.
    logging.raiseExceptions = False
    logging.captureWarnings(capture=True)
    form = formatter(environment, sys.stderr if stream is None else stream)
    handler = _ThreadedHandler() if stream is None else logging.StreamHandler(stream)
    handler.setFormatter(form)
    handler.addFilter(ForeignLines())
    if worker is not None:
        handler.addFilter(partial(_signed, worker))
    logging.getLogger().handlers[:] = [handler]
    set_level(level)
    stray_output.log_what_python_prints()


def _signed(worker: int, record: logging.LogRecord) -> bool:
    record.worker = worker
    return True


def close() -> None:
    """Write the lines that still wait, within CLOSE_TIMEOUT_S; later lines are lost."""
    for handler in logging.getLogger().handlers:
        handler.close()


def capture_native_output() -> None:
    """Log what libraries in C print to the standard error, which could wait for it and has no form."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _ThreadedHandler):
            handler.capture_strays()


def dropped_lines() -> int:
    """Return how many lines the standard error did not take."""
    handlers = logging.getLogger().handlers
    return sum(handler.writer.dropped for handler in handlers if isinstance(handler, _ThreadedHandler))


class _ThreadedHandler(logging.Handler):
    """Formats a line on the thread that logs it, and has another thread write it to the standard error."""

    def __init__(self) -> None:
        super().__init__()
        self.writer = LineWriter(_STANDARD_ERROR, render_dropped=self._render_dropped)
        self._strays: StrayOutput | None = None
        self._standard_error = sys.stderr
        sys.stderr = cast("TextIO", Prints())

    def capture_strays(self) -> None:
        self._strays = StrayOutput(self.writer)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as exc:  # noqa: BLE001  # no line is worth a failed call
            fields = {"of": record.name, "error": type(exc).__name__}
            line = self._render(logging.ERROR, "log_line_failed", fields)
        self.writer.put(line + "\n")

    def close(self) -> None:
        sys.stderr = self._standard_error
        if self._strays is not None:
            self._strays.close()
            self._strays = None
        self.writer.close(timeout_s=CLOSE_TIMEOUT_S)
        super().close()

    def _render_dropped(self, count: int, reason: str) -> str:
        return self._render(logging.WARNING, "log_lines_dropped", {"lines": count, "reason": reason}) + "\n"

    def _render(self, level: int, event: str, fields: Mapping[str, object]) -> str:
        record = logging.LogRecord(__name__, level, __file__, 0, event, None, None)
        record.__dict__.update(fields)
        return self.format(record)


def formatter(environment: str, stream: TextIO) -> logging.Formatter:
    """Return the formatter of an environment; development has colours if the stream is a terminal."""
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.ExtraAdder(),
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            _without_secrets,
            *_RENDERERS[environment](stream),
        ],
    )


def set_level(level: str) -> None:
    """Log from this level on; loggers of LEAST_LEVEL_BY_LOGGER from their own level, if that is higher."""
    logging.getLogger().setLevel(_LEVEL_BY_NAME[level])
    for name, least in LEAST_LEVEL_BY_LOGGER.items():
        logging.getLogger(name).setLevel(max(least, _LEVEL_BY_NAME[level]))


def _production(_: TextIO) -> list[Processor]:
    return [
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
        structlog.processors.format_exc_info,
        structlog.processors.EventRenamer("msg"),
        _first("ts", "level", "logger", "msg"),
        _json,
    ]


def _stackdriver(_: TextIO) -> list[Processor]:
    return [
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        structlog.processors.format_exc_info,
        structlog.processors.EventRenamer("message"),
        _as_google_names_it,
        _first("severity", "time", "eventTime", "message", "serviceContext"),
        _json,
    ]


def _development(stream: TextIO) -> list[Processor]:
    return [
        structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
        _as_printable,
        structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=_printable_traceback),
    ]


_RENDERERS: Final[dict[str, Callable[[TextIO], list[Processor]]]] = {
    "production": _production,
    "development": _development,
    "stackdriver": _stackdriver,
}


def _without_secrets(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Redact fields that should never have been logged: a safety net, not the rule."""
    for name in _SECRET_FIELDS & event.keys():
        event[name] = "[redacted]"
    return event


def _json(_: WrappedLogger, __: str, event: EventDict) -> str:
    return printable_json(json.dumps(event, ensure_ascii=False, default=str))


def _as_printable(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = printable(value)
        elif name != "exc_info" and not isinstance(value, bool | int | float | None):
            event[name] = printable(repr(value))
    return event


def _printable_traceback(stream: TextIO, exc_info: ExcInfo) -> None:
    text = io.StringIO()
    structlog.dev.plain_traceback(text, exc_info)
    stream.write("\n" + printable_block(text.getvalue().lstrip("\n"), _TRACEBACK_INDENT))


def _as_google_names_it(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    level = str(event.pop("level"))
    # Cloud Logging reads `time`; the Go daemon has written `eventTime`.
    event["eventTime"] = event["time"]
    event["severity"] = _SEVERITY_BY_LEVEL.get(level, level.upper())
    if "trace_id" in event:
        project = os.environ.get("GOOGLE_CLOUD_PROJECT")
        trace_id = str(event.pop("trace_id"))
        event["logging.googleapis.com/trace"] = (
            f"projects/{project}/traces/{trace_id}" if project else trace_id
        )
        event["logging.googleapis.com/spanId"] = event.pop("span_id", "")
        event["logging.googleapis.com/trace_sampled"] = event.pop("trace_sampled", False)
    event["serviceContext"] = {"service": "mnemosyned", "version": __version__}
    return event


def _first(*names: str) -> Processor:
    # JSON does not care, but people read the first columns of a line.
    def reorder(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        ordered: EventDict = {name: event[name] for name in names if name in event}
        ordered.update(event)
        return ordered

    return reorder
