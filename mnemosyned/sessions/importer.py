"""Putting the sessions of a file into a storage, a batch at a time, so that it may be done again.

A start gives a session its life from now on, and not the expiry that it has. So it gets less first, and then
the rest: a touch moves an expiry to any later instant, exactly.

    now                 now + slack            expiry - slack        expiry
     |----- start ----------|                                          |     not later than now + slack
     |--------- life: expiry - now - slack --------->|~~~~~~~~~|       |     so it ends here, at the latest
                                                          touch ------>|     and ends here after all

If the import is interrupted between the two, the session has less of its life, at most SLACK_US. The same
import, run once more, gives it the rest.

What is there already is met by the first start, since a live session keeps its token. From then on each batch
is looked for first, so that a second import costs little more than reading:

    load ──> nothing          ──> start ──> touch
      ├────> equal            ──> touch, if it ends sooner: an expiry never moves back
      └────> another session  ──> left; or ended, and that of the file started

A touch and a load find sessions under former stored keys too (`storage/hashed.py`), so tokens that are plain
in the file get hashes where the target hashes. Hashes go to the engine itself, as they are.
"""

from __future__ import annotations

import asyncio
from array import array
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b
from typing import Final

from mnemosyned.errors import (
    CorruptSession,
    DeadlineExceeded,
    InvalidArgument,
    MnemosyneError,
    SessionAlreadyExists,
    SessionNotFound,
    StorageUnavailable,
)
from mnemosyned.sessions import token_hash
from mnemosyned.sessions.exporter import PAGE
from mnemosyned.sessions.model import Abandonment, Lookup, NewSession, Session, Touch
from mnemosyned.sessions.store import FullStore

BATCH: Final = 500
# Batches that are under way at the same time.
AT_ONCE: Final = 4
# Of the bags of a batch: a statement takes them in one piece.
_BATCH_BYTES: Final = 4 * 1024 * 1024
# Longer than any statement may take, so that nearly no start is too late.
SLACK_US: Final = 10_000_000
# What a start gives at most; engines compute with it. A touch moves the expiry to any instant.
_MAX_LIFE_US: Final = 366 * 24 * 3600 * 1_000_000
_ROUNDS: Final = 5
_DIGEST_BYTES: Final = 8


class Existing(Enum):
    """What becomes of a session of the target that has the key of another session in the file."""

    REFUSE = "refuse"  # nothing is imported
    SKIP = "skip"  # it stays
    REPLACE = "replace"  # it is ended, and the one of the file started


@dataclass(slots=True)
class Counts:
    """What became of the sessions of a file, each counted once; `pruned` were only in the target."""

    imported: int = 0
    there: int = 0  # equal ones were in the target
    replaced: int = 0
    different: int = 0  # other ones were in the target, and stay
    expired: int = 0  # since they were exported
    refused: int = 0  # by the engine
    pruned: int = 0
    kept: int = 0  # not in the file, and changed while they were to be removed

    @property
    def done(self) -> int:
        """How many sessions of the file have been dealt with."""
        return self.imported + self.there + self.replaced + self.different + self.expired + self.refused


@dataclass(slots=True)
class KeySet:
    """Stored keys, to ask whether one is among them: eight bytes for each.

    Of a million keys in the target that are not among a million here, one is taken for one of them with a
    probability of 1 to 18 million.
    """

    _digests: array[int] = field(default_factory=lambda: array("Q"))
    _is_sorted: bool = True

    def add(self, stored_key: str) -> None:
        """Add a key."""
        self._digests.append(_digest(stored_key))
        self._is_sorted = False

    def __contains__(self, stored_key: str) -> bool:
        if not self._is_sorted:
            self._digests, self._is_sorted = array("Q", sorted(self._digests)), True
        digest = _digest(stored_key)
        at = bisect_left(self._digests, digest)
        return at < len(self._digests) and self._digests[at] == digest


class Importer:
    """Puts sessions into a target; `counts` says what has become of them so far."""

    def __init__(
        self,
        engine: FullStore,
        by_token: FullStore,
        *,
        existing: Existing,
        complain: Callable[[Session, str], object] = lambda *_: None,
    ) -> None:
        """`by_token` is the engine too, or a HashedStore on it. `complain` gets what the engine refuses."""
        self.counts = Counts()
        self._engine = engine
        self._by_token = by_token
        self._existing = existing
        self._complain = complain
        self._is_any_there = False  # the target had a session of the file

    async def different(self, batch: Sequence[Session]) -> int:
        """Return how many of these sessions have a live counterpart that is another session."""
        count = 0
        for store, sessions in self._by_store(batch):
            found = await _loaded(store, sessions)
            count += sum(_is_other(one, session) for one, session in zip(found, sessions, strict=True))
        return count

    async def add(
        self,
        sessions: Iterable[Session],
        *,
        goes_on: Callable[[Sequence[Session]], bool] = lambda _: True,
    ) -> None:
        """See that the target has these sessions; no key comes twice.

        Some batches are under way while others are read. `goes_on` is asked before each of them. If it says
        no, those under way are completed, and no other is begun.

        Raises:
            StorageUnavailable: part of it may be done. It may be added again.
        """
        slots = asyncio.Semaphore(AT_ONCE)
        try:
            async with asyncio.TaskGroup() as adding:
                for batch in batches(sessions):
                    await slots.acquire()
                    if not goes_on(batch):
                        break
                    adding.create_task(self._add_batch(batch, slots))
                    # Reading the next one takes a while, in which the storage can work on this one.
                    await asyncio.sleep(0)
        except ExceptionGroup as failed:
            # Of a batch, or of the file while it was read.
            raise failed.exceptions[0] from None

    async def _add_batch(self, batch: Sequence[Session], slots: asyncio.Semaphore) -> None:
        for store, sessions in self._by_store(batch):
            await self._add(store, sessions)
        slots.release()

    async def prune(self, keys: KeySet, before_page: Callable[[], Awaitable[object]]) -> None:
        """Remove from the target what is not among these stored keys, expired or not.

        Raises:
            StorageUnavailable: no answer. It may be done again.
        """
        least = ""
        while page := await self._engine.stored_from(least, limit=PAGE):
            others = [one for one in page if one.stored_key not in keys]
            if others:
                await before_page()
                removed = await self._engine.remove_unchanged(others)
                self.counts.pruned += len(removed)
                self.counts.kept += len(others) - len(removed)
            least = page[-1].stored_key + "\0"

    def _by_store(self, batch: Sequence[Session]) -> Iterator[tuple[FullStore, list[Session]]]:
        hashed = [session for session in batch if token_hash.is_hashed(session.access_token)]
        if hashed:
            yield self._engine, hashed
        plain = [session for session in batch if not token_hash.is_hashed(session.access_token)]
        if plain:
            yield self._by_token, plain

    async def _add(self, store: FullStore, sessions: list[Session]) -> None:
        ended: set[str] = set()  # of the target's, so that those of the file can take their places
        for _ in range(_ROUNDS):
            sessions = await self._round(store, sessions, ended)
            if not sessions:
                return
        raise StorageUnavailable("mnemosyned: storage: sessions change, or it is too slow for an import")

    async def _round(self, store: FullStore, sessions: list[Session], ended: set[str]) -> list[Session]:
        """Start what is not there; return what must be tried once more."""
        now_us = await store.now_us()
        live = [session for session in sessions if session.expires_at_us - now_us > 1]
        self.counts.expired += len(sessions) - len(live)
        # A target without sessions need not be asked for them.
        met = _Met.of(live, await _loaded(store, live)) if self._is_any_there else _Met(missing=live)
        started, retried = await self._started(store, met.missing, now_us)
        started = await self._extended(store, started)
        behind = await self._extended(store, met.behind)
        # Without a wait in between: other batches count too.
        replaced = sum(one.access_token in ended for one in started)
        self.counts.replaced += replaced
        self.counts.imported += len(started) - replaced
        self.counts.there += len(met.equal) + len(behind)
        if self._existing is Existing.REPLACE:
            await _end(store, met.other)
            ended.update(one.access_token for one in met.other)
            return retried + met.other
        self.counts.different += len(met.other)
        return retried

    async def _started(
        self, store: FullStore, sessions: list[Session], now_us: int
    ) -> tuple[list[Session], list[Session]]:
        """Start sessions; return those that were started, and those that must be tried once more."""
        started, retried = [], []
        results = await store.start([_new(session, now_us) for session in sessions]) if sessions else []
        for session, result in zip(sessions, results, strict=True):
            match result:
                case Session():
                    started.append(session)
                case DeadlineExceeded():
                    retried.append(session)
                case SessionAlreadyExists():
                    self._is_any_there = True
                    retried.append(session)
                case InvalidArgument():
                    self.counts.refused += 1
                    self._complain(session, str(result).removeprefix("mnemosyned: "))
                case error:
                    raise error
        return started, retried

    async def _extended(self, store: FullStore, sessions: list[Session]) -> list[Session]:
        """Give sessions of the target the expiries of the file; return those that have not ended."""
        if not sessions:
            return []
        touches = [Touch(access_token=one.access_token, expires_at_us=one.expires_at_us) for one in sessions]
        extended = []
        for session, outcome in zip(sessions, await store.touch(touches), strict=True):
            if isinstance(outcome, MnemosyneError):
                raise outcome
            if outcome:
                extended.append(session)
        self.counts.expired += len(sessions) - len(extended)
        return extended


@dataclass(slots=True)
class _Met:
    """Sessions of the file, by what the target has under their keys."""

    missing: list[Session] = field(default_factory=list)
    equal: list[Session] = field(default_factory=list)  # and it ends no sooner
    behind: list[Session] = field(default_factory=list)  # equal, and it ends sooner
    other: list[Session] = field(default_factory=list)

    @classmethod
    def of(cls, sessions: list[Session], found: list[Session | MnemosyneError]) -> _Met:
        met = cls()
        for session, one in zip(sessions, found, strict=True):
            if isinstance(one, SessionNotFound):
                met.missing.append(session)
            elif _is_other(one, session):
                met.other.append(session)
            elif isinstance(one, Session) and one.expires_at_us >= session.expires_at_us:
                met.equal.append(session)
            else:
                met.behind.append(session)
        return met


def batches(sessions: Iterable[Session]) -> Iterator[list[Session]]:
    """Cut sessions into batches of at most BATCH, whose bags are not too large for one statement."""
    batch: list[Session] = []
    size_bytes = 0
    for session in sessions:
        if batch and (len(batch) == BATCH or size_bytes + len(session.bag) > _BATCH_BYTES):
            yield batch
            batch, size_bytes = [], 0
        batch.append(session)
        size_bytes += len(session.bag)
    if batch:
        yield batch


def _new(session: Session, now_us: int) -> NewSession:
    left_us = session.expires_at_us - now_us
    slack_us = min(SLACK_US, left_us // 2)
    return NewSession(
        access_token=session.access_token,
        subject_id=session.subject_id,
        subject_client=session.subject_client,
        refresh_token=session.refresh_token,
        bag=session.bag,
        ttl_us=min(left_us - slack_us, _MAX_LIFE_US),
        not_after_us=now_us + slack_us,
    )


async def _loaded(store: FullStore, sessions: Sequence[Session]) -> list[Session | MnemosyneError]:
    """Return what the target has under these keys, without extending it: no life is less than none."""
    lookups = [Lookup(access_token=one.access_token, ttl_us=0, touch_interval_us=0) for one in sessions]
    return await store.load(lookups) if lookups else []


def _is_other(found: Session | MnemosyneError, session: Session) -> bool:
    """Tell whether a session of the target is another one than that of the file, but for its expiry."""
    if isinstance(found, SessionNotFound):
        return False
    if isinstance(found, CorruptSession):
        return True
    if isinstance(found, MnemosyneError):
        raise found
    return (found.subject_id, found.subject_client, found.refresh_token, found.bag) != (
        session.subject_id,
        session.subject_client,
        session.refresh_token,
        session.bag,
    )


async def _end(store: FullStore, sessions: Sequence[Session]) -> None:
    if not sessions:
        return
    for outcome in await store.abandon([Abandonment(access_token=one.access_token) for one in sessions]):
        if isinstance(outcome, MnemosyneError):
            raise outcome


def _digest(stored_key: str) -> int:
    # A key that is no UTF-8 has surrogates.
    raw = stored_key.encode(errors="surrogateescape")
    return int.from_bytes(blake2b(raw, digest_size=_DIGEST_BYTES).digest())
