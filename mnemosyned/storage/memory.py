"""The memory engine: one node, for trying out and for tests; it forgets everything at exit.

It is also the example for a new engine: CONTRIBUTING.md walks through its parts. What makes it correct is
easy to overlook:

- Atomicity. No method but `set_values` has an `await` inside, so each batch is applied as a whole before the
  event loop runs another call. An engine on a network gets this from transactions or scripts instead.
  `set_values` reads a large bag in slices, and begins again if the session is another one by then.
- Time. Every item reads the clock itself, as a statement of PostgreSQL does. `wall_us` is this engine's
  clock, and the only one that `not_after_us` and expiries are compared with.
- Expired sessions stay in the dictionary until cleanup. `_live` hides them, and every method but `delete`,
  `clean_up` and `stored_keys_after` looks through it.
- Isolation. An item fails alone by having an exception for its result, and leaves the dictionary as it was.

Costs: `find`, `walk`, `delete`, `clean_up` and `stored_keys_after` go through all sessions. Memory has no
bound but that of expiry and cleanup.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from aio.slices import in_slices
from aio.units import NEVER_US
from cluster.node_row import Barred, NodeRow, Renewal, Renewed
from mnemosyned.errors import (
    CorruptSession,
    DeadlineExceeded,
    InvalidArgument,
    MnemosyneError,
    SessionAlreadyExists,
    SessionNotFound,
)
from mnemosyned.sessions import bag
from mnemosyned.sessions.model import (
    MAX_BAG_BYTES,
    MAX_PAGE_BYTES,
    Abandonment,
    ChangedBag,
    Criteria,
    DamagedSession,
    Lookup,
    NewSession,
    Session,
    Touch,
    ValueChange,
)
from mnemosyned.sessions.page_token import between
from mnemosyned.sessions.store import Deletion, KeyedPage, Page, Renaming, StoredSession


class MemoryStore:
    """A store in a dictionary; `wall_us` is its clock, microseconds since the epoch.

    It has every part of the port (FullStore), so that tokens can be hashed in it too.
    """

    def __init__(self, *, wall_us: Callable[[], int] = lambda: time.time_ns() // 1000) -> None:
        self._wall_us = wall_us
        self._session_by_token: dict[str, Session] = {}
        self._row_by_node: dict[str, NodeRow] = {}
        self._renewed_us: dict[str, int] = {}

    async def identity(self) -> bytes:
        """See Storage; no other process has this dictionary, so the object's own number will do."""
        return hashlib.blake2b(str(id(self)).encode(), digest_size=16).digest()

    async def open(self) -> None:
        """See Storage; there is nothing to open."""

    async def close(self) -> None:
        """Forget everything."""
        self._session_by_token.clear()

    async def now_us(self) -> int:
        """See Storage."""
        return self._wall_us()

    async def check(self) -> object:
        """See Storage; a dictionary is always there."""
        return None

    async def estimated_sessions(self) -> int:
        """See Storage; exact."""
        return len(self._session_by_token)

    async def start(self, sessions: Sequence[NewSession]) -> list[Session | MnemosyneError]:
        """See SessionStore; the second start of a token in a batch meets the first."""
        return [self._start(new) for new in sessions]

    async def load(self, lookups: Sequence[Lookup]) -> list[Session | MnemosyneError]:
        """See SessionStore."""
        return [self._load(lookup) for lookup in lookups]

    async def exist(self, tokens: Sequence[str]) -> list[bool | MnemosyneError]:
        """See SessionStore."""
        return [self._live(token) is not None for token in tokens]

    async def set_values(self, changes: Sequence[ValueChange]) -> list[ChangedBag | MnemosyneError]:
        """See SessionStore; one after the other, so no change can lose another."""
        results = [await self._set_value(change) for change in changes]
        changed = [result for result in results if isinstance(result, ChangedBag)]
        last = {one.session.access_token: one.session for one in changed if one.session is not None}
        for one in changed:
            one.session = None if one.session is None else last[one.session.access_token]
        return results

    async def abandon(self, endings: Sequence[Abandonment]) -> list[bool | MnemosyneError]:
        """See SessionStore."""
        return [self._abandon(ending) for ending in endings]

    async def touch(self, touches: Sequence[Touch]) -> list[bool | MnemosyneError]:
        """See SessionStore."""
        return [self._touch(touch.access_token, touch.expires_at_us) for touch in touches]

    async def find(
        self, criteria: Criteria, *, offset: int, limit: int, max_bytes: int = MAX_PAGE_BYTES
    ) -> Page:
        """See SessionStore."""
        now_us = self._wall_us()
        found = [session for session in self._matching(criteria) if session.expires_at_us > now_us]
        # By the bytes of the key, in the order of an index of bytes: pages of both engines are the same.
        found.sort(key=lambda session: (session.expires_at_us, session.access_token.encode()))
        wanted = found[offset : offset + limit]
        page = _fitting(wanted, max_bytes)
        return Page(sessions=page, is_cut=len(page) < len(wanted))

    async def walk(
        self, criteria: Criteria, *, start: bytes, limit: int, max_bytes: int = MAX_PAGE_BYTES
    ) -> KeyedPage:
        """See SessionStore."""
        now_us = self._wall_us()
        found = {
            session.access_token.encode(): session
            for session in self._matching(criteria)
            if session.expires_at_us > now_us
        }
        keys = sorted(key for key in found if key >= start)
        page = _fitting([found[key] for key in keys[:limit]], max_bytes)
        count = len(page)
        return KeyedPage(
            sessions=page,
            keys=keys[:count],
            next_key=between(keys[count - 1], keys[count]) if count < len(keys) else None,
            is_cut=count < min(limit, len(keys)),
        )

    async def delete(self, criteria: Criteria, *, limit: int, not_after_us: int = NEVER_US) -> Deletion:
        """See SessionStore. Expired sessions count, as they would be removed by cleanup anyway."""
        if self._wall_us() >= not_after_us:
            raise DeadlineExceeded
        # Exactly `limit` found: more may be left, so the caller runs another step.
        tokens = [session.access_token for session in self._matching(criteria)]
        return Deletion(stored_keys=self._forget(tokens[:limit]), is_all=len(tokens) < limit)

    async def clean_up(self, *, limit: int) -> list[str]:
        """See SessionStore."""
        now_us = self._wall_us()
        expired = [s.access_token for s in self._session_by_token.values() if s.expires_at_us <= now_us]
        return self._forget(expired[:limit])

    async def renew(self, renewal: Renewal) -> Renewed:
        """See LeaseStore."""
        name, instance, number, ring, seen, replaces = renewal
        row = self._row_by_node.get(name)
        if row is None:
            row = NodeRow(name, instance, number, ring, seen + 1, seen + 1, seen)
        elif (row.instance == instance and row.number < number) or row.version == replaces:
            epoch = row.epoch if row.epoch >= seen else seen + 1
            row = NodeRow(name, instance, number, ring, epoch, row.base, seen)
        if row.version == (instance, number):
            self._row_by_node[name], self._renewed_us[name] = row, self._wall_us()
        now_us = self._wall_us()
        rows = tuple(
            row._replace(age_us=now_us - self._renewed_us[name]) for name, row in self._row_by_node.items()
        )
        return Renewed(rows, str(id(self)), now_us)

    async def bar(self, name: str) -> Barred | None:
        """See LeaseStore."""
        row = self._row_by_node.get(name)
        if row is None:
            return None
        self._row_by_node[name] = row._replace(epoch=row.epoch + 1)
        return Barred(row.epoch + 1, row.instance, row.number, str(id(self)))

    async def resign(self, row: tuple[str, int, int | None]) -> None:
        """See LeaseStore."""
        name, instance, number = row
        found = self._row_by_node.get(name)
        if found is not None and found.instance == instance and number in (None, found.number):
            del self._row_by_node[name]

    async def rename(self, renamings: Sequence[Renaming]) -> list[bool | MnemosyneError]:
        """See RenamableStore."""
        return [self._rename(renaming.old, renaming.new) for renaming in renamings]

    async def stored_keys_after(self, stored_key: str, *, limit: int) -> list[str]:
        """See RenamableStore."""
        greater = [token for token in self._session_by_token if token.encode() > stored_key.encode()]
        return sorted(greater, key=str.encode)[:limit]

    async def stored_from(self, stored_key: str, *, limit: int) -> list[StoredSession]:
        """See CheckableStore; a session is replaced at every change, so it is its own version."""
        least = stored_key.encode()
        keys = sorted((key for key in self._session_by_token if key.encode() >= least), key=str.encode)
        sessions = {key: self._session_by_token[key] for key in keys[:limit]}
        return [
            StoredSession(stored_key=key, found=_readable(session), version=session)
            for key, session in sessions.items()
        ]

    async def remove_unchanged(self, sessions: Sequence[StoredSession]) -> list[str]:
        """See CheckableStore."""
        unchanged = (one for one in sessions if self._session_by_token.get(one.stored_key) is one.version)
        return self._forget([one.stored_key for one in unchanged])

    def _rename(self, old: str, new: str) -> bool:
        # Of two live sessions of one token, the one under the new key stays. An expired one gives way.
        session = self._live(old)
        if session is not None:
            del self._session_by_token[old]
            if self._live(new) is None:
                self._session_by_token[new] = replace(session, access_token=new)
        return self._live(new) is not None

    def _live(self, token: str) -> Session | None:
        session = self._session_by_token.get(token)
        return session if session is not None and session.expires_at_us > self._wall_us() else None

    def _start(self, new: NewSession) -> Session | MnemosyneError:
        # Late before duplicate: a late start must not be reported as done by another.
        if self._wall_us() >= new.not_after_us:
            return DeadlineExceeded()
        if self._live(new.access_token) is not None:
            return SessionAlreadyExists()
        session = new.stored(self._wall_us() + new.ttl_us)
        self._session_by_token[new.access_token] = session
        return session

    def _load(self, lookup: Lookup) -> Session | MnemosyneError:
        session = self._live(lookup.access_token)
        if session is None:
            return SessionNotFound()
        expires_at_us = self._wall_us() + lookup.ttl_us
        # The touch interval means nothing for a dictionary. It is kept so that both engines show the same.
        if session.expires_at_us >= expires_at_us - lookup.touch_interval_us:
            return session
        self._touch(lookup.access_token, expires_at_us)
        return self._session_by_token[lookup.access_token]

    async def _set_value(self, change: ValueChange) -> ChangedBag | MnemosyneError:
        while True:
            if self._wall_us() >= change.not_after_us:
                return DeadlineExceeded()
            session = self._live(change.access_token)
            if session is None:
                return SessionNotFound()
            setting = bag.setting_value(
                session.bag,
                change.key,
                change.value,
                max_entries=change.max_entries,
                max_key_bytes=change.max_key_bytes,
            )
            try:
                values, stored = await in_slices(setting, is_urgent=True)
            except (InvalidArgument, CorruptSession) as exc:
                return exc
            # It may have been extended, changed or ended between two slices.
            if self._session_by_token.get(change.access_token) is session:
                changed = replace(session, bag=stored)
                self._session_by_token[change.access_token] = changed
                return ChangedBag(values, changed)

    def _abandon(self, ending: Abandonment) -> bool | MnemosyneError:
        if self._wall_us() >= ending.not_after_us:
            return DeadlineExceeded()
        if self._live(ending.access_token) is None:
            return False
        del self._session_by_token[ending.access_token]
        return True

    def _touch(self, token: str, expires_at_us: int) -> bool:
        session = self._live(token)
        if session is None:
            return False
        # Never back: touches of several copies arrive in any order.
        latest_us = max(session.expires_at_us, expires_at_us)
        self._session_by_token[token] = replace(session, expires_at_us=latest_us)
        return True

    def _matching(self, criteria: Criteria) -> Iterator[Session]:
        return (session for session in self._session_by_token.values() if criteria.meets(session))

    def _forget(self, tokens: list[str]) -> list[str]:
        for token in tokens:
            del self._session_by_token[token]
        return tokens


def _fitting(sessions: Sequence[Session], max_bytes: int) -> list[Session | DamagedSession]:
    """Return the first sessions that fit into so many bytes, at least one."""
    page: list[Session | DamagedSession] = []
    size_bytes = 0
    for session in sessions:
        size_bytes += len(session.bag) if len(session.bag) <= MAX_BAG_BYTES else 0
        if page and size_bytes > max_bytes:
            break
        page.append(_readable(session))
    return page


def _readable(session: Session) -> Session | DamagedSession:
    if len(session.bag) <= MAX_BAG_BYTES:
        return session
    reason = f"a bag is longer than {MAX_BAG_BYTES} bytes"
    return DamagedSession(access_token=session.access_token, reason=reason)
