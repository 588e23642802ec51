"""Write-behind of expiries: in memory a session is extended at once, in the storage within a touch interval.

Each extended session is written within the interval, also when its cache entry is dropped or evicted. A
crash therefore shortens a session by at most the interval. `lifetime.py` has the rules of time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from heapq import nsmallest
from itertools import islice
from typing import TYPE_CHECKING, Final

from aio.periodic import run_periodically
from aio.steps import Steps, cut
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

    At most `max_waiting` sessions wait, for example while the storage is unavailable. Beyond that the
    oldest is given up and counted in `lost`. `on_gone` is called with the token of a session that the
    storage no longer has.
    """

    def __init__(
        self,
        store: SessionStore,
        *,
        max_waiting: int,
        lost: Counter,
        on_gone: Callable[[str], None],
        token_of: Callable[[str], str] = str,
    ) -> None:
        """`token_of` returns the token of a cached session by what List shows in its place."""
        self._store = store
        self._max_waiting = max_waiting
        self._lost = lost
        self._on_gone = on_gone
        self._token_of = token_of
        self._dirty: dict[str, EncodedSession] = {}
        self._in_flight: dict[str, int] = {}
        self._flushing = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._dirty)

    def mark(self, token: str, encoded: EncodedSession) -> None:
        """Have the session's latest expiry written; call it when it has moved and `is_dirty` is false."""
        waiting = self._dirty.get(token)
        if waiting is not None:
            # The other copy was dropped from the cache. The expiry that it promised still holds.
            encoded.expires_at_us = max(encoded.expires_at_us, waiting.expires_at_us)
        elif len(self._dirty) >= self._max_waiting:
            oldest = next(iter(self._dirty))
            self._dirty.pop(oldest).is_dirty = False
            self._lost.inc()
        encoded.is_dirty = True
        self._dirty[token] = encoded

    def is_anything_waiting(self) -> bool:
        """Tell whether the storage may lack an expiry, waiting or under way."""
        return bool(self._dirty or self._in_flight)

    def waiting_us(self, shown: str) -> int:
        """Return the expiry of a session, as List shows its token, if the storage may lack it; or 0."""
        token = self._token_of(shown)
        encoded = self._dirty.get(token)
        return self._in_flight.get(token, 0) if encoded is None else encoded.expires_at_us

    def soonest(self, after_us: int, count: int) -> Steps[list[str]]:
        """Return the sessions that wait and expire first after an instant, at most `count`."""
        found: list[tuple[int, str]] = []
        for part in cut(list(self._dirty.items())):
            expiries = [(encoded.expires_at_us, token) for token, encoded in part]
            found = nsmallest(count, found + [one for one in expiries if one[0] > after_us])
            yield
        return [token for _, token in found]

    async def write(self, shown: Sequence[str]) -> None:
        """Write what waits for these sessions, by what List shows as their tokens; wait for no other writing.

        Raises:
            StorageUnavailable: it is written with the next flush.
        """
        tokens = map(self._token_of, shown)
        await self._write_batch({token: self._dirty[token] for token in tokens if token in self._dirty})

    async def flush(self) -> None:
        """Write everything that waits; concurrent callers take turns.

        Raises:
            StorageUnavailable: what is not written waits for the next flush.
        """
        async with self._flushing:
            for _ in range(1 + len(self._dirty) // _BATCH_ITEMS):
                await self._write_batch(dict(islice(self._dirty.items(), _BATCH_ITEMS)))

    async def run(self, interval_s: float) -> None:
        """Flush so often that nothing waits longer than the interval while the storage answers."""
        period_s = max(interval_s * _PERIOD_SHARE, _MIN_PERIOD_S)
        await run_periodically("touches", self._flush_if_possible, period_s=lambda: period_s)

    async def _flush_if_possible(self) -> None:
        try:
            await self.flush()
        except MnemosyneError as exc:
            # The store has logged the cause. Nothing is lost: the next round tries again.
            log.debug("touches_wait", extra={"waiting": len(self), "error": str(exc)})

    async def _write_batch(self, batch: dict[str, EncodedSession]) -> None:
        touches = [
            Touch(access_token=token, expires_at_us=encoded.expires_at_us) for token, encoded in batch.items()
        ]
        for token, encoded in batch.items():
            # From here on a new extension marks the session once more.
            del self._dirty[token]
            encoded.is_dirty = False
        written_us = {touch.access_token: touch.expires_at_us for touch in touches}
        self._in_flight |= written_us
        try:
            results = await self._store.touch(touches) if touches else []
        except BaseException:
            self._take_back(batch)
            raise
        finally:
            for token, expires_at_us in written_us.items():
                # Unless a later one has begun meanwhile.
                if self._in_flight.get(token) == expires_at_us:
                    del self._in_flight[token]
        for touch, result in zip(touches, results, strict=True):
            if isinstance(result, MnemosyneError):
                self._take_back({touch.access_token: batch[touch.access_token]})
            elif not result:
                self._on_gone(touch.access_token)

    def _take_back(self, batch: dict[str, EncodedSession]) -> None:
        for token, encoded in batch.items():
            newer = self._dirty.get(token)
            if newer is None:
                self.mark(token, encoded)
            else:
                newer.expires_at_us = max(newer.expires_at_us, encoded.expires_at_us)
