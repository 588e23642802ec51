"""The storage's clock, read without asking the storage.

All expiries are instants of the storage's clock, so that nodes whose own clocks differ agree.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Final

from aio.units import NS_PER_US

# A sample this slow says less than the drift of any clock between two samples.
_MAX_ERROR_US: Final = 250_000


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
        self._is_synchronised = False

    def now_us(self) -> int:
        """Return microseconds since the epoch on the storage's clock."""
        return self._uptime_ns() // 1000 + self._offset_us

    def uptime_us(self) -> int:
        """Return the local clock that `observe` takes its instants from."""
        return self._uptime_ns() // NS_PER_US

    def observe(self, storage_us: int, *, sent_us: int, received_us: int) -> None:
        """Take in what the storage's clock showed between two instants of `uptime_us`.

        The half-way assumption and its error bound are Cristian's (1989).
        """
        if self._is_synchronised and received_us - sent_us > 2 * _MAX_ERROR_US:
            return
        self._offset_us = storage_us - (sent_us + received_us) // 2
        self._is_synchronised = True
