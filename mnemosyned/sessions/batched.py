"""Natural batching in front of a store: single calls in, batches out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar

from aio.batcher import Batcher, BatchLimits
from aio.later import Later, Outcome
from mnemosyned.errors import MnemosyneError, Overloaded
from mnemosyned.sessions.changed_copies import Change, ChangedCopies
from mnemosyned.sessions.coherence import Coherence, Written
from mnemosyned.sessions.model import Abandonment, ChangedBag, NewSession, Session
from mnemosyned.sessions.store import SessionStore

Loaded = TypeVar("Loaded")
Result = TypeVar("Result")

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

    def load(self, token: str) -> Later[Loaded]:
        """Begin to read a session for a Get. Raises Overloaded at once."""
        return self._loads.enqueue(token)

    async def exists(self, token: str) -> bool:
        """Tell whether there is a live session."""
        return await self._existences.submit(token)

    def start(self, session: NewSession) -> Later[Written[Session]]:
        """Store a session: SessionAlreadyExists is a result. Raises Overloaded at once."""
        return self._starts.enqueue(session)

    def set_value(self, change: Change) -> Later[Written[ChangedBag]]:
        """Set one key: SessionNotFound is a result. Raises Overloaded at once."""
        return self._changes.enqueue(change)

    def abandon(self, ending: Abandonment) -> Later[bool]:
        """End a session; tell whether there was one. Raises Overloaded at once."""
        return self._abandonments.enqueue(ending).through(settled)

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


def settled(outcome: Outcome[Written[Result]]) -> Outcome[Result]:
    """Return the result of a write once it is settled, as a step of a Later."""
    if isinstance(outcome, Written):
        return outcome.outcome()
    assert isinstance(outcome, BaseException)
    raise outcome


def _overloaded() -> Overloaded:
    return Overloaded("mnemosyned: too many calls are waiting for the storage")
