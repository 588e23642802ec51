"""Damaged sessions, counted and logged: for the person who has to mend the table."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from aio.rate_limit import LogRateLimiter
from mnemosyned.errors import CorruptSession
from mnemosyned.observe.fingerprint import fingerprint
from mnemosyned.sessions import damage, token_hash

if TYPE_CHECKING:
    from prometheus_client import Counter

log = logging.getLogger(__name__)


class DamageLog:
    """Counts every meeting with a damaged session, and logs up to 100 of them in a second."""

    def __init__(self, met: Counter) -> None:
        self._met = met
        self._limiter = LogRateLimiter()

    def add(self, token: str, error: CorruptSession) -> None:
        """Take down a session; `token` may be a stored key or a session id too."""
        self._met.inc()
        left_out = self._limiter.take(time.monotonic())
        if left_out is not None:
            extra = {"session": shown(token), "reason": damage.reason_of(error), "left_out": left_out}
            log.error("session_damaged", extra=extra)


def shown(token: str) -> str:
    """Return the session id of a hashed session, or a fingerprint of a token."""
    session_id = token_hash.session_id(token)
    return session_id if token_hash.is_session_id(session_id) else fingerprint(token)
