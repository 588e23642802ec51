"""Units of time, and an instant that no clock reaches. Pure."""

from __future__ import annotations

from typing import Final

US_PER_S: Final = 1_000_000
NS_PER_US: Final = 1000
NS_PER_S: Final = 1_000_000_000
# Microseconds since the epoch, some 73,000 years from now: a write without a limit is never too late.
NEVER_US: Final = 2**61
