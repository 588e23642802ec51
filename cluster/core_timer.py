"""When the core (swim.py) ticks, and how a stall of this process is told from the silence of others.

    set() ─> timer ─> on time:      tick
                  └─> late, after a stall: read for a moment what has arrived meanwhile ─> tick

The sockets of a process that was stalled may hold the very answers whose deadlines have passed. So the core
is told of the stall, and ticks a little later.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from cluster.swim import Swim

log = logging.getLogger(__name__)

# A timer that fires this much late means that the event loop was stalled.
_LAG_NOTICED_S: Final = 0.1
# After a stall, packets that wait in the sockets are read for this long before any time-out fires.
_DRAIN_INBOX_S: Final = 0.02


class CoreTimer:
    """The one timer of the core."""

    def __init__(self, swim: Swim, *, perform: Callable[[], None]) -> None:
        """Set nothing yet; `perform` is called after each tick, and does what the core has ordered."""
        self.lag_s = 0.0  # of the last tick
        self.max_lag_s = 0.0
        self._swim = swim
        self._perform = perform
        self._timer: asyncio.TimerHandle | None = None
        self._due_s = 0.0  # when `_timer` fires

    def set(self) -> None:
        """Tick at the core's next deadline."""
        # A deadline that passed while there was no timer is due now. It is no sign of a stall.
        due_s = max(self._swim.next_deadline(), time.monotonic())
        if self._timer is not None:
            if due_s >= self._due_s:
                # The timer fires early and is set again then: cheaper than one more timer for each packet.
                return
            self._timer.cancel()
        self._due_s = due_s
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(due_s - time.monotonic(), self._on_timer)

    def stop(self) -> None:
        """Tick no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _on_timer(self) -> None:
        lag_s = time.monotonic() - self._due_s
        self.lag_s = lag_s
        self.max_lag_s = max(self.max_lag_s, lag_s)
        if lag_s > _LAG_NOTICED_S:
            log.warning("loop_stalled", extra={"seconds": round(lag_s, 3)})
            self._swim.stalled(lag_s)
            self._timer = asyncio.get_running_loop().call_later(_DRAIN_INBOX_S, self._tick)
            # A packet that arrives before `_tick` must not replace this timer by an earlier one.
            self._due_s = 0.0
            return
        self._tick()

    def _tick(self) -> None:
        self._timer = None
        self._swim.tick(now=time.monotonic())
        self._perform()
