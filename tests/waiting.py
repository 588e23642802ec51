"""How a test waits for what happens in other processes."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(is_met: Callable[[], object], within_s: float = 20) -> None:
    """Wait for a condition; fail if it is not met in time."""
    end_s = time.monotonic() + within_s
    while not is_met():
        assert time.monotonic() < end_s, f"not within {within_s:g} s"
        time.sleep(0.02)
