"""Structured logs: JSON for machines, colours for people, Stackdriver's form for Google Cloud.

Modules log through the standard library, an event name and fields in `extra`; this renders them.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from typing import Final, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from mnemosyned import __version__

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
# Of calls and sessions; `configure` adds the settings that are declared secret.
_SECRET_FIELDS: Final = {
    "token", "access_token", "refresh_token", "bag", "dsn", "password", "authorization", "secret",
}  # fmt: skip
# aiocache logs keys, which are tokens, at debug.
LEAST_LEVEL_BY_LOGGER: Final = {
    "aiocache": logging.INFO,
    "asyncio": logging.WARNING,
    # Warns, with a traceback, of each connection that was lost; storage_failed says so in a line.
    "asyncpg": logging.ERROR,
    "grpc": logging.WARNING,
}


def configure(
    environment: str, level: str, *, secret_flags: Iterable[str] = (), stream: TextIO | None = None
) -> None:
    """Send all logs of the process to the stream, standard error unless given.

    `environment` is production, development or stackdriver; `level` one of the names of -log.level. Fields
    that are named like one of `secret_flags`, with _ for dots, are redacted.
    """
    _SECRET_FIELDS.update(name.replace(".", "_") for name in secret_flags)
    # A closed pipe at the other end must not take a request down.
    logging.raiseExceptions = False
    logging.captureWarnings(capture=True)
    stream = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter(environment, stream))
    logging.getLogger().handlers[:] = [handler]
    set_level(level)


def formatter(environment: str, stream: TextIO) -> logging.Formatter:
    """Return what makes a line of a record; in colours if the stream is a terminal."""
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
    """Log from this level on, and from no lower one than is safe where a library logs."""
    logging.getLogger().setLevel(_LEVEL_BY_NAME[level])
    for name, least in LEAST_LEVEL_BY_LOGGER.items():
        logging.getLogger(name).setLevel(max(least, _LEVEL_BY_NAME[level]))


def _production(_: TextIO) -> list[Processor]:
    return [
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
        structlog.processors.format_exc_info,
        structlog.processors.EventRenamer("msg"),
        _in_order("ts", "level", "logger", "msg"),
        structlog.processors.JSONRenderer(ensure_ascii=False, default=str),
    ]


def _stackdriver(_: TextIO) -> list[Processor]:
    return [
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="eventTime"),
        structlog.processors.format_exc_info,
        structlog.processors.EventRenamer("message"),
        _as_google_names_it,
        _in_order("severity", "eventTime", "message", "serviceContext"),
        structlog.processors.JSONRenderer(ensure_ascii=False, default=str),
    ]


def _development(stream: TextIO) -> list[Processor]:
    return [
        structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
        structlog.dev.ConsoleRenderer(
            colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback
        ),
    ]


_RENDERERS: Final[dict[str, Callable[[TextIO], list[Processor]]]] = {
    "production": _production,
    "development": _development,
    "stackdriver": _stackdriver,
}


def _without_secrets(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Hide what should never have been logged: a safety net, not the rule."""
    for name in _SECRET_FIELDS & event.keys():
        event[name] = "[redacted]"
    return event


def _as_google_names_it(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    level = str(event.pop("level"))
    event["severity"] = _SEVERITY_BY_LEVEL.get(level, level.upper())
    event["serviceContext"] = {"service": "mnemosyned", "version": __version__}
    return event


def _in_order(*first: str) -> Processor:
    def reorder(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        ordered: EventDict = {name: event[name] for name in first if name in event}
        ordered.update(event)
        return ordered

    return reorder
