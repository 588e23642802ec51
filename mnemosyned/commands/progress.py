"""How far a command is, for a person who waits: a line on the standard error, if that is a terminal."""

from __future__ import annotations

import time
from typing import Final, TextIO

_PERIOD_S: Final = 0.2


class Progress:
    """One line that changes; nothing at all if the stream is no terminal."""

    def __init__(self, what: str, stream: TextIO) -> None:
        """`what` is counted, as in "1,000 sessions exported"."""
        self._what = what
        self._stream = stream
        self._is_on = stream.isatty()
        self._next_s = 0.0
        self._shown = ""

    def at(self, count: int) -> None:
        """Show a number, a few times a second at most."""
        if not self._is_on or time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + _PERIOD_S
        self._shown = f"{count:,} {self._what}"
        self._stream.write(f"\r{self._shown}")

    def end(self) -> None:
        """Remove the line."""
        if self._shown:
            self._stream.write("\r" + " " * len(self._shown) + "\r")
            self._shown = ""
