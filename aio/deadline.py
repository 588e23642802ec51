"""Until when a caller waits, and until when its work may be done: one value, carried with the call.

Two clocks are involved, because two things must end in time:

- The caller stops waiting at an instant that only its own node can measure. `at_s` is on this process's
  monotonic clock.
- A write must not be done after its caller was told that it failed, or after another node may have begun to
  repeat it. The nodes share no clock but the storage's, so `not_after_us` is on the storage's clock. A call
  of a client has none yet: `StorageClock.limit_us` (`mnemosyned/sessions/clock.py`) makes it of `at_s`.

The time that a client sends is counted from when its call is read. A call that lay in the socket of a process
that stood still is older, at most by `waited_s` (`aio/stalls.py`). Reads are answered all the same, as they
do no harm. `of_write` takes the time off, because the caller may have given up already.

Over a hop, the entry node sends the time that is left and the instant on the storage's clock
(`cluster/forward.py`). The owner makes a Deadline of its own from both
(`mnemosyned/api/forwarded.py`).
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
    waited_s: float = 0.0  # the call may have been sent so long before it was read

    @classmethod
    def in_s(cls, seconds: float, *, not_after_us: int = NEVER_US, waited_s: float = 0.0) -> Deadline:
        """Return the deadline that many seconds from now."""
        return cls(time.monotonic() + seconds, not_after_us, waited_s)

    def of_write(self) -> Deadline:
        """Return the deadline for a write: as if the call had been sent when it can first have been sent."""
        return Deadline(self.at_s - self.waited_s, self.not_after_us) if self.waited_s else self

    def left_s(self) -> float | None:
        """Return the seconds until the caller stops waiting, negative afterwards; None: no limit."""
        return None if self.at_s == math.inf else self.at_s - time.monotonic()

    def share_s(self, most_s: float) -> float:
        """Return half of the time that is left, at most `most_s`, at least 0.

        Half, because the other half is for what is tried when this part of the work fails.
        """
        left_s = self.left_s()
        return most_s if left_s is None else max(0.0, min(left_s / 2, most_s))

    def whole_s(self, most_s: float) -> float:
        """Return the time that is left, at most `most_s`, at least 0."""
        left_s = self.left_s()
        return most_s if left_s is None else max(0.0, min(left_s, most_s))


NO_DEADLINE: Final = Deadline()
