"""Natural batching in front of a store: single calls in, batches out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from mnemosyned.batcher import Batcher, BatchLimits
from mnemosyned.errors import MnemosyneError, SessionNotFound
from mnemosyned.session import Abandonment, NewSession, Session, ValueChange
from mnemosyned.storage.port import SessionStore

# Reads of different callers need not wait for each other; writes share the disk's flush. A write that
# has begun runs to its end: cancelled, it might be committed after the cache was told.
_READS: Final = BatchLimits(max_items=512, lanes=2)
_WRITES: Final = BatchLimits(max_items=256, lanes=1, is_abandonable=False)


class BatchedStore:
    """One session a call, as callers see it; one statement for many, as the storage does.

    `on_written` is told the tokens of sessions that were changed or ended, or may have been: after
    the storage's answer, also when it was a failure, and before any caller gets it.
    """

    def __init__(self, store: SessionStore, on_written: Callable[[Iterable[str]], None]) -> None:
        self._store = store
        self._on_written = on_written
        self._starts: Batcher[NewSession, Session] = Batcher(
            store.start, limits=_WRITES, size_bytes=NewSession.size_bytes
        )
        self._loads: Batcher[str, Session] = Batcher(store.load, limits=_READS)
        self._existences: Batcher[str, bool] = Batcher(store.exist, limits=_READS)
        self._changes: Batcher[ValueChange, dict[str, str]] = Batcher(
            self._set_values, limits=_WRITES, size_bytes=ValueChange.size_bytes
        )
        self._abandonments: Batcher[Abandonment, bool] = Batcher(self._abandon, limits=_WRITES)

    async def start(self, session: NewSession) -> Session:
        """Store a session. Raises SessionAlreadyExists."""
        return await self._starts.submit(session)

    async def load(self, token: str) -> Session:
        """Read a session for a Get. Raises SessionNotFound."""
        return await self._loads.submit(token)

    async def exists(self, token: str) -> bool:
        """Tell whether there is a live session."""
        return await self._existences.submit(token)

    async def set_value(self, change: ValueChange) -> dict[str, str]:
        """Set one key; return the whole bag. Raises SessionNotFound."""
        return await self._changes.submit(change)

    async def abandon(self, ending: Abandonment) -> None:
        """End a session. Raises SessionNotFound."""
        if not await self._abandonments.submit(ending):
            raise SessionNotFound

    async def close(self) -> None:
        """Cancel what waits or is under way."""
        batchers = (self._starts, self._loads, self._existences, self._changes, self._abandonments)
        await asyncio.gather(*(batcher.close() for batcher in batchers))

    async def _set_values(self, changes: Sequence[ValueChange]) -> Sequence[dict[str, str] | MnemosyneError]:
        try:
            return await self._store.set_values(changes)
        finally:
            self._on_written(change.access_token for change in changes)

    async def _abandon(self, endings: Sequence[Abandonment]) -> Sequence[bool | MnemosyneError]:
        try:
            return await self._store.abandon(endings)
        finally:
            self._on_written(ending.access_token for ending in endings)
