"""The rules of time: how long a session lives, when its expiry is stored, how long a copy is served. Pure.

    now                     fresh_until          row expires                 session expires
     |--- copy is served -------|                     |                             |
     |                          |<- 2 touch intervals->|<- at most 1 touch interval ->|

- A Get extends a session to now + `idle_us`. The new expiry is promised at once and kept in memory.
- The row in the storage follows within one touch interval (`touches.py`). A crash therefore shortens a
  session by at most that interval, and never loses one.
- A copy is not served in the last two touch intervals before its row expires. Otherwise a session that is
  read from this copy could expire in the storage, and cleanup could remove it, before its next touch is
  written.
- A copy is served for `cache_us` from the moment its load was asked for, not from its arrival: the answer
  may have waited while this process was stalled.

All instants are microseconds since the epoch on the storage's clock (`clock.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_US_PER_MS: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetime:
    """Durations in microseconds, and the rules that follow from them."""

    idle_us: int  # -ttl: a session ends this long after its last Get
    cache_us: int  # -cache.ttl; 0: nothing is cached
    touch_interval_us: int  # -touch.interval

    def extended_us(self, now_us: int) -> int:
        """Return the expiry of a session that a Get extends now: whole milliseconds, rounded down.

        Gets of the same millisecond then share one encoded expiry.
        """
        expires_at_us = now_us + self.idle_us
        return expires_at_us - expires_at_us % _US_PER_MS

    def copy_fresh_until_us(self, asked_us: int, row_expires_at_us: int) -> int:
        """Return until when a copy may be served that was asked for at `asked_us`."""
        return min(asked_us + self.cache_us, row_expires_at_us - 2 * self.touch_interval_us)

    def negative_fresh_until_us(self, asked_us: int) -> int:
        """Return until when "there is no such session" may be served."""
        return asked_us + self.cache_us
