"""Wall clocks of single processes that a test steps, by Debian's package `faketime`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

_LIBRARY: Final = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
IS_POSSIBLE: Final = _LIBRARY is not None
needs_faketime = pytest.mark.skipif(not IS_POSSIBLE, reason="needs Debian's package faketime")


class Clock:
    """The wall clock of the processes that are started with `environ`; it is right until `step`."""

    def __init__(self, file: Path) -> None:
        """Keep in this file how wrong the clock is; all users must be able to read it."""
        self._file = file
        self.step(0.0)

    def step(self, ahead_s: float) -> None:
        """Have the clock be ahead of the true time by so many seconds, or behind it, at once."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{ahead_s:+.3f}\n")
        new.chmod(0o644)
        new.rename(self._file)

    @property
    def environ(self) -> dict[str, str]:
        """What the environment of a process must have besides."""
        return {
            "LD_PRELOAD": str(_LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            # A step of the wall clock moves no other clock.
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            # Without it a wait by the monotonic clock ends at once (the library's pull request 503). Python's
            # threads wait so for one another: they would spin, and slow down the one that they wait for.
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",
        }
