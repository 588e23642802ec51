"""Natural batching in front of a store: single calls in, batches out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, Generic, TypeVar

from aio.batcher import Batcher, BatchLimits
from mnemosyned.errors import MnemosyneError, Overloaded, SessionNotFound
from mnemosyned.sessions.model import Abandonment, NewSession, Session, ValueChange
from mnemosyned.sessions.store import SessionStore

Loaded = TypeVar("Loaded")

# Reads of different callers need not wait for each other; writes share the disk's flush. A write that
# has begun runs to its end: cancelled, it might be committed after the cache was told.
_READS: Final = BatchLimits(max_items=512, concurrency=2)
_WRITES: Final = BatchLimits(max_items=256, concurrency=1, is_abandonable=False)


class BatchedStore(Generic[Loaded]):
    """One session a call, as callers see it; one statement for many, as the storage does.

    `load` makes of some tokens what is to be had of their sessions. `on_written` is told the tokens of
    sessions that were changed or ended, or may have been, and `on_started` those of sessions that were
    begun, likewise: after the storage's answer, also when it was a failure, and before any caller gets it.
    """

    def __init__(
        self,
        store: SessionStore,
        *,
        load: Callable[[Sequence[str]], Awaitable[Sequence[Loaded | MnemosyneError]]],
        on_written: Callable[[Iterable[str]], None],
        on_started: Callable[[Iterable[str]], None],
    ) -> None:
        self._store = store
        self._on_written = on_written
        self._on_started = on_started
        self._starts: Batcher[NewSession, Session] = Batcher(
            self._start, limits=_WRITES, full=_overloaded, size_bytes=NewSession.size_bytes
        )
        self._loads: Batcher[str, Loaded] = Batcher(load, limits=_READS, full=_overloaded)
        self._existences: Batcher[str, bool] = Batcher(store.exist, limits=_READS, full=_overloaded)
        self._changes: Batcher[ValueChange, dict[str, str]] = Batcher(
            self._set_values, limits=_WRITES, full=_overloaded, size_bytes=ValueChange.size_bytes
        )
        self._abandonments: Batcher[Abandonment, bool] = Batcher(
            self._abandon, limits=_WRITES, full=_overloaded
        )

    async def start(self, session: NewSession) -> Session:
        """Store a session. Raises SessionAlreadyExists."""
        return await self._starts.submit(session)

    def load(self, token: str) -> asyncio.Future[Loaded]:
        """Begin to read a session for a Get. Raises Overloaded at once."""
        return self._loads.enqueue(token)

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

    async def _start(self, sessions: Sequence[NewSession]) -> Sequence[Session | MnemosyneError]:
        try:
            return await self._store.start(sessions)
        finally:
            self._on_started(new.access_token for new in sessions)

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


def _overloaded() -> Overloaded:
    return Overloaded("mnemosyned: too many calls are waiting for the storage")
