"""Whether to bother a peer: a circuit breaker, without a clock of its own."""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Final

_TIMEOUTS_TO_OPEN: Final = 3
_HALF_OPEN_S: Final = 1.0
# Membership suspects a peer that answers nobody by then.
_SLOW_S: Final = 2.0


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
        self._slow_since_s = math.inf
        self.state = BreakerState.CLOSED

    @property
    def is_closed(self) -> bool:
        """Whether calls go through."""
        return self.state == BreakerState.CLOSED

    def may_be_slow(self, *, now: float) -> bool:
        """Whether it was opened by time-outs, and not long ago: the peer may answer yet, if late."""
        return 0 <= now - self._slow_since_s < _SLOW_S

    def broke(self, *, now: float) -> None:
        """Take note of a connection that could not be made or ended."""
        self._open(now)
        self._slow_since_s = math.inf

    def timed_out(self, *, now: float) -> None:
        """Take note of a call without an answer."""
        self._timeouts += 1
        if self._timeouts >= _TIMEOUTS_TO_OPEN:
            if self.is_closed:
                self._slow_since_s = now
            self._open(now)

    def answered(self) -> None:
        """Take note of an answer, whatever it said."""
        self._timeouts = 0
        self._opened_s = self._slow_since_s = math.inf
        self.state = BreakerState.CLOSED

    def may_try(self, *, now: float) -> bool:
        """Tell whether a trial is due, and count it as begun."""
        if self.state != BreakerState.OPEN or now - self._opened_s < _HALF_OPEN_S:
            return False
        self.state = BreakerState.HALF_OPEN
        return True

    def _open(self, now: float) -> None:
        self.state = BreakerState.OPEN
        self._opened_s = now
