"""The settings of logs and traces.

The names of levels and forms are those of the Go daemon's logger, zap, so that its configuration still works.
logs.py renders the forms; transport/traces.py sends the traces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from mnemosyned.config.flags import Section, setting
from mnemosyned.config.parsers import one_of

LEVELS: Final = ("debug", "info", "warn", "error", "dpanic", "panic", "fatal")
# `grpc` is what some exporters are configured with; it means http to ours.
_SCHEMES: Final = frozenset({"http", "https", "grpc"})


def endpoint(text: str) -> str:
    """Read host:port or a URL, or nothing; the error shows nothing, since a URL may hold a password."""
    if not text:
        return text
    try:
        found = urlsplit(text if "://" in text else f"http://{text}")
        is_usable = bool(found.hostname) and found.scheme in _SCHEMES and found.port != 0
    except ValueError:
        is_usable = False
    if not is_usable or not text.isprintable() or " " in text:
        raise ValueError("it is not host:port or a URL that begins with http:// or https://")
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class ObserveConfig(Section):
    """Which log lines are written, in which form, and where traces are sent."""

    TITLE = "Logs and traces"
    EXAMPLE = "mnemosyned -log.environment=development -log.level=debug"

    log_environment: str = setting(
        "log.environment",
        "production",
        one_of("production", "development", "stackdriver"),
        "form of the log: production (JSON), development (for people) or stackdriver (Google Cloud)",
    )
    log_level: str = setting(
        "log.level", "info", one_of(*LEVELS), f"least level that is logged: {', '.join(LEVELS)}"
    )
    tracing_address: str = setting(
        "tracing.agent.address",
        "",
        endpoint,
        "OTLP endpoint for traces, host:port or URL; needs the extra otel",
    )
