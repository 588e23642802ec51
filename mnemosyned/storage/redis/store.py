"""The Redis engine: each method of the storage port is one script for a whole batch.

`scripts.py` has the scripts, and `scripts/prelude.lua` the keys; `pool.py` connections, errors and what an
acknowledged write means; `records.py` how a session is stored. This module turns items into arguments, and
replies into one result per item.

A script is atomic and looks at the clock of the server once, so a batch happens at one instant. Its items are
done in order, and each sees what those before it did. Large walks are several scripts, so that none blocks
the server for long.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from aio.units import NEVER_US
from mnemosyned.errors import DeadlineExceeded, MnemosyneError, StorageUnavailable
from mnemosyned.sessions.model import (
    MAX_BAG_BYTES,
    MAX_PAGE_BYTES,
    Criteria,
    DamagedSession,
    Session,
)
from mnemosyned.sessions.page_token import between
from mnemosyned.sessions.store import Deletion, KeyedPage, Page, Renaming, StoredSession
from mnemosyned.storage.redis import scripts, trial
from mnemosyned.storage.redis import server as servers
from mnemosyned.storage.redis.criteria import texts_of
from mnemosyned.storage.redis.items import Items
from mnemosyned.storage.redis.node_rows import NodeRows
from mnemosyned.storage.redis.records import (
    escaped,
    pairs_of,
    session_of,
    state_of,
    stored_name,
    text,
)
from mnemosyned.storage.redis.server_watch import ServerWatch

if TYPE_CHECKING:
    from mnemosyned.storage.redis.link import Link
    from mnemosyned.storage.redis.pool import RedisPool

# Sessions that one script ends: two or three milliseconds in which the server does nothing else.
_STEP: Final = 250
# Sessions that one page of a walk looks at, also if it wants none of them.
_MOST_LOOKED: Final = 2500
# No server has as many sessions, and the numbers of Lua, which are doubles, do not become another one.
_MAX_OFFSET: Final = 2**53


class RedisStore:
    """Every part of the storage port (FullStore), on one server of Redis, or the primary of several.

    It keeps no state but the pool, so any number of stores, on any number of nodes, may use one server.
    """

    def __init__(self, pool: RedisPool, *, timeout_s: float) -> None:
        self._pool = pool
        self._timeout_s = timeout_s
        self._identity = secrets.token_bytes(16)
        self._watch = ServerWatch()
        items = Items(pool, timeout_s=timeout_s)
        self.start, self.load, self.exist = items.start, items.load, items.exist
        self.set_values, self.abandon, self.touch = items.set_values, items.abandon, items.touch
        self.remove_unchanged = items.remove_unchanged
        rows = NodeRows(pool)
        self.renew, self.bar, self.resign = rows.renew, rows.bar, rows.resign

    async def open(self) -> None:
        """See Storage; loads the scripts, and tries them on keys of their own."""
        await self._pool.open(self._prepare, self._watch.look)
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
        await self._pool.look()
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

    async def find(
        self, criteria: Criteria, *, offset: int, limit: int, max_bytes: int = MAX_PAGE_BYTES
    ) -> Page:
        """See SessionStore; the server sends no more than the page."""
        is_cut, *replies = await self._pool.run(
            scripts.FIND,
            *texts_of(criteria),
            min(offset, _MAX_OFFSET),
            limit,
            # The first bag must not be withheld.
            max(max_bytes, MAX_BAG_BYTES),
            MAX_BAG_BYTES,
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
            *texts_of(criteria),
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
            return [stored_name(criteria.access_token)]
        if criteria.subject_id is None and criteria.refresh_token is None:
            return None
        names: list[bytes] | None = await self._pool.run(scripts.NAMES, *texts_of(criteria), _MOST_LOOKED)
        return names

    async def delete(self, criteria: Criteria, *, limit: int, not_after_us: int = NEVER_US) -> Deletion:
        """See SessionStore, in steps of which each is atomic."""
        keys: list[str] = []
        passed_over = 0
        while len(keys) < limit:
            is_late, *reply = await self._pool.run(
                scripts.DELETE,
                *texts_of(criteria),
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
        arguments = [part for one in renamings for part in (stored_name(one.old), stored_name(one.new))]
        return [bool(flag) for flag in await self._pool.run(scripts.RENAME, *arguments, is_write=True)]

    async def stored_keys_after(self, stored_key: str, *, limit: int) -> list[str]:
        """See RenamableStore."""
        names = await self._pool.run(scripts.WALK, b"(" + stored_name(stored_key), limit, "", "")
        return [escaped(name) for name in names]

    async def stored_from(self, stored_key: str, *, limit: int) -> list[StoredSession]:
        """See CheckableStore."""
        replies = await self._pool.run(
            scripts.WALK, b"[" + stored_name(stored_key), limit, MAX_PAGE_BYTES, MAX_BAG_BYTES
        )
        return [
            StoredSession(
                stored_key=escaped(name), found=session_of(escaped(name), record), version=state_of(record)
            )
            for name, record in pairs_of(replies)
        ]

    async def _state(self) -> Any:  # noqa: ANN401  # as the script returns it
        """Return the identity, what changes with the sessions, the clock, and the number of sessions."""
        return await self._pool.run(scripts.CHECK, self._identity, secrets.token_hex(8), is_write=True)

    async def _prepare(self, link: Link) -> None:
        """Judge the server, and load the scripts. Raises StorageRefused, StorageUnavailable."""
        await self._watch.admit(link)
        await servers.load(link)


def _cut(found: list[Session | DamagedSession], max_bytes: int, *, is_cut: bool) -> Page:
    size_bytes = 0
    for count, session in enumerate(found):
        size_bytes += len(session.bag) if isinstance(session, Session) else 0
        if count and size_bytes > max_bytes:
            return Page(sessions=found[:count], is_cut=True)
    return Page(sessions=found, is_cut=is_cut)
