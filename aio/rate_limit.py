"""How many log lines of one kind may be written. Pure."""

from __future__ import annotations

from typing import Final

LINES_PER_SECOND: Final = 100


class LogRateLimiter:
    """Lets LINES_PER_SECOND lines through in each second, and counts the rest.

    A second begins with a line, not with the clock. Failures that callers cause are logged within this
    limit: ten thousand bad calls a second must not cost more in log lines than in calls.
    """

    __slots__ = ("_left", "_left_out", "_until_s")

    def __init__(self) -> None:
        self._until_s = 0.0
        self._left = 0
        self._left_out = 0

    def take(self, now_s: float) -> int | None:
        """Return how many lines were left out before this one; None: leave this one out too."""
        if now_s >= self._until_s:
            self._until_s = now_s + 1
            self._left = LINES_PER_SECOND
        if not self._left:
            self._left_out += 1
            return None
        self._left -= 1
        left_out, self._left_out = self._left_out, 0
        return left_out
