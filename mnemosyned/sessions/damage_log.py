"""What of a storage's answers is damaged: counted and logged, for the person who has to mend the table."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

from aio.rate_limit import LogRateLimiter
from aio.steps import STEP_BYTES, STEP_ITEMS, Steps
from mnemosyned.errors import CorruptSession, MnemosyneError
from mnemosyned.observe.fingerprint import fingerprint
from mnemosyned.sessions import damage, token_hash
from mnemosyned.sessions.bag import BagLimits
from mnemosyned.sessions.model import DamagedSession, Session

if TYPE_CHECKING:
    from prometheus_client import Counter

log = logging.getLogger(__name__)

# What the storage has answered for one token, and what the answers for many come to.
Found: TypeAlias = Session | DamagedSession | MnemosyneError
Checked: TypeAlias = list[Session | MnemosyneError]


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

    def checking(self, found: Iterable[tuple[str, Found]], limits: BagLimits) -> Steps[Checked]:
        """Check what the storage has answered for these tokens; damage is the failure of one item.

        `limits` are those of stored bags.
        """
        checked: Checked = []
        unchecked_bytes = 0
        for number, (token, one) in enumerate(found, start=1):
            unchecked_bytes += len(one.bag) if isinstance(one, Session) else 0
            if number % STEP_ITEMS == 0 or unchecked_bytes > STEP_BYTES:
                unchecked_bytes = 0
                yield
            if isinstance(one, Session) and damage.is_ordinary(one):
                checked.append(one)
            else:
                checked.append((yield from self._checking_one(token, one, limits)))
        return checked

    def _checking_one(self, token: str, found: Found, limits: BagLimits) -> Steps[Session | MnemosyneError]:
        try:
            if isinstance(found, Session):
                return (yield from damage.checking(found, limits))
            error = found.error() if isinstance(found, DamagedSession) else found
        except CorruptSession as exc:
            error = exc
        if isinstance(error, CorruptSession):
            self.add(token, error)
        return error


def shown(token: str) -> str:
    """Return the session id of a hashed session, or a fingerprint of a token."""
    session_id = token_hash.session_id(token)
    return session_id if token_hash.is_session_id(session_id) else fingerprint(token)
