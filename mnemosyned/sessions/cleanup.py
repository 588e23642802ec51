"""Removing expired sessions: bounded batches, jittered rounds, one node at a time."""

from __future__ import annotations

import logging
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Final

from aio.periodic import run_periodically
from mnemosyned.errors import MnemosyneError
from mnemosyned.sessions.service import SessionService

if TYPE_CHECKING:
    from mnemosyned.observe.metrics import UpkeepMetrics

log = logging.getLogger(__name__)

_BATCH_SESSIONS: Final = 1000
# Nodes that were started together must not keep asking together.
_JITTER: Final = 0.1


async def run_cleanup(
    service: SessionService, *, period_s: float, metrics: UpkeepMetrics, rng: Random
) -> None:
    """Clean up once a period, until cancelled."""
    await run_periodically(
        "cleanup",
        partial(_clean_up_once, service, metrics),
        period_s=lambda: period_s * rng.uniform(1 - _JITTER, 1 + _JITTER),
    )


async def clean_up(service: SessionService) -> int:
    """Remove what has expired, batch after batch; return how many sessions."""
    removed = 0
    while True:
        batch = await service.clean_up(_BATCH_SESSIONS)
        removed += batch
        if batch < _BATCH_SESSIONS:
            return removed


async def _clean_up_once(service: SessionService, metrics: UpkeepMetrics) -> None:
    try:
        removed = await clean_up(service)
    except MnemosyneError as exc:
        metrics.cleanup_errors.inc()
        log.warning("cleanup_failed", extra={"error": str(exc)})
        return
    except Exception:  # a bug counts too; the loop logs it
        metrics.cleanup_errors.inc()
        raise
    metrics.cleaned_up.inc(removed)
    if removed:
        log.info("cleanup", extra={"removed": removed})
