"""The Redis engine: each method of the storage port is one script for a whole batch.

`scripts.py` has the scripts, and `scripts/prelude.lua` the keys; `pool.py` connections, errors and what an
acknowledged write means; `records.py` how a session is stored. This module turns items into arguments, and
replies into one result per item.

A script is atomic and looks at the clock of the server once, so a batch happens at one instant. Its items are
done in order, and each sees what those before it did. Large walks are several scripts, so that none blocks
the server for long.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from aio.units import NEVER_US
from mnemosyned.errors import (
    DeadlineExceeded,
    MnemosyneError,
    SessionAlreadyExists,
    SessionNotFound,
    StorageUnavailable,
)
from mnemosyned.sessions.model import (
    MAX_BAG_BYTES,
    MAX_PAGE_BYTES,
    Abandonment,
    Criteria,
    DamagedSession,
    Lookup,
    NewSession,
    Session,
    Touch,
    ValueChange,
)
from mnemosyned.sessions.page_token import between
from mnemosyned.sessions.store import Deletion, KeyedPage, Page, Renaming, StorageRefused, StoredSession
from mnemosyned.storage.redis import pool as pools
from mnemosyned.storage.redis import scripts, server_check, trial
from mnemosyned.storage.redis.node_rows import NodeRows
from mnemosyned.storage.redis.records import (
    escaped,
    new_body,
    pairs_of,
    session_of,
    state_of,
    text,
)
from mnemosyned.storage.redis.value_writer import ValueWriter

if TYPE_CHECKING:
    from mnemosyned.storage.redis.link import Link
    from mnemosyned.storage.redis.pool import RedisPool

log = logging.getLogger(__name__)

# Sessions that one script ends: two or three milliseconds in which the server does nothing else.
_STEP: Final = 250
# Sessions that one page of a walk looks at, also if it wants none of them.
_MOST_LOOKED: Final = 2500
# The largest whole number that a script can compare with others; the year 2255.
_MAX_EXPIRY_US: Final = 2**53 - 1


class RedisStore:
    """Every part of the storage port (FullStore), on one server of Redis, or the primary of several.

    It keeps no state but the pool, so any number of stores, on any number of nodes, may use one server.
    """

    def __init__(self, pool: RedisPool, *, timeout_s: float) -> None:
        self._pool = pool
        self._timeout_s = timeout_s
        self._values = ValueWriter(pool, timeout_s=timeout_s)
        self._identity = secrets.token_bytes(16)
        self._warned: tuple[str, ...] = ()
        rows = NodeRows(pool)
        self.renew, self.bar, self.resign = rows.renew, rows.bar, rows.resign

    async def open(self) -> None:
        """See Storage; loads the scripts, and tries them on keys of their own."""
        await self._pool.open(self._look_at_server)
        try:
            await self.check()
            await trial.run(self._pool, lambda pool: RedisStore(pool, timeout_s=self._timeout_s))
        except StorageUnavailable as exc:
            refusal = self._pool.refused(exc)
            await self._pool.close()
            raise refusal or exc from exc.__cause__

    async def close(self) -> None:
        """See Storage. Writes under way have an unknown outcome: the server may still do them."""
        await self._pool.close()

    async def now_us(self) -> int:
        """See Storage."""
        return int((await self._state())[2])

    async def check(self) -> object:
        """See Storage: whether the server takes writes, and as many replicas as must confirm them."""
        await self._pool.follow_primary()
        identity, state, *_ = await self._state()
        self._identity = identity
        return identity, state

    async def identity(self) -> bytes:
        """See Storage. If the server has lost it, the nodes that know it put it back."""
        identity: bytes = (await self._state())[0]
        return identity

    async def estimated_sessions(self) -> int:
        """See Storage; exact."""
        return int((await self._state())[3])

    async def start(self, sessions: Sequence[NewSession]) -> list[Session | MnemosyneError]:
        """See SessionStore."""
        versions = secrets.token_bytes(8 * len(sessions))
        arguments: list[str | bytes | int] = []
        for at, new in enumerate(sessions):
            version = versions[8 * at : 8 * at + 8]
            arguments += (new.access_token, new.ttl_us, new.not_after_us, new_body(new, version))
        expiries = await self._pool.run(scripts.START, *arguments, is_write=True)
        return [_started(new, expiry) for new, expiry in zip(sessions, expiries, strict=True)]

    async def load(self, lookups: Sequence[Lookup]) -> list[Session | MnemosyneError]:
        """See SessionStore; one script for all lookups with the same times, which today are all of them."""
        places_by_times: dict[tuple[int, int], list[int]] = {}
        for at, lookup in enumerate(lookups):
            places_by_times.setdefault((lookup.ttl_us, lookup.touch_interval_us), []).append(at)
        loaded: dict[int, Session | MnemosyneError] = {}
        for (ttl_us, touch_interval_us), places in places_by_times.items():
            tokens = [lookups[at].access_token for at in places]
            replies = await self._pool.run(
                scripts.LOAD, ttl_us, ttl_us - touch_interval_us, MAX_BAG_BYTES, *tokens
            )
            for at, token, record in zip(places, tokens, replies, strict=True):
                loaded[at] = _loaded(token, record)
        return [loaded[at] for at in range(len(lookups))]

    async def exist(self, tokens: Sequence[str]) -> list[bool | MnemosyneError]:
        """See SessionStore."""
        return [bool(flag) for flag in await self._pool.run(scripts.EXIST, *tokens)]

    async def set_values(self, changes: Sequence[ValueChange]) -> list[dict[str, str] | MnemosyneError]:
        """See SessionStore; two scripts, and more if others change the same sessions."""
        return await self._values.apply(changes)

    async def abandon(self, endings: Sequence[Abandonment]) -> list[bool | MnemosyneError]:
        """See SessionStore."""
        arguments = [part for ending in endings for part in (ending.access_token, ending.not_after_us)]
        flags = await self._pool.run(scripts.ABANDON, *arguments, is_write=True)
        return [DeadlineExceeded() if flag < 0 else bool(flag) for flag in flags]

    async def touch(self, touches: Sequence[Touch]) -> list[bool | MnemosyneError]:
        """See SessionStore."""
        arguments = [
            part
            for touch in touches
            for part in (touch.access_token, min(touch.expires_at_us, _MAX_EXPIRY_US))
        ]
        return [bool(flag) for flag in await self._pool.run(scripts.TOUCH, *arguments, is_write=True)]

    async def find(
        self, criteria: Criteria, *, offset: int, limit: int, max_bytes: int = MAX_PAGE_BYTES
    ) -> Page:
        """See SessionStore; the server sends no more than the page."""
        # The first bag must not be withheld.
        is_cut, *replies = await self._pool.run(
            scripts.FIND, *_texts(criteria), offset, limit, max(max_bytes, MAX_BAG_BYTES), MAX_BAG_BYTES
        )
        found = [session_of(escaped(name), record) for name, record in pairs_of(replies)]
        return _cut(found, max_bytes, is_cut=bool(is_cut))

    async def walk(
        self, criteria: Criteria, *, start: bytes, limit: int, max_bytes: int = MAX_PAGE_BYTES
    ) -> KeyedPage:
        """See SessionStore. The names of a subject or refresh token are sorted here, if they are few.

        Lua would compare them as the locale of the server does.
        """
        names = await self._few(criteria)
        if names is not None:
            names = sorted(name for name in names if name >= start)
        is_cut, following, before, *replies = await self._pool.run(
            scripts.LIST,
            *_texts(criteria),
            limit,
            max(max_bytes, MAX_BAG_BYTES),
            MAX_BAG_BYTES,
            _MOST_LOOKED,
            b"[" + start if names is None else b"",
            *(names or ()),
        )
        keys = [name for name, _ in pairs_of(replies)]
        found = [session_of(escaped(name), record) for name, record in pairs_of(replies)]
        page = _cut(found, max_bytes, is_cut=bool(is_cut))
        count = len(page.sessions)
        if count < len(keys):
            before, following = keys[count - 1 : count + 1]
        return KeyedPage(
            sessions=page.sessions,
            keys=keys[:count],
            next_key=between(before, following) if following else None,
            is_cut=page.is_cut,
        )

    async def _few(self, criteria: Criteria) -> list[bytes] | None:
        """Return the only names that can meet the criteria, if they are few; None: they may be many."""
        if criteria.access_token is not None:
            return [_bytes(criteria.access_token)]
        if criteria.subject_id is None and criteria.refresh_token is None:
            return None
        names: list[bytes] | None = await self._pool.run(scripts.NAMES, *_texts(criteria), _MOST_LOOKED)
        return names

    async def delete(self, criteria: Criteria, *, limit: int, not_after_us: int = NEVER_US) -> Deletion:
        """See SessionStore, in steps of which each is atomic."""
        keys: list[str] = []
        passed_over = 0
        while len(keys) < limit:
            is_late, *reply = await self._pool.run(
                scripts.DELETE,
                *_texts(criteria),
                passed_over,
                min(limit - len(keys), _STEP),
                not_after_us,
                is_write=True,
            )
            if is_late and not keys:
                raise DeadlineExceeded
            if is_late:
                break
            is_all, passed_over, *names = reply
            keys += map(text, names)
            if is_all:
                return Deletion(stored_keys=keys, is_all=len(keys) < limit)
        return Deletion(stored_keys=keys, is_all=False)

    async def clean_up(self, *, limit: int) -> list[str]:
        """See SessionStore. A script is atomic, so no two nodes remove the same sessions."""
        keys: list[str] = []
        while len(keys) < limit:
            looked = min(limit - len(keys), _STEP)
            count, *names = await self._pool.run(scripts.CLEAN_UP, looked)
            keys += map(text, names)
            if count < looked:
                break
        return keys

    async def rename(self, renamings: Sequence[Renaming]) -> list[bool | MnemosyneError]:
        """See RenamableStore; nothing is ever held, so nothing is passed over."""
        arguments = [part for one in renamings for part in (_bytes(one.old), _bytes(one.new))]
        return [bool(flag) for flag in await self._pool.run(scripts.RENAME, *arguments, is_write=True)]

    async def stored_keys_after(self, stored_key: str, *, limit: int) -> list[str]:
        """See RenamableStore."""
        names = await self._pool.run(scripts.WALK, b"(" + _bytes(stored_key), limit, "", "")
        return [escaped(name) for name in names]

    async def stored_from(self, stored_key: str, *, limit: int) -> list[StoredSession]:
        """See CheckableStore."""
        replies = await self._pool.run(
            scripts.WALK, b"[" + _bytes(stored_key), limit, MAX_PAGE_BYTES, MAX_BAG_BYTES
        )
        return [
            StoredSession(
                stored_key=escaped(name), found=session_of(escaped(name), record), version=state_of(record)
            )
            for name, record in pairs_of(replies)
        ]

    async def remove_unchanged(self, sessions: Sequence[StoredSession]) -> list[str]:
        """See CheckableStore."""
        arguments: list[str | bytes | int] = []
        for session in sessions:
            assert isinstance(session.version, bytes)
            arguments += (_bytes(session.stored_key), session.version)
        names = await self._pool.run(scripts.REMOVE_UNCHANGED, *arguments, is_write=True)
        return [escaped(name) for name in names]

    async def _state(self) -> Any:  # noqa: ANN401  # as the script returns it
        """Return the identity, what changes with the sessions, the clock, and the number of sessions."""
        return await self._pool.run(scripts.CHECK, self._identity, secrets.token_hex(8), is_write=True)

    async def _look_at_server(self, link: Link) -> None:
        """Judge the server, and load the scripts. Raises StorageRefused, StorageUnavailable."""
        info, *told = await link.call(
            [("INFO",), ("CONFIG", "GET", "appendfsync"), ("CONFIG", "GET", "save")]
        )
        if isinstance(info, Exception):
            raise info
        settings = {one[0].decode(): one[1].decode() for one in told if isinstance(one, list) and one}
        verdict = server_check.judge(server_check.fields_of(info), settings)
        if verdict.refusal:
            raise StorageRefused(f"Redis at {link.target}: {verdict.refusal}")
        if verdict.unavailable:
            error = StorageUnavailable("mnemosyned: storage: unavailable")
            error.detail = verdict.unavailable
            raise error
        for warning in verdict.warnings if verdict.warnings != self._warned else ():
            log.warning("redis_may_lose_sessions", extra={"server": link.target, "reason": warning})
        self._warned = verdict.warnings
        await pools.load(link)


def _bytes(key: str) -> bytes:
    return key.encode(errors="surrogateescape")


def _texts(criteria: Criteria) -> list[str | bytes | int]:
    """Return the criteria as `scripts/criteria.lua` takes them."""
    texts: list[str | bytes | int] = []
    for value in (criteria.access_token, criteria.subject_id, criteria.refresh_token):
        texts += ("", "") if value is None else ("1", _bytes(value))
    for instant_us in (criteria.expires_after_us, criteria.expires_before_us):
        texts.append("" if instant_us is None else instant_us)
    return texts


def _started(new: NewSession, expiry_us: int) -> Session | MnemosyneError:
    if expiry_us < 0:
        return DeadlineExceeded() if expiry_us == -1 else SessionAlreadyExists()
    return new.stored(expiry_us)


def _loaded(token: str, record: Any) -> Session | MnemosyneError:  # noqa: ANN401  # as the reply has it
    if record is None:
        return SessionNotFound()
    found = session_of(token, record)
    return found if isinstance(found, Session) else found.error()


def _cut(found: list[Session | DamagedSession], max_bytes: int, *, is_cut: bool) -> Page:
    size_bytes = 0
    for count, session in enumerate(found):
        size_bytes += len(session.bag) if isinstance(session, Session) else 0
        if count and size_bytes > max_bytes:
            return Page(sessions=found[:count], is_cut=True)
    return Page(sessions=found, is_cut=is_cut)
