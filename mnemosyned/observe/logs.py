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

Failing to log never fails a call: a closed pipe at the other end of the stream loses lines.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Final, TextIO

import structlog
from structlog.typing import EventDict, ExcInfo, Processor, WrappedLogger

from mnemosyned import __version__
from mnemosyned.observe.printable import printable, printable_block, printable_json

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
LEAST_LEVEL_BY_LOGGER: Final = {
    # Logs keys at debug, and our keys are tokens.
    "aiocache": logging.INFO,
    "asyncio": logging.WARNING,
    # Warns of each lost connection with a traceback; our own `storage_lost` says it in one line.
    "asyncpg": logging.ERROR,
    "grpc": logging.WARNING,
}


def configure(
    environment: str, level: str, *, secret_flags: Iterable[str] = (), stream: TextIO | None = None
) -> None:
    """Send all logs of the process to the stream; without one, to the standard error.

    `environment` is production, development or stackdriver; `level` is one of the names of -log.level. Fields
    that are named like one of `secret_flags`, with _ for dots, are redacted. Call it once, at the start: it
    replaces the handlers of the root logger.
    """
    _SECRET_FIELDS.update(name.replace(".", "_") for name in secret_flags)
    # Otherwise the standard library prints a traceback for each line that a closed pipe does not take.
    logging.raiseExceptions = False
    logging.captureWarnings(capture=True)
    stream = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter(environment, stream))
    logging.getLogger().handlers[:] = [handler]
    set_level(level)


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
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="eventTime"),
        structlog.processors.format_exc_info,
        structlog.processors.EventRenamer("message"),
        _as_google_names_it,
        _first("severity", "eventTime", "message", "serviceContext"),
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
    event["severity"] = _SEVERITY_BY_LEVEL.get(level, level.upper())
    event["serviceContext"] = {"service": "mnemosyned", "version": __version__}
    return event


def _first(*names: str) -> Processor:
    # JSON does not care, but people read the first columns of a line.
    def reorder(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        ordered: EventDict = {name: event[name] for name in names if name in event}
        ordered.update(event)
        return ordered

    return reorder
