"""The use cases: what each RPC means, on values, without gRPC. That of List is in `pages.py`.

A Get that the cache can answer returns its response at once. One that must be loaded, and what
writes one session, return a Later, which needs no task. Everything else that must wait is a coroutine.

A call that must pass the cache says so: `get_uncached`, `exists_uncached`, `start_uncached`,
`set_value_uncached`. They serve tokens that another node owns, whose copies only that node may keep.

Rules for editing:
- A session enters the cache only through a fill that was opened before the session was read.
- A session from the storage is answered, and cached, only after `damage.py` has checked it.
- Whatever changes or ends a session goes through `coherence.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeAlias

from aio.deadline import NO_DEADLINE, Deadline
from aio.expiry import Expiry
from aio.later import Later, Outcome
from aio.slices import in_slices
from aio.units import NEVER_US
from cache.lru import Slot
from cache.read_through import Fill, ReadThrough
from mnemosyned.errors import (
    CorruptSession,
    DeadlineExceeded,
    InvalidArgument,
    MnemosyneError,
    SessionAlreadyExists,
    SessionNotFound,
)
from mnemosyned.sessions import bag
from mnemosyned.sessions.bag import BagLimits
from mnemosyned.sessions.batched import BatchedStore, settled
from mnemosyned.sessions.changed_copies import Change, ChangedCopies
from mnemosyned.sessions.clock import StorageClock
from mnemosyned.sessions.coherence import Coherence, Written
from mnemosyned.sessions.counts import SessionCounts
from mnemosyned.sessions.damage_log import DamageLog
from mnemosyned.sessions.encoded import EncodedResponse, EncodedSession, ExpiryField
from mnemosyned.sessions.lifetime import Lifetime
from mnemosyned.sessions.listing import Listing
from mnemosyned.sessions.model import (
    Abandonment,
    ChangedBag,
    Criteria,
    Lookup,
    NewSession,
    Session,
    ValueChange,
    check_criteria,
    check_new,
)
from mnemosyned.sessions.pages import Pages
from mnemosyned.sessions.store import SessionStore
from mnemosyned.sessions.token import check_token
from mnemosyned.sessions.token_hash import is_hashed
from mnemosyned.sessions.touches import TouchWriter

# Sessions ended by one step of a Delete: it holds few locks, and for a short time.
_DELETE_BATCH: Final = 5000
# Python objects around the token: its slot, and its place in the dictionary.
NEGATIVE_BYTES: Final = 350

# What the cache keeps for a token: its session, or that there is none.
Loaded: TypeAlias = Slot[EncodedSession] | Slot[None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceRules:
    """What the operator has set for all sessions."""

    lifetime: Lifetime
    bag_limits: BagLimits


class SessionService:
    """Sessions, cached in front of a store."""

    def __init__(
        self,
        store: SessionStore,
        cache: ReadThrough[EncodedSession],
        touches: TouchWriter,
        *,
        coherence: Coherence,
        clock: StorageClock,
        rules: ServiceRules,
        damage_log: DamageLog,
    ) -> None:
        self.counts = SessionCounts()
        self.bag_limits = rules.bag_limits
        self._damage_log = damage_log
        self._checking = partial(damage_log.checking, limits=rules.bag_limits.of_stored())
        self.lifetime = rules.lifetime
        self._store = store
        self._cache = cache
        self._touches = touches
        listing = Listing(store, touches, touch_interval_us=rules.lifetime.touch_interval_us)
        self.pages = Pages(listing, self._checking)
        self._coherence = coherence
        self._clock = clock
        self._batched: BatchedStore[Loaded] = BatchedStore(
            store,
            load=self._load_slots,
            coherence=coherence,
            changed_copies=ChangedCopies(cache, coherence, clock=clock, make_slot=self._slot),
        )
        self._expiry_field = ExpiryField()
        self._late = Expiry(_be_late)

    def not_after_us(self, deadline: Deadline) -> int:
        """Return the last instant on the storage's clock at which a write of the call may be done.

        Raises:
            DeadlineExceeded: it has passed.
        """
        limit_us = self._clock.limit_us(deadline)
        if limit_us != NEVER_US and limit_us <= self._clock.now_us():
            raise DeadlineExceeded
        return limit_us

    def bound(self, response: Later[EncodedResponse], deadline: Deadline) -> None:
        """Have a response fail with DeadlineExceeded when its caller waits no more, perhaps at once."""
        left_s = deadline.left_s()
        if left_s is not None and left_s > 0:
            self._late.add(response, left_s)
        elif left_s is not None:
            _be_late(response)

    async def close(self) -> None:
        """Cancel the calls that still wait for the storage."""
        await self._coherence.close()
        await self._batched.close()
        self._late.close()

    def get(self, token: str) -> EncodedResponse | Later[EncodedResponse]:
        """Extend a session and return it as a response message.

        Raises:
            InvalidArgument: the token is no token.
            SessionNotFound: at once, or later.
        """
        now_us = self._clock.now_us()
        encoded = self._cache.peek(token, now_us=now_us)
        if encoded is not None:
            return self._extended(token, encoded, now_us)
        if self._cache.is_negative(token, now_us=now_us):
            raise SessionNotFound
        return self._load(check_token(token), now_us)

    def get_uncached(self, token: str) -> Later[EncodedResponse]:
        """Do what `get` does from the storage, past both caches.

        Raises:
            InvalidArgument: the token is no token.
            SessionNotFound: later: there is no live session.
        """
        # In a batch that begins after this call: a load that others share may have begun before another
        # node's write was acknowledged.
        loaded = self._batched.load(check_token(token))
        return loaded.through(partial(self._answer, token, self._clock.now_us()))

    def exists_cached(self, token: str) -> bool | None:
        """Tell whether there is a live session, if a cache knows; None: `exists` must be asked.

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

    async def exists_uncached(self, token: str) -> bool:
        """Do what `exists` does, past the negative cache.

        Raises:
            InvalidArgument: the token is no token.
        """
        return await self._batched.exists(check_token(token))

    def start(self, new: NewSession) -> Later[EncodedResponse]:
        """Store a session and return it as a response message.

        Raises:
            InvalidArgument: a field cannot be stored.
            SessionAlreadyExists: later: the token is in use.
        """
        _check_startable(new)
        asked_us, started = self._clock.now_us(), self._batched.start(new)
        # The batch begins after this step.
        fill = self._cache.begin_fill(new.access_token, is_making=True)
        return started.through(partial(self._started, fill, asked_us)).through(settled)

    def start_uncached(self, new: NewSession) -> Later[EncodedResponse]:
        """Do what `start` does, and leave the copy to the owner. Raises what `start` does."""
        _check_startable(new)
        started = self._batched.start(new)
        return started.through(partial(self._started, None, self._clock.now_us())).through(settled)

    def _started(
        self, fill: Fill[EncodedSession] | None, asked_us: int, outcome: Outcome[Written[Session]]
    ) -> Written[EncodedResponse]:
        """Keep the copy of a new session, also before the Start is settled: it is true from its commit on."""
        with fill or nullcontext():
            if not isinstance(outcome, Written):
                assert isinstance(outcome, BaseException)
                raise outcome
            if isinstance(outcome.result, MnemosyneError):
                return Written(outcome.result, outcome.settling)
            self.counts.started += 1
            slot = self._slot(outcome.result, asked_us)
            if fill is not None:
                fill.put(slot)
        return Written(self._response(slot.value), outcome.settling)

    async def retry_start(self, new: NewSession) -> EncodedResponse:
        """Store a session past the cache, unless an earlier try of the same call has stored it.

        Raises:
            InvalidArgument: a field cannot be stored.
            SessionAlreadyExists: another session has the token.
        """
        try:
            return await self.start_uncached(new)
        except SessionAlreadyExists:
            (found,) = await self._store.load([self._lookup(new.access_token)])
            if isinstance(found, MnemosyneError) or not found.is_from(new):
                raise
        return self._response(EncodedSession(found))

    def set_value(
        self, token: str, key: str, value: str, deadline: Deadline = NO_DEADLINE
    ) -> Later[dict[str, str]]:
        """Set one key of a session's bag; return the whole bag. Does not extend the session.

        Raises:
            InvalidArgument: no key; or later, the bag would pass a limit.
            SessionNotFound: later: there is none.
        """
        # As of now: the call may wait for other changes, and this node lose the session meanwhile.
        generation = self._cache.generation if self.lifetime.cache_us else None
        return self._set_value(token, key, value, deadline, generation)

    def set_value_uncached(
        self, token: str, key: str, value: str, deadline: Deadline = NO_DEADLINE
    ) -> Later[dict[str, str]]:
        """Do what `set_value` does, and keep no copy. Raises what `set_value` does."""
        return self._set_value(token, key, value, deadline, None)

    def _set_value(
        self, token: str, key: str, value: str, deadline: Deadline, generation: int | None
    ) -> Later[dict[str, str]]:
        check_token(token)
        if not key:
            raise InvalidArgument("mnemosyned: missing bag key")
        self.bag_limits.check(key, value)
        change = ValueChange(
            access_token=token,
            key=key,
            value=value,
            not_after_us=self.not_after_us(deadline),
            max_entries=self.bag_limits.entries,
            max_key_bytes=self.bag_limits.key_bytes,
        )
        changed = self._batched.set_value(Change(change, generation))
        return changed.through(partial(self._changed, token)).through(settled)

    def _changed(self, token: str, outcome: Outcome[Written[ChangedBag]]) -> Written[dict[str, str]]:
        if not isinstance(outcome, Written):
            assert isinstance(outcome, BaseException)
            raise outcome
        if isinstance(outcome.result, ChangedBag):
            return Written(outcome.result.values, outcome.settling)
        if isinstance(outcome.result, CorruptSession):
            self._damage_log.add(token, outcome.result)
        return Written(outcome.result, outcome.settling)

    def abandon(self, token: str, deadline: Deadline = NO_DEADLINE) -> Later[None]:
        """End a session. Raises SessionNotFound later."""
        ending = Abandonment(access_token=check_token(token), not_after_us=self.not_after_us(deadline))
        return self._batched.abandon(ending).map(self._ended)

    def _ended(self, was_there: bool) -> None:  # noqa: FBT001  # the result of an Abandon
        if not was_there:
            raise SessionNotFound
        self.counts.ended_by_cause["abandoned"] += 1

    async def delete(
        self,
        criteria: Criteria,
        deadline: Callable[[], Deadline] = lambda: NO_DEADLINE,
        *,
        is_retry: bool = False,
    ) -> int:
        """End every session that meets all criteria; return how many.

        Each step asks for its own deadline; one that was late is tried again while there is time. `is_retry`
        tells that another try may have ended some.

        Raises:
            DeadlineExceeded: the time is up; earlier steps are done, and stay.
            InvalidArgument: no criterion.
        """
        check_criteria(criteria)
        if criteria.is_empty():
            raise InvalidArgument("mnemosyned: none of expected arguments was provided")
        self.not_after_us(deadline())
        if criteria.has_range():
            await self._touches.flush()
        deleted = 0
        while True:
            not_after_us = self.not_after_us(deadline())
            deleting = self._store.delete(criteria, limit=_DELETE_BATCH, not_after_us=not_after_us)
            try:
                step = await self._coherence.around_delete(
                    deleting, token=criteria.access_token, is_retry=is_retry
                )
            except DeadlineExceeded:
                continue
            deleted += len(step.stored_keys)
            self.counts.ended_by_cause["deleted"] += len(step.stored_keys)
            if step.is_all:
                return deleted

    async def clean_up(self, limit: int) -> int:
        """Remove at most `limit` expired sessions; return how many."""
        stored_keys = await self._store.clean_up(limit=limit)
        # A copy that is about to expire is not served (`lifetime.py`), so nothing depends on this: it frees
        # memory. Hashed keys are left out, since one by an unknown key would empty the whole cache.
        self._coherence.drop_copies(key for key in stored_keys if not is_hashed(key))
        self.counts.ended_by_cause["expired"] += len(stored_keys)
        return len(stored_keys)

    def _load(self, token: str, asked_us: int) -> Later[EncodedResponse]:
        if not self.lifetime.cache_us:
            return self.get_uncached(token)
        # From when it was asked: where the load has just moved the stored expiry, nothing is left to write.
        return self._cache.load(token, self._batched.load).through(partial(self._answer, token, asked_us))

    def _answer(self, token: str, asked_us: int, loaded: Outcome[Loaded]) -> EncodedResponse:
        """Return the response of a session that was loaded, as a step of a Later."""
        if not isinstance(loaded, Slot):
            assert isinstance(loaded, BaseException)
            raise loaded
        if loaded.value is None:
            raise SessionNotFound
        return self._extended(token, loaded.value, asked_us)

    async def _load_slots(self, tokens: Sequence[str]) -> Sequence[Loaded | MnemosyneError]:
        asked_us = self._clock.now_us()
        found = await self._store.load([self._lookup(token) for token in tokens])
        checked = await in_slices(self._checking(zip(tokens, found, strict=True)))
        return [self._loaded(token, one, asked_us) for token, one in zip(tokens, checked, strict=True)]

    def _lookup(self, token: str) -> Lookup:
        lifetime = self.lifetime
        return Lookup(
            access_token=token, ttl_us=lifetime.idle_us, touch_interval_us=lifetime.touch_interval_us
        )

    def _loaded(self, token: str, found: Session | MnemosyneError, asked_us: int) -> Loaded | MnemosyneError:
        if isinstance(found, SessionNotFound):
            return self._negative_slot(token, asked_us)
        # A failure is not cached: a damaged session can be mended in the table at any time.
        return self._slot(found, asked_us) if isinstance(found, Session) else found

    def _slot(self, session: Session, asked_us: int) -> Slot[EncodedSession]:
        encoded = EncodedSession(session)
        fresh_until_us = self.lifetime.copy_fresh_until_us(asked_us, session.expires_at_us)
        return Slot(encoded, encoded.size_bytes, fresh_until_us)

    def _negative_slot(self, token: str, asked_us: int) -> Slot[None]:
        fresh_until_us = self.lifetime.negative_fresh_until_us(asked_us)
        return Slot(None, len(token.encode()) + NEGATIVE_BYTES, fresh_until_us)

    def get_mirrored(self, token: str, encoded: EncodedSession) -> EncodedResponse:
        """Extend the session of a mirror, and return it as a response message."""
        return self._extended(token, encoded, self._clock.now_us())

    def _extended(self, token: str, encoded: EncodedSession, now_us: int) -> EncodedResponse:
        expires_at_us = self.lifetime.extended_us(now_us)
        if expires_at_us > encoded.expires_at_us:
            encoded.expires_at_us = expires_at_us
            if not encoded.is_dirty:
                self._touches.mark(token, encoded)
        return encoded.response(self._expiry_field.encode(encoded.expires_at_us))

    def _response(self, encoded: EncodedSession) -> EncodedResponse:
        return encoded.response(self._expiry_field.encode(encoded.expires_at_us))


def _be_late(response: Later[EncodedResponse]) -> None:
    response.give_up(DeadlineExceeded())


def _check_startable(new: NewSession) -> None:
    check_new(new)
    bag.check_size(new.bag)
