"""How often the log says that a storage fails, whatever the engine.

A fault is logged when it begins. While it lasts it is logged once a minute, with how often it has happened
since when: an outage at ten thousand calls a second is two lines a minute. A fault that has not happened for
a minute begins again. `storage/health.py` logs the end of an outage.

The engine names its faults (`Naming`), and not by the server's own text: that may quote a session, and so a
token.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Protocol

log = logging.getLogger(__name__)

_PERIOD_S: Final = 60.0
# Faults are few, but a server may invent some.
_MAX_FAULTS: Final = 200


class Naming(Protocol):
    """How an engine names its faults; a module with these functions is one."""

    def error_of(self, exc: BaseException, /) -> str:
        """Return a short code or the kind."""
        ...

    def condition_of(self, exc: BaseException, /) -> str:
        """Return what has happened, in words."""
        ...

    def name_of(self, exc: BaseException, /) -> str:
        """Return both in a few words."""
        ...

    def hint_of(self, exc: BaseException, /) -> str:
        """Return what to look at; empty: the name says it."""
        ...


def advice(naming: Naming, exc: BaseException) -> str:
    """Return a fault and what to look at, for a line of its own."""
    hint = naming.hint_of(exc)
    return f"{naming.name_of(exc)}; {hint}" if hint else naming.name_of(exc)


def system_reason(exc: OSError) -> str:
    """Return what the system or the network says, in words without an address."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"TLS: the server's certificate: {exc.verify_message}"
    if isinstance(exc, ssl.SSLError):
        # A constant of OpenSSL; the whole text names its source files.
        reason = getattr(exc, "reason", None) or "the handshake failed"
        return f"TLS: {reason.lower().replace('_', ' ')}"
    if isinstance(exc, socket.gaierror):
        return "the name of the host cannot be resolved"
    if isinstance(exc, TimeoutError):
        return "no answer in time"
    if exc.errno:
        # Not `strerror`: asyncio puts the address into it.
        return os.strerror(exc.errno).lower()
    if "rejected SSL upgrade" in str(exc):
        return "TLS: the server has none"
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(exc).__name__.removesuffix("Error")).lower()
    return words or "the system refuses"


@dataclass(slots=True)
class _Lasting:
    """One fault: since when, how often, and when it was logged last."""

    since: str
    last_s: float
    logged_s: float
    count: int = 0


class FaultLog:
    """Logs each fault when it begins, and once a minute while it lasts."""

    def __init__(self, naming: Naming, now_s: Callable[[], float] = time.monotonic) -> None:
        self._naming = naming
        self._now_s = now_s
        self._lasting: dict[tuple[str, str], _Lasting] = {}
        self.where: dict[str, str] = {}  # fields of each line

    def described(self, doing: str, exc: BaseException) -> str:
        """Return a fault in one line: what was being done, what happened, and where."""
        where = ", ".join(f"{name} {value}" for name, value in self.where.items())
        return f"{doing}: {self._naming.name_of(exc)} ({where})"

    def failed(self, doing: str, exc: BaseException) -> None:
        """Log a fault of what was being done, unless the log has it."""
        now_s, error, condition = self._now_s(), self._naming.error_of(exc), self._naming.condition_of(exc)
        # One key for all statements: an outage concerns them all.
        key = (error, condition)
        lasting = self._lasting.get(key)
        if lasting is None or now_s - lasting.last_s > _PERIOD_S:
            if len(self._lasting) >= _MAX_FAULTS:
                self._lasting.clear()
            since = datetime.now(tz=UTC).isoformat(timespec="seconds")
            lasting = self._lasting[key] = _Lasting(since=since, last_s=now_s, logged_s=-_PERIOD_S + now_s)
        lasting.last_s = now_s
        lasting.count += 1
        if now_s - lasting.logged_s < _PERIOD_S:
            return
        lasting.logged_s = now_s
        lasts = {"times": lasting.count, "since": lasting.since} if lasting.count > 1 else {}
        tried = "; ".join(getattr(exc, "__notes__", ()))
        log.warning(
            "storage_failed",
            extra={
                "query": doing,
                "error": error,
                "condition": condition,
                **self.where,
                **({"tried": tried} if tried else {}),
                **({"hint": hint} if (hint := self._naming.hint_of(exc)) else {}),
                **lasts,
            },
        )
