"""Natural batching in front of a store: single calls in, batches out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar

from aio.batcher import Batcher, BatchLimits
from mnemosyned.errors import MnemosyneError, Overloaded, SessionNotFound
from mnemosyned.sessions.changed_copies import Change, ChangedCopies
from mnemosyned.sessions.coherence import Coherence, Written
from mnemosyned.sessions.model import Abandonment, ChangedBag, NewSession, Session
from mnemosyned.sessions.store import SessionStore

Loaded = TypeVar("Loaded")

# Reads of different callers need not wait for each other.
_READS: Final = BatchLimits(max_items=512, concurrency=2)
# Writes share the disk's flush. A write that has begun runs to its end: if it were cancelled, the database
# might commit it after the caches have been invalidated. What a batch holds is passed to the storage in one
# piece, for which other calls wait: large sessions go alone.
_WRITES: Final = BatchLimits(max_items=256, max_bytes=1024**2, concurrency=1, is_abandonable=False)


class BatchedStore(Generic[Loaded]):
    """One session a call, as callers see it; many sessions a statement, as the storage prefers it.

    `load` makes of some tokens what there is to know of their sessions. Each batch of writes passes through
    `coherence`: no caller gets an answer before the copies that the write has made stale are dropped.
    """

    def __init__(
        self,
        store: SessionStore,
        *,
        load: Callable[[Sequence[str]], Awaitable[Sequence[Loaded | MnemosyneError]]],
        coherence: Coherence,
        changed_copies: ChangedCopies,
    ) -> None:
        self._store = store
        self._coherence = coherence
        self._changed_copies = changed_copies
        self._loads: Batcher[str, Loaded] = Batcher(load, limits=_READS, full=_overloaded)
        self._existences: Batcher[str, bool] = Batcher(store.exist, limits=_READS, full=_overloaded)
        self._starts: Batcher[NewSession, Written[Session]] = Batcher(
            self._start, limits=_WRITES, full=_overloaded, size_bytes=NewSession.size_bytes
        )
        self._changes: Batcher[Change, Written[ChangedBag]] = Batcher(
            self._set_values, limits=_WRITES, full=_overloaded, size_bytes=Change.size_bytes
        )
        self._abandonments: Batcher[Abandonment, Written[bool]] = Batcher(
            self._abandon, limits=_WRITES, full=_overloaded
        )

    def load(self, token: str) -> asyncio.Future[Loaded]:
        """Begin to read a session for a Get. Raises Overloaded at once."""
        return self._loads.enqueue(token)

    async def exists(self, token: str) -> bool:
        """Tell whether there is a live session."""
        return await self._existences.submit(token)

    async def start(self, session: NewSession) -> Session:
        """Store a session. Raises SessionAlreadyExists."""
        return await (await self._starts.submit(session)).outcome()

    async def set_value(self, change: Change) -> dict[str, str]:
        """Set one key; return the whole bag. Raises SessionNotFound."""
        return (await (await self._changes.submit(change)).outcome()).values

    async def abandon(self, ending: Abandonment) -> None:
        """End a session. Raises SessionNotFound."""
        if not await (await self._abandonments.submit(ending)).outcome():
            raise SessionNotFound

    async def close(self) -> None:
        """Cancel what waits or is under way."""
        batchers = (self._starts, self._loads, self._existences, self._changes, self._abandonments)
        await asyncio.gather(*(batcher.close() for batcher in batchers))

    async def _start(self, sessions: Sequence[NewSession]) -> Sequence[Written[Session]]:
        tokens = [new.access_token for new in sessions]
        # The makers' own fills stay open: what they put is what this batch has made.
        return await self._coherence.around_write(
            tokens, self._store.start(sessions), drop=self._coherence.drop_made
        )

    async def _set_values(self, changes: Sequence[Change]) -> Sequence[Written[ChangedBag]]:
        with self._changed_copies.begin(changes) as copies:
            return await self._coherence.around_write(
                [change.token for change in changes],
                self._store.set_values([change.change for change in changes]),
                drop=copies.drop,
                keep=copies.keep,
            )

    async def _abandon(self, endings: Sequence[Abandonment]) -> Sequence[Written[bool]]:
        tokens = [ending.access_token for ending in endings]
        return await self._coherence.around_write(tokens, self._store.abandon(endings), is_end=True)


def _overloaded() -> Overloaded:
    return Overloaded("mnemosyned: too many calls are waiting for the storage")
