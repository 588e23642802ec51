"""Opening the storage, and knowing from then on whether it answers."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from mnemosyned.errors import StorageUnavailable
from mnemosyned.sessions.clock import StorageClock
from mnemosyned.sessions.store import SessionStore

log = logging.getLogger(__name__)

_PROBE_PERIOD_S: Final = 1.0
_OPEN_RETRY_S: Final = (0.1, 0.2, 0.5, 1.0, 2.0)


class StorageHealth:
    """Asks the storage its time every second: the answer is the health, the time sets the clock."""

    def __init__(self, store: SessionStore, clock: StorageClock) -> None:
        self._store = store
        self._clock = clock
        self._is_serving = False

    @property
    def is_serving(self) -> bool:
        """Whether the last question was answered."""
        return self._is_serving

    async def open(self) -> None:
        """Open the storage, for as long as that takes.

        Raises:
            StorageRefused: it will never work like this.
        """
        tries = 0
        while True:
            try:
                await self._store.open()
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
        """Ask for ever."""
        while True:
            await asyncio.sleep(_PROBE_PERIOD_S)
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
        sent_us = self._clock.uptime_us()
        storage_us = await self._store.now_us()
        self._clock.observe(storage_us, sent_us=sent_us, received_us=self._clock.uptime_us())
        self._is_serving = True
