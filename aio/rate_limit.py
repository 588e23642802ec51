"""How many log lines of a kind are worth writing."""

from __future__ import annotations

from typing import Final

LINES_A_SECOND: Final = 100


class LineBudget:
    """LINES_A_SECOND lines in each second from a line on; more are counted, and the next one tells how many.

    Failures by fault of callers are logged within it: whoever sends ten thousand bad calls a second
    shall not have us spend more on their log lines than on the calls.
    """

    __slots__ = ("_left", "_left_out", "_until_s")

    def __init__(self) -> None:
        self._until_s = 0.0
        self._left = 0
        self._left_out = 0

    def take(self, now_s: float) -> int | None:
        """Return how many lines were left out before this one; None: this one is to be as well."""
        if now_s >= self._until_s:
            self._until_s = now_s + 1
            self._left = LINES_A_SECOND
        if not self._left:
            self._left_out += 1
            return None
        self._left -= 1
        left_out, self._left_out = self._left_out, 0
        return left_out
