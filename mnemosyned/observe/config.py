"""The settings of logs and traces.

The names of levels and forms are those of the Go daemon's logger, zap, so that its configuration still works.
logs.py renders the forms; transport/traces.py sends the traces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mnemosyned.config.flags import Section, setting
from mnemosyned.config.parsers import one_of

LEVELS: Final = ("debug", "info", "warn", "error", "dpanic", "panic", "fatal")


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
        str,
        "OTLP endpoint for traces, host:port or URL; needs the extra otel",
    )
