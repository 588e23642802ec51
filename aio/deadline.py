"""Until when a caller waits, and until when its work may be done: one value, carried with the call.

Two clocks are involved, because two things must end in time:

- The caller stops waiting at an instant that only its own node can measure. `at_s` is on this process's
  monotonic clock.
- A write must not be done after another node may have begun to repeat it. The nodes share no clock but the
  storage's, so `not_after_us` is on the storage's clock.

Over a hop, the entry node sends the time that is left and the instant on the storage's clock
(`cluster/forward.py`). The owner makes a Deadline of its own from both (`mnemosyned/api/peer.py`).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Final

from aio.units import NEVER_US


@dataclass(frozen=True, slots=True)
class Deadline:
    """An instant on `time.monotonic()`, in seconds, and one on the storage's clock, in microseconds."""

    at_s: float = math.inf  # the caller stops waiting
    not_after_us: int = NEVER_US  # a write of this call may no longer be done

    @classmethod
    def in_s(cls, seconds: float, *, not_after_us: int = NEVER_US) -> Deadline:
        """Return the deadline that many seconds from now."""
        return cls(time.monotonic() + seconds, not_after_us)

    def left_s(self) -> float | None:
        """Return the seconds until the caller stops waiting, negative afterwards; None: no limit."""
        return None if self.at_s == math.inf else self.at_s - time.monotonic()

    def share_s(self, most_s: float) -> float:
        """Return half of the time that is left, at most `most_s`, at least 0.

        Half, because the other half is for what is tried when this part of the work fails.
        """
        left_s = self.left_s()
        return most_s if left_s is None else max(0.0, min(left_s / 2, most_s))


NO_DEADLINE: Final = Deadline()
