"""Whether a peer is asked: a circuit breaker, without a clock of its own. Pure.

    CLOSED     calls go to the peer
       |  one broken connection, or _TIMEOUTS_TO_OPEN time-outs in a row
       v
    OPEN       calls go to the storage at once, and cost no time  <------+
       |  HALF_OPEN_S later, or when gossip hears the peer again,        |  the trial failed
       |  one trial begins                                              |
       v                                                                 |
    HALF_OPEN  one trial is under way; calls still go to the storage ----+
       |  the trial was answered
       v
    CLOSED

This is faster than membership, which takes seconds to find out whether a member is dead, and it is each
node's own. A peer that only one node cannot reach stays on the ring.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Final

from cluster.timing import HALF_OPEN_S

# So many time-outs in a row open the breaker. The calls then go to the storage at once.
_TIMEOUTS_TO_OPEN: Final = 3


class BreakerState(IntEnum):
    """As the metric shows it."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Breaker:
    """Opens after one broken connection or some time-outs in a row; an answer closes it.

    Times are seconds on the caller's clock.
    """

    def __init__(self) -> None:
        self._timeouts = 0  # in a row
        self._opened_s = math.inf  # when it was opened last, also by a trial that failed
        self.state = BreakerState.CLOSED

    @property
    def is_closed(self) -> bool:
        """Whether calls go through."""
        return self.state is BreakerState.CLOSED

    def broke(self, *, now: float) -> None:
        """Take note of a connection that could not be made or ended."""
        self.state = BreakerState.OPEN
        self._opened_s = now

    def timed_out(self, *, now: float) -> None:
        """Take note of a call without an answer; one alone may be a slow query of the peer."""
        self._timeouts += 1
        if not self.is_closed or self._timeouts >= _TIMEOUTS_TO_OPEN:
            self.broke(now=now)

    def answered(self) -> None:
        """Take note of an answer, whatever it said."""
        self._timeouts = 0
        self._opened_s = math.inf
        self.state = BreakerState.CLOSED

    def may_try(self, *, now: float) -> bool:
        """Tell whether a trial is due, and count it as begun.

        The caller must then call `answered`, `timed_out` or `broke`, else no other trial is ever due.
        """
        return now - self._opened_s >= HALF_OPEN_S and self.begin_trial()

    def begin_trial(self) -> bool:
        """Begin a trial, due or not; tell whether it is needed. The rest is as in `may_try`."""
        if self.state != BreakerState.OPEN:
            return False
        self.state = BreakerState.HALF_OPEN
        return True
