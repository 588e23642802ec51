"""Work that is repeated for as long as the daemon runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NoReturn

log = logging.getLogger(__name__)


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
        await asyncio.sleep(period_s())
        try:
            await work()
        except Exception as exc:  # the root of the task: a bug must not end it
            log.error("%s_failed", name, exc_info=exc)
