"""The calls of the port that are for named sessions: arguments for a script, and one result of each reply.

A batch is one script on one server. On a cluster it is one script for each bucket (`cluster/pool.py`): where
one fails, its items alone have that failure for their result.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, TypeVar

from mnemosyned.errors import (
    DeadlineExceeded,
    MnemosyneError,
    SessionAlreadyExists,
    SessionNotFound,
)
from mnemosyned.sessions.model import (
    MAX_BAG_BYTES,
    Abandonment,
    Lookup,
    NewSession,
    Session,
    Touch,
)
from mnemosyned.sessions.store import StoredSession
from mnemosyned.storage.redis import scripts
from mnemosyned.storage.redis.records import new_body, session_of, stored_name, without_expiry
from mnemosyned.storage.redis.scripts import Script
from mnemosyned.storage.redis.value_writer import ValueWriter

Result = TypeVar("Result")

# The largest whole number that a script can compare with others; the year 2255.
_MAX_EXPIRY_US: Final = 2**53 - 1


class ItemPool(Protocol):
    """Runs scripts for named sessions: RedisPool, and ClusterPool."""

    async def each(
        self,
        script: Script,
        head: Sequence[str | bytes | int],
        items: Sequence[tuple[str | bytes | int, ...]],
        *,
        is_write: bool = False,
    ) -> list[Any]:
        """See RedisPool."""
        ...


class Items:
    """The batches of the port (SessionStore, CheckableStore)."""

    def __init__(self, pool: ItemPool, *, timeout_s: float) -> None:
        self._pool = pool
        values = ValueWriter(pool, timeout_s=timeout_s)
        self.set_values, self._remembered = values.apply, values.records

    async def start(self, sessions: Sequence[NewSession]) -> list[Session | MnemosyneError]:
        """See SessionStore."""
        versions = secrets.token_bytes(8 * len(sessions))
        items = [
            (new.access_token, new.ttl_us, new.not_after_us, new_body(new, versions[8 * at : 8 * at + 8]))
            for at, new in enumerate(sessions)
        ]
        expiries = await self._pool.each(scripts.START, (), items, is_write=True)
        started = [_started(new, expiry) for new, expiry in zip(sessions, expiries, strict=True)]
        for result, (token, *_, body) in zip(started, items, strict=True):
            if isinstance(result, Session):
                self._remembered.add(token.encode(), without_expiry(body))
        return started

    async def load(self, lookups: Sequence[Lookup]) -> list[Session | MnemosyneError]:
        """See SessionStore; one script for all lookups with the same times, which today are all of them."""
        places_by_times: dict[tuple[int, int], list[int]] = {}
        for at, lookup in enumerate(lookups):
            places_by_times.setdefault((lookup.ttl_us, lookup.touch_interval_us), []).append(at)
        loaded: dict[int, Session | MnemosyneError] = {}
        for (ttl_us, touch_interval_us), places in places_by_times.items():
            names = [(lookups[at].access_token,) for at in places]
            head = (ttl_us, ttl_us - touch_interval_us, MAX_BAG_BYTES)
            replies = await self._pool.each(scripts.LOAD, head, names)
            for at, (token,), record in zip(places, names, replies, strict=True):
                loaded[at] = found = _loaded(token, record)
                if isinstance(found, Session):
                    self._remembered.add(token.encode(), record)
        return [loaded[at] for at in range(len(lookups))]

    async def exist(self, tokens: Sequence[str]) -> list[bool | MnemosyneError]:
        """See SessionStore."""
        return _each(await self._pool.each(scripts.EXIST, (), [(token,) for token in tokens]), bool)

    async def abandon(self, endings: Sequence[Abandonment]) -> list[bool | MnemosyneError]:
        """See SessionStore."""
        items = [(ending.access_token, ending.not_after_us) for ending in endings]
        flags = await self._pool.each(scripts.ABANDON, (), items, is_write=True)
        return _each(flags, lambda flag: DeadlineExceeded() if flag < 0 else bool(flag))

    async def touch(self, touches: Sequence[Touch]) -> list[bool | MnemosyneError]:
        """See SessionStore."""
        items = [(touch.access_token, min(touch.expires_at_us, _MAX_EXPIRY_US)) for touch in touches]
        return _each(await self._pool.each(scripts.TOUCH, (), items, is_write=True), bool)

    async def remove_unchanged(self, sessions: Sequence[StoredSession]) -> list[str]:
        """See CheckableStore."""
        items: list[tuple[str | bytes | int, ...]] = []
        for session in sessions:
            assert isinstance(session.version, bytes)
            items.append((stored_name(session.stored_key), session.version))
        flags = await self._pool.each(scripts.REMOVE_UNCHANGED, (), items, is_write=True)
        for flag in flags:
            if isinstance(flag, MnemosyneError):
                raise flag
        return [session.stored_key for session, flag in zip(sessions, flags, strict=True) if flag]


def _each(replies: Sequence[Any], result: Callable[[Any], Result]) -> list[Result | MnemosyneError]:
    return [reply if isinstance(reply, MnemosyneError) else result(reply) for reply in replies]


def _started(new: NewSession, expiry: Any) -> Session | MnemosyneError:  # noqa: ANN401  # as the reply has it
    if isinstance(expiry, MnemosyneError):
        return expiry
    if expiry < 0:
        return DeadlineExceeded() if expiry == -1 else SessionAlreadyExists()
    return new.stored(expiry)


def _loaded(token: str, record: Any) -> Session | MnemosyneError:  # noqa: ANN401  # as the reply has it
    if record is None:
        return SessionNotFound()
    if isinstance(record, MnemosyneError):
        return record
    found = session_of(token, record)
    return found if isinstance(found, Session) else found.error()
