"""The storage's clock, read without asking the storage.

All expiries are instants of the storage's clock, so that nodes whose own clocks differ agree.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Final

from aio.deadline import Deadline
from aio.units import NEVER_US, NS_PER_US, US_PER_S

# A sample this slow says less than the drift of any clock between two samples.
_MAX_ERROR_US: Final = 250_000
# Of the time that a write has left, at most this part is taken off for the error of the clock.
_MAX_ERROR_PART: Final = 4


# Nanoseconds that never go back and count the time in which a machine was suspended. Bound to its clock
# here, it is called by every Get without a Python function in between.
uptime_ns: Final = partial(time.clock_gettime_ns, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class StorageClock:
    """An estimate of the storage's clock, good to half a round trip.

    Until the first sample it is this machine's own clock.
    """

    def __init__(self, uptime: Callable[[], int] = uptime_ns, wall_us: int | None = None) -> None:
        """`uptime` returns nanoseconds."""
        self._uptime_ns = uptime
        wall_us = time.time_ns() // NS_PER_US if wall_us is None else wall_us
        self._offset_us = wall_us - self.uptime_us()
        self._error_us = 0
        self._is_synchronised = False

    def now_us(self) -> int:
        """Return microseconds since the epoch on the storage's clock."""
        return self._uptime_ns() // 1000 + self._offset_us

    def uptime_us(self) -> int:
        """Return the local clock that `observe` takes its instants from."""
        return self._uptime_ns() // NS_PER_US

    def limit_us(self, deadline: Deadline) -> int:
        """Return the last instant on the storage's clock at which a write with this deadline may be done.

        It is early by what this clock may be wrong: half of the last round trip. A caller that is far from
        the storage still gets three quarters of a short deadline. Before the first sample nothing is known
        of the storage's clock, and there is no limit.
        """
        if deadline.not_after_us != NEVER_US or not self._is_synchronised:
            return deadline.not_after_us
        left_s = deadline.of_write().left_s()
        if left_s is None:
            return NEVER_US
        # A client may send any number of hours.
        left_us = min(int(left_s * US_PER_S), NEVER_US // 2)
        return self.now_us() + left_us - min(self._error_us, max(left_us, 0) // _MAX_ERROR_PART)

    def observe(self, storage_us: int, *, sent_us: int, received_us: int) -> None:
        """Take in what the storage's clock showed between two instants of `uptime_us`.

        The half-way assumption and its error bound are Cristian's (1989).
        """
        if self._is_synchronised and received_us - sent_us > 2 * _MAX_ERROR_US:
            return
        self._offset_us = storage_us - (sent_us + received_us) // 2
        self._error_us = (received_us - sent_us) // 2
        self._is_synchronised = True
