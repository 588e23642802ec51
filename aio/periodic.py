"""Work that is repeated for as long as the daemon runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, NoReturn

log = logging.getLogger(__name__)

# Longer periods end at multiples of this, so that one wake-up of an idle process serves several works.
_TICK_S: Final = 0.25
_LEAST_ALIGNED_S: Final = 1.0


async def run_periodically(
    name: str, work: Callable[[], Awaitable[None]], *, period_s: Callable[[], float]
) -> NoReturn:
    """Wait one period, do the work, and begin again, until cancelled.

    The work handles the failures that it expects. Anything else is a bug: it is logged with its traceback
    as `<name>_failed`, and the next round is tried as if nothing had happened, so that one bad round does
    not end cleanup, touches or health checks of a daemon that otherwise serves. `period_s` is asked before
    each round, so that it may vary.
    """
    while True:
        await asyncio.sleep(_aligned_s(period_s()))
        try:
            await work()
        except Exception as exc:  # the root of the task: a bug must not end it
            log.error("%s_failed", name, exc_info=exc)


def _aligned_s(period_s: float) -> float:
    """Return the period, or one that is longer or shorter by half a tick at most and ends at a tick."""
    if period_s < _LEAST_ALIGNED_S:
        return period_s
    now_s = asyncio.get_running_loop().time()
    return round((now_s + period_s) / _TICK_S) * _TICK_S - now_s
