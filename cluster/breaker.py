"""Whether a peer is asked: a circuit breaker, without a clock of its own. Pure.

    CLOSED     calls go to the peer
       |  one broken connection, or TIMEOUTS_TO_OPEN time-outs in a row
       v
    OPEN       calls go to the storage at once, and cost no time  <------+
       |  HALF_OPEN_S later, `may_try` lets one trial begin              |  the trial failed
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

from cluster.timing import HALF_OPEN_S, LATELY_S, TIMEOUTS_TO_OPEN


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
        self._lost_s = math.inf  # since when it has not been closed
        self.state = BreakerState.CLOSED

    @property
    def is_closed(self) -> bool:
        """Whether calls go through."""
        return self.state == BreakerState.CLOSED

    def may_answer_yet(self, *, now: float) -> bool:
        """Whether the peer may only be slow, or back at once: it is closed, or has been until lately.

        Such a peer may still serve other nodes from its copies, so a write takes the time to tell it. Failed
        trials do not extend that time, because `_lost_s` is from when the breaker was last closed.
        """
        return self.is_closed or now - self._lost_s < LATELY_S

    def broke(self, *, now: float) -> None:
        """Take note of a connection that could not be made or ended."""
        if self.is_closed:
            self._lost_s = now
        self.state = BreakerState.OPEN
        self._opened_s = now

    def timed_out(self, *, now: float) -> None:
        """Take note of a call without an answer; one alone may be a slow query of the peer."""
        self._timeouts += 1
        if not self.is_closed or self._timeouts >= TIMEOUTS_TO_OPEN:
            self.broke(now=now)

    def answered(self) -> None:
        """Take note of an answer, whatever it said."""
        self._timeouts = 0
        self._opened_s = self._lost_s = math.inf
        self.state = BreakerState.CLOSED

    def may_try(self, *, now: float) -> bool:
        """Tell whether a trial is due, and count it as begun.

        The caller must then call `answered`, `timed_out` or `broke`, else no other trial is ever due.
        """
        if self.state != BreakerState.OPEN or now - self._opened_s < HALF_OPEN_S:
            return False
        self.state = BreakerState.HALF_OPEN
        return True
