"""Write-behind of expiries: a session is extended in memory at once, in the storage soon.

Each extended session is written within one interval, whatever happens to its cache entry; a crash
can so shorten a session by at most the interval.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Final

from mnemosyned.errors import MnemosyneError
from mnemosyned.sessions.encoded import EncodedSession
from mnemosyned.sessions.model import Touch
from mnemosyned.sessions.store import SessionStore

if TYPE_CHECKING:
    from prometheus_client import Counter

log = logging.getLogger(__name__)

_BATCH_ITEMS: Final = 512
# The rest of the interval is for the writing itself.
_PERIOD_SHARE: Final = 0.8
_MIN_PERIOD_S: Final = 0.02


class TouchWriter:
    """Collects extended sessions and writes their expiries in batches.

    At most `max_waiting` wait, as when the storage is away; beyond that the oldest is given up and
    counted in `lost`. `on_gone` is told the token of a session that the storage has no longer.
    """

    def __init__(
        self,
        store: SessionStore,
        *,
        max_waiting: int,
        lost: Counter,
        on_gone: Callable[[str], None],
    ) -> None:
        self._store = store
        self._max_waiting = max_waiting
        self._lost = lost
        self._on_gone = on_gone
        self._dirty: dict[str, EncodedSession] = {}
        self._flushing = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._dirty)

    def mark(self, token: str, ready: EncodedSession) -> None:
        """Have the session's latest expiry written; call it once each time `is_dirty` turns true."""
        waiting = self._dirty.get(token)
        if waiting is not None:
            # Of a copy that a drop has taken from the cache: what it promised still holds.
            ready.expires_at_us = max(ready.expires_at_us, waiting.expires_at_us)
        elif len(self._dirty) >= self._max_waiting:
            oldest = next(iter(self._dirty))
            self._dirty.pop(oldest).is_dirty = False
            self._lost.inc()
        ready.is_dirty = True
        self._dirty[token] = ready

    async def flush(self) -> None:
        """Write everything that waits; callers at the same time wait for one another.

        Raises:
            StorageUnavailable: what is not written waits for the next flush.
        """
        async with self._flushing:
            for _ in range(1 + len(self._dirty) // _BATCH_ITEMS):
                await self._write_batch()

    async def run(self, interval_s: float) -> None:
        """Flush for ever, so that nothing waits longer than the interval while the storage answers."""
        while True:
            await asyncio.sleep(max(interval_s * _PERIOD_SHARE, _MIN_PERIOD_S))
            try:
                await self.flush()
            except MnemosyneError as exc:
                # The store has logged the cause; nothing is lost, the next round tries again.
                log.debug("touches_wait", extra={"waiting": len(self), "error": str(exc)})
            except Exception:  # the root of the task: a bug must not end the writing
                log.exception("touches_failed", extra={"waiting": len(self)})

    async def _write_batch(self) -> None:
        batch = dict(islice(self._dirty.items(), _BATCH_ITEMS))
        touches = [
            Touch(access_token=token, expires_at_us=ready.expires_at_us) for token, ready in batch.items()
        ]
        for token, ready in batch.items():
            # From here on a new extension marks the session anew.
            del self._dirty[token]
            ready.is_dirty = False
        try:
            results = await self._store.touch(touches) if touches else []
        except BaseException:
            self._take_back(batch)
            raise
        for touch, result in zip(touches, results, strict=True):
            if isinstance(result, MnemosyneError):
                self._take_back({touch.access_token: batch[touch.access_token]})
            elif not result:
                self._on_gone(touch.access_token)

    def _take_back(self, batch: dict[str, EncodedSession]) -> None:
        for token, ready in batch.items():
            newer = self._dirty.get(token)
            if newer is None:
                self.mark(token, ready)
            else:
                newer.expires_at_us = max(newer.expires_at_us, ready.expires_at_us)
