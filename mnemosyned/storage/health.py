"""Opening the storage, and knowing from then on whether it answers.

    opening ── answer ──> serving ── no answer ──> lost ── answer ──> serving …
       │
       └── StorageRefused: the daemon ends

The question is the storage's clock, once a second. One statement therefore serves two purposes: the health
check, and the synchronisation of `sessions/clock.py`. A storage that is lost is not opened again. The
engine connects on its own, and sessions in caches remain usable meanwhile.

The answer takes as long as the engine's time-outs permit, so `is_serving` may be some seconds old. Nothing
is decided by it for a single call: calls go to the storage anyway and fail by themselves. It is for the
health service, readiness and operators.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from aio.periodic import run_periodically
from mnemosyned.errors import StorageUnavailable
from mnemosyned.sessions.clock import StorageClock
from mnemosyned.sessions.store import Storage

log = logging.getLogger(__name__)

_PROBE_PERIOD_S: Final = 1.0
# Short at first, since database and daemon are often started together; the last one repeats.
_OPEN_RETRY_S: Final = (0.1, 0.2, 0.5, 1.0, 2.0)


class StorageHealth:
    """Asks the storage for its time every second: an answer means healthy, and its time sets the clock."""

    def __init__(self, storage: Storage, clock: StorageClock) -> None:
        self._storage = storage
        self._clock = clock
        self._is_serving = False

    @property
    def is_serving(self) -> bool:
        """Whether the last question was answered."""
        return self._is_serving

    async def open(self) -> None:
        """Open the storage, and synchronise the clock; retry as long as that takes.

        Raises:
            StorageRefused: a retry cannot succeed with this configuration.
        """
        tries = 0
        while True:
            try:
                await self._storage.open()
                await self._probe()
            except StorageUnavailable as exc:
                wait_s = _OPEN_RETRY_S[min(tries, len(_OPEN_RETRY_S) - 1)]
                log.warning("storage_not_ready", extra={"error": str(exc), "retry_s": wait_s})
                tries += 1
                await asyncio.sleep(wait_s)
            else:
                log.info("storage_ready")
                return

    async def run(self) -> None:
        """Ask once a second, until cancelled. Logs only changes, so an outage is two lines."""
        await run_periodically("storage_health", self._look, period_s=lambda: _PROBE_PERIOD_S)

    async def _look(self) -> None:
        was_serving = self._is_serving
        try:
            await self._probe()
        except StorageUnavailable as exc:
            self._is_serving = False
            if was_serving:
                log.error("storage_lost", extra={"error": str(exc)})
        else:
            if not was_serving:
                log.info("storage_regained")

    async def _probe(self) -> None:
        # The clock needs both instants: the storage looked at its own clock somewhere between them.
        sent_us = self._clock.uptime_us()
        storage_us = await self._storage.now_us()
        self._clock.observe(storage_us, sent_us=sent_us, received_us=self._clock.uptime_us())
        self._is_serving = True
