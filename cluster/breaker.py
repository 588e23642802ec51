"""Whether to bother a peer: a circuit breaker, without a clock of its own."""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Final

_TIMEOUTS_TO_OPEN: Final = 3
_HALF_OPEN_S: Final = 1.0
# Membership suspects a peer that answers nobody by then.
_LATELY_S: Final = 2.0


class BreakerState(IntEnum):
    """As the metric shows it."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Breaker:
    """Opens after one broken connection or three time-outs in a row; a good answer closes it.

    Open, it lets no call through; a second later, and then each second, one trial may find out
    whether the peer is back. Times are seconds on the caller's clock.
    """

    def __init__(self) -> None:
        self._timeouts = 0
        self._opened_s = math.inf
        self._lost_s = math.inf  # since when it has not been closed
        self.state = BreakerState.CLOSED

    @property
    def is_closed(self) -> bool:
        """Whether calls go through."""
        return self.state == BreakerState.CLOSED

    def may_answer_yet(self, *, now: float) -> bool:
        """Whether the peer may only be slow, or back at once: it is closed, or has been until lately."""
        return self.is_closed or now - self._lost_s < _LATELY_S

    def broke(self, *, now: float) -> None:
        """Take note of a connection that could not be made or ended."""
        if self.is_closed:
            self._lost_s = now
        self.state = BreakerState.OPEN
        self._opened_s = now

    def timed_out(self, *, now: float) -> None:
        """Take note of a call without an answer."""
        self._timeouts += 1
        if not self.is_closed or self._timeouts >= _TIMEOUTS_TO_OPEN:
            self.broke(now=now)

    def answered(self) -> None:
        """Take note of an answer, whatever it said."""
        self._timeouts = 0
        self._opened_s = self._lost_s = math.inf
        self.state = BreakerState.CLOSED

    def may_try(self, *, now: float) -> bool:
        """Tell whether a trial is due, and count it as begun."""
        if self.state != BreakerState.OPEN or now - self._opened_s < _HALF_OPEN_S:
            return False
        self.state = BreakerState.HALF_OPEN
        return True
