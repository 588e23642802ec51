"""How many log lines of one kind may be written. Pure."""

from __future__ import annotations

from typing import Final

LINES_PER_SECOND: Final = 100


class LogRateLimiter:
    """Lets so many lines through in each second, and counts the rest.

    A second begins with a line, not with the clock. Failures of calls are logged within such a limit: ten
    thousand bad calls a second must not cost more in log lines than in calls.
    """

    __slots__ = ("_left", "_left_out", "_lines_per_second", "_until_s")

    def __init__(self, lines_per_second: int = LINES_PER_SECOND) -> None:
        self._lines_per_second = lines_per_second
        self._until_s = 0.0
        self._left = 0
        self._left_out = 0

    def take(self, now_s: float) -> int | None:
        """Return how many lines were left out before this one; None: leave this one out too."""
        if now_s >= self._until_s:
            self._until_s = now_s + 1
            self._left = self._lines_per_second
        if not self._left:
            self._left_out += 1
            return None
        self._left -= 1
        left_out, self._left_out = self._left_out, 0
        return left_out

    def take_rest(self, now_s: float) -> int:
        """Return how many lines were left out, once the second is over: perhaps no later line tells it."""
        if now_s < self._until_s:
            return 0
        left_out, self._left_out = self._left_out, 0
        return left_out


def fields_of(left_out: int) -> dict[str, object]:
    """Return how many lines were left out as a field of the log: none for none."""
    return {"left_out": left_out} if left_out else {}
