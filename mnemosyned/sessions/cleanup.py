"""Removing expired sessions: bounded batches, jittered rounds, survives errors."""

from __future__ import annotations

import asyncio
import logging
from random import Random
from typing import TYPE_CHECKING, Final

from mnemosyned.errors import MnemosyneError
from mnemosyned.sessions.service import SessionService

if TYPE_CHECKING:
    from mnemosyned.observe.metrics import UpkeepMetrics

log = logging.getLogger(__name__)

_BATCH_ROWS: Final = 1000
# Nodes that were started together must not keep asking together.
_JITTER: Final = 0.1


async def run_cleanup(
    service: SessionService, *, period_s: float, metrics: UpkeepMetrics, rng: Random
) -> None:
    """Clean up for ever, once a period."""
    while True:
        await asyncio.sleep(period_s * rng.uniform(1 - _JITTER, 1 + _JITTER))
        try:
            removed = await clean_up(service)
        except MnemosyneError as exc:
            metrics.cleanup_errors.inc()
            log.warning("cleanup_failed", extra={"error": str(exc)})
            continue
        except Exception:  # the root of the task: a bug must not end the daemon's cleaning
            metrics.cleanup_errors.inc()
            log.exception("cleanup_failed")
            continue
        metrics.cleaned_up.inc(removed)
        if removed:
            log.info("cleanup", extra={"removed": removed})


async def clean_up(service: SessionService) -> int:
    """Remove what has expired, batch after batch; return how many sessions."""
    removed = 0
    while True:
        batch = await service.clean_up(_BATCH_ROWS)
        removed += batch
        if batch < _BATCH_ROWS:
            return removed
