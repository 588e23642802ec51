"""The use cases: what each RPC means, on values, without gRPC.

A Get that the cache can answer returns bytes at once; everything that must wait returns a
coroutine. Expiries are microseconds on the storage's clock, and those of Gets whole milliseconds.

Rules for editing: a session enters the cache only through a fill that was opened before it was
read; whatever changes or ends a session drops it from the cache when the storage has answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol, TypeAlias

from cache.lru import Slot
from cache.read_through import ReadThrough
from mnemosyned.errors import (
    CorruptBag,
    InvalidArgument,
    MnemosyneError,
    SessionAlreadyExists,
    SessionNotFound,
)
from mnemosyned.sessions import bag
from mnemosyned.sessions.bag import BagLimits
from mnemosyned.sessions.batched import BatchedStore
from mnemosyned.sessions.clock import StorageClock
from mnemosyned.sessions.encoded import EncodedSession, ExpiryField, list_response
from mnemosyned.sessions.model import (
    DEFAULT_LIST_LIMIT,
    MAX_LIST_LIMIT,
    Abandonment,
    Criteria,
    NewSession,
    Session,
    ValueChange,
    check_criteria,
    check_new,
    check_token,
)
from mnemosyned.sessions.store import Deletion, SessionStore
from mnemosyned.sessions.token_hash import is_hashed
from mnemosyned.sessions.touches import TouchWriter

_US_PER_MS: Final = 1000
_MAX_OFFSET: Final = 2**63 - 1
# One DELETE at a time stays short, so that it holds few locks and little memory.
_DELETE_BATCH: Final = 5000
# Python objects around the token: its slot, and its place in the dictionary.
NEGATIVE_BYTES: Final = 350


# Of a token: its session, or that there is none.
Loaded: TypeAlias = Slot[EncodedSession] | Slot[None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetimes:
    """How long things last, in microseconds."""

    session_us: int
    cache_us: int  # 0: nothing is cached
    touch_interval_us: int


class Invalidator(Protocol):
    """The caches of other nodes."""

    async def invalidate(self, names: Sequence[str]) -> None:
        """Have their owners drop these sessions; return when those that can be reached have.

        A name is a token, or begins with NUL and tells nobody the owner.
        """
        ...

    def changed(self, names: Iterable[str]) -> None:
        """Take note of sessions that were begun, changed or ended here, or may have been."""
        ...


class SessionService:
    """Sessions, cached in front of a store; `elsewhere` is told of those that a Delete has ended."""

    def __init__(
        self,
        store: SessionStore,
        cache: ReadThrough[EncodedSession],
        touches: TouchWriter,
        *,
        clock: StorageClock,
        lifetimes: Lifetimes,
        bag_limits: BagLimits | None = None,
        elsewhere: Invalidator | None = None,
    ) -> None:
        self.bag_limits = bag_limits or BagLimits()
        self._store = store
        self._elsewhere = elsewhere
        self._batched: BatchedStore[Loaded] = BatchedStore(
            store, load=self._load_slots, on_written=self._drop, on_started=self._made
        )
        self._cache = cache
        self._touches = touches
        self._clock = clock
        self._lifetimes = lifetimes
        self._expiry_field = ExpiryField()
        self._steps: set[asyncio.Task[Deletion]] = set()

    async def close(self) -> None:
        """Cancel the calls that still wait for the storage."""
        for step in self._steps:
            step.cancel()
        await asyncio.gather(*self._steps, return_exceptions=True)
        await self._batched.close()

    def get(self, token: str) -> bytes | Coroutine[Any, Any, bytes]:
        """Extend a session and return it as a response message.

        Raises:
            InvalidArgument: the token is no token.
            SessionNotFound: at once, or by the coroutine.
        """
        now_us = self._clock.now_us()
        ready = self._cache.peek(token, now_us=now_us)
        if ready is not None:
            return self._extended(token, ready, now_us)
        if self._cache.is_negative(token, now_us=now_us):
            raise SessionNotFound
        return self._load(check_token(token), now_us)

    def exists_cached(self, token: str) -> bool | None:
        """Tell whether there is a live session, as far as the cache knows; None: `exists` must be asked.

        Raises:
            InvalidArgument: the token is no token.
        """
        now_us = self._clock.now_us()
        if self._cache.peek(check_token(token), now_us=now_us) is not None:
            return True
        return False if self._cache.is_negative(token, now_us=now_us) else None

    async def exists(self, token: str) -> bool:
        """Tell whether the storage has a live session; does not extend it."""
        asked_us = self._clock.now_us()
        with self._cache.begin_fill(token) as fill:
            is_there = await self._batched.exists(token)
            if not is_there:
                fill.put_negative(self._negative_slot(token, asked_us))
        return is_there

    async def start(self, new: NewSession) -> bytes:
        """Store a session and return it as a response message.

        Raises:
            InvalidArgument: a field cannot be stored.
            SessionAlreadyExists: the token is in use.
        """
        check_new(new)
        bag.check_size(new.bag)
        asked_us = self._clock.now_us()
        with self._cache.begin_fill(new.access_token, is_making=True) as fill:
            session = await self._batched.start(new)
            slot = self._slot(session, asked_us)
            fill.put(slot)
        return slot.value.response(self._expiry_field.encode(session.expires_at_us))

    async def start_again(self, new: NewSession) -> bytes:
        """Store a session, unless an earlier try of the same call has.

        Raises:
            InvalidArgument: a field cannot be stored.
            SessionAlreadyExists: another session has the token.
        """
        try:
            return await self.start(new)
        except SessionAlreadyExists:
            (found,) = await self._store.load([new.access_token])
            if isinstance(found, MnemosyneError) or not found.is_from(new):
                raise
        return EncodedSession(found).response(self._expiry_field.encode(found.expires_at_us))

    async def set_value(self, change: ValueChange) -> dict[str, str]:
        """Set one key of a session's bag; return the whole bag. Does not extend the session.

        Raises:
            InvalidArgument: no key, or the bag would pass a limit.
            SessionNotFound: there is none.
        """
        check_token(change.access_token)
        if not change.key:
            raise InvalidArgument("mnemosyned: missing bag key")
        self.bag_limits.check(change.key, change.value)
        change = replace(change, max_entries=self.bag_limits.entries)
        return await self._batched.set_value(change)

    async def abandon(self, ending: Abandonment) -> None:
        """End a session. Raises SessionNotFound."""
        check_token(ending.access_token)
        await self._batched.abandon(ending)

    async def list(self, criteria: Criteria, *, offset: int, limit: int) -> bytes:
        """Return live sessions as a response message; limit 0 means DEFAULT_LIST_LIMIT.

        Raises:
            InvalidArgument: offset or limit out of bounds.
        """
        check_criteria(criteria)
        if not 0 <= offset <= _MAX_OFFSET:
            raise InvalidArgument("mnemosyned: offset is negative")
        if not 0 <= limit <= MAX_LIST_LIMIT:
            raise InvalidArgument(f"mnemosyned: limit is not between 0 and {MAX_LIST_LIMIT}")
        # Order and range go by expiry: the storage must know the latest.
        await self._touches.flush()
        sessions = await self._store.find(criteria, offset=offset, limit=limit or DEFAULT_LIST_LIMIT)
        return list_response(sessions)

    async def delete(self, criteria: Criteria) -> int:
        """End every session that meets all criteria; return how many.

        Raises:
            InvalidArgument: no criterion.
        """
        check_criteria(criteria)
        if criteria.is_empty():
            raise InvalidArgument("mnemosyned: none of expected arguments was provided")
        if criteria.has_range():
            await self._touches.flush()
        deleted = 0
        while True:
            step = await self._delete_step(criteria)
            deleted += len(step.names)
            if step.is_all:
                return deleted

    async def clean_up(self, limit: int) -> int:
        """Remove at most `limit` expired rows; return how many."""
        names = await self._store.clean_up(limit=limit)
        # Copies by other names go as they come: what is about to expire is not served from the cache.
        self._drop(name for name in names if not is_hashed(name))
        return len(names)

    async def _delete_step(self, criteria: Criteria) -> Deletion:
        async def delete() -> Deletion:
            step = await self._store.delete(criteria, limit=_DELETE_BATCH)
            self._drop(step.names)
            if self._elsewhere is not None:
                await self._elsewhere.invalidate(step.names)
            return step

        # Cancelled with its caller, it might be committed and the cache never told.
        task = asyncio.create_task(delete())
        self._steps.add(task)
        task.add_done_callback(self._steps.discard)
        return await asyncio.shield(task)

    async def _load(self, token: str, asked_us: int) -> bytes:
        if self._lifetimes.cache_us:
            ready = await self._cache.load(token, self._batched.load)
        else:
            # Nobody may share a load that was begun before another node's write was acknowledged.
            ready = (await self._batched.load(token)).value
        if ready is None:
            raise SessionNotFound
        # From when it was asked: where the load has just moved the stored expiry, nothing is left to write.
        return self._extended(token, ready, asked_us)

    async def _load_slots(self, tokens: Sequence[str]) -> Sequence[Loaded | MnemosyneError]:
        asked_us = self._clock.now_us()
        found = await self._store.load(tokens)
        return [self._loaded(token, one, asked_us) for token, one in zip(tokens, found, strict=True)]

    def _loaded(self, token: str, found: Session | MnemosyneError, asked_us: int) -> Loaded | MnemosyneError:
        if isinstance(found, SessionNotFound):
            return self._negative_slot(token, asked_us)
        try:
            return self._slot(found, asked_us) if isinstance(found, Session) else found
        except CorruptBag as exc:
            # Its own; the others of the batch are well.
            return exc

    def _slot(self, session: Session, asked_us: int) -> Slot[EncodedSession]:
        ready = EncodedSession(session)
        # Past this the row might expire before its next touch is written.
        row_fresh_until_us = session.expires_at_us - 2 * self._lifetimes.touch_interval_us
        # From when it was asked for: the answer may have waited for this process.
        fresh_until_us = min(asked_us + self._lifetimes.cache_us, row_fresh_until_us)
        return Slot(ready, ready.size_bytes, fresh_until_us)

    def _negative_slot(self, token: str, asked_us: int) -> Slot[None]:
        return Slot(None, len(token.encode()) + NEGATIVE_BYTES, asked_us + self._lifetimes.cache_us)

    def _extended(self, token: str, ready: EncodedSession, now_us: int) -> bytes:
        expires_at_us = now_us + self._lifetimes.session_us
        expires_at_us -= expires_at_us % _US_PER_MS
        if expires_at_us > ready.expires_at_us:
            ready.expires_at_us = expires_at_us
            if not ready.is_dirty:
                self._touches.mark(token, ready)
        return ready.response(self._expiry_field.encode(ready.expires_at_us))

    def _made(self, tokens: Iterable[str]) -> None:
        tokens = list(tokens)
        for token in tokens:
            self._cache.made(token)
        if self._elsewhere is not None:
            self._elsewhere.changed(tokens)

    def _drop(self, names: Iterable[str]) -> None:
        """Drop sessions by their tokens, or by what the storage calls them."""
        names = list(names)
        for name in names:
            self._cache.drop(name)
        if self._elsewhere is not None:
            self._elsewhere.changed(names)
