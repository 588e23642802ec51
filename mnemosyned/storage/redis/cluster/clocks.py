"""How much the clocks of the primaries of a cluster differ. Pure.

Each script judges by the clock of its own server whether a session has expired and whether a write is late.
What the daemon takes for the clock of the storage is that of the primary which is furthest behind: no
primary does a write when it is late by that clock. A primary that is ahead refuses it sooner, by the
difference. What is uncertain is the time of one round trip, as it is for the clock of a single server.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

# Two tries of one write are 50 ms apart (ARCHITECTURE.md). More would be felt as early expiries and late
# calls.
MOST_APART_US: Final = 50_000
# A clock that is wrong by hours must not stop the others.
_MOST_BEHIND_US: Final = 1_000_000


class Clocks:
    """What each clock has shown between two instants of this node's own, in microseconds."""

    def __init__(self) -> None:
        self._bounds: dict[Hashable, tuple[int, int]] = {}  # least and most of a clock, less the own one

    def observe(self, name: Hashable, clock_us: int, *, sent_us: int, received_us: int) -> None:
        """Take in what a clock has shown after `sent_us` and before `received_us`."""
        self._bounds[name] = (clock_us - received_us, clock_us - sent_us)

    def keep(self, names: frozenset[Hashable]) -> None:
        """Forget all other clocks."""
        self._bounds = {name: bounds for name, bounds in self._bounds.items() if name in names}

    def apart_us(self) -> int:
        """Return by how much two clocks differ at least."""
        if not self._bounds:
            return 0
        least = max(low for low, _ in self._bounds.values())
        most = min(high for _, high in self._bounds.values())
        return max(0, least - most)

    def behind_us(self, name: Hashable) -> int:
        """Return by how much another clock is behind this one, as far as that is certain."""
        if name not in self._bounds:
            return 0
        low, _ = self._bounds[name]
        least = min(high for _, high in self._bounds.values())
        return min(max(0, low - least), _MOST_BEHIND_US)
