"""Going through sessions: the pages of List, the candidates of a Delete, and all stored keys.

    call                             filter                          sequence   index
    find                             criteria, live                  e, _id     by_expiry, or by what is given
    walk                             criteria, live, a range of _id  _id        _id, or by what is given
    candidates                       criteria                        none       by what is given
    expired                          e <= now                        e          by_expiry
    stored_keys_after, stored_from   a range of _id                  _id        _id

What is given are a subject (by_subject) or a refresh token (by_refresh_token); `find` then sorts in memory,
with as many sessions as the page and those before it.

Reads are linearizable, so none shows what an acknowledged call has ended (`store.py`). A page comes in
portions, and no more are asked for than it takes: the bags of one page are bounded, whatever is stored.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from bson import Int64

from mnemosyned.sessions.model import MAX_PAGE_BYTES, Criteria, DamagedSession, Session
from mnemosyned.sessions.page_token import between
from mnemosyned.sessions.store import KeyedPage, Page, StoredSession
from mnemosyned.storage.mongodb import documents
from mnemosyned.storage.mongodb.filters import EVERYTHING, both, matching

if TYPE_CHECKING:
    from mnemosyned.storage.mongodb.client import Database, Document
    from mnemosyned.storage.mongodb.pool import MongoPool
    from mnemosyned.storage.mongodb.schema import Names

# Sessions of one portion; the server ends it earlier at 16 MiB.
_PORTION: Final = 100
# Sessions that one page of a walk looks at, also if it wants none of them.
_MOST_LOOKED: Final = 2500
# How far the clock of a primary may be behind that of the one before it.
_SKEW_US: Final = 60_000_000

_BY_EXPIRY: Final = {"e": 1, "_id": 1}
_BY_KEY: Final = {"_id": 1}


@dataclass(slots=True)
class _Portion:
    """What a page has taken of what the server has found."""

    keys: list[str] = field(default_factory=list)
    sessions: list[Session | DamagedSession] = field(default_factory=list)
    versions: list[Document] = field(default_factory=list)
    following: str | None = None  # the key after it, if the page ends before the last that was found
    is_cut: bool = False  # for its size
    now_us: int = 0


class Walks:
    """The methods of the port that read many sessions."""

    def __init__(self, pool: MongoPool, names: Names) -> None:
        self._pool = pool
        self._names = names
        self._seen_us = 0  # the clock, as it was shown last

    async def find(
        self, criteria: Criteria, *, offset: int, limit: int, max_bytes: int = MAX_PAGE_BYTES
    ) -> Page:
        """See SessionStore."""
        wanted = both(matching(criteria), self._live())
        stages: list[Document] = [
            {"$match": wanted},
            {"$sort": _BY_EXPIRY},
            {"$skip": offset},
            {"$limit": limit},
        ]
        page = await self._page("find", stages, limit, max_bytes)
        return Page(sessions=page.sessions, is_cut=page.is_cut)

    async def walk(
        self, criteria: Criteria, *, start: bytes, limit: int, max_bytes: int = MAX_PAGE_BYTES
    ) -> KeyedPage:
        """See SessionStore. A walk over all keys looks at `_MOST_LOOKED` of them at most."""
        first = documents.least_text(start)
        has_index = any((criteria.access_token, criteria.subject_id, criteria.refresh_token))
        end = None if has_index else await self._key_after(first, _MOST_LOOKED)
        keys = {"_id": {"$gte": first} if end is None else {"$gte": first, "$lt": end}}
        stages: list[Document] = [
            {"$match": {"$and": [matching(criteria), self._live(), keys]}},
            {"$sort": _BY_KEY},
            {"$limit": limit + 1},
        ]
        page = await self._page("walk", stages, limit, max_bytes)
        following, found = page.following or end, [key.encode() for key in page.keys]
        next_key = None if following is None else between(found[-1] if found else start, following.encode())
        return KeyedPage(sessions=page.sessions, keys=found, next_key=next_key, is_cut=page.is_cut)

    async def candidates(self, criteria: Criteria, limit: int, *, is_begun: bool) -> tuple[list[str], int]:
        """Return the keys of some that meet the criteria, expired ones too; and the clock, if there are."""
        stages: list[Document] = [
            {"$match": matching(criteria)},
            {"$limit": limit},
            {"$project": {"_id": 1, "now": "$$NOW"}},
        ]
        found = await self._all("delete", stages, is_begun=is_begun)
        keys = [one["_id"] for one in found if documents.is_text(one["_id"])]
        return keys, max((documents.now_us(one) for one in found), default=0)

    async def expired(self, now_us: int, limit: int) -> list[str]:
        """Return the keys of some that have expired."""
        stages: list[Document] = [
            {"$match": {**EVERYTHING, "e": {"$lte": Int64(now_us)}}},
            {"$sort": _BY_EXPIRY},
            {"$limit": limit},
            {"$project": {"_id": 1}},
        ]
        return [one["_id"] for one in await self._all("clean_up", stages) if documents.is_text(one["_id"])]

    async def those_of(
        self, keys: Sequence[str], doing: str, *, is_begun: bool = False
    ) -> dict[str, Document]:
        """Return what SHOWN reads of these sessions, by key."""
        stages: list[Document] = [{"$match": {"_id": {"$in": list(dict.fromkeys(keys))}}}, documents.SHOWN]
        found = await self._all(doing, stages, is_begun=is_begun)
        return {one["_id"]: one for one in found}

    async def live_of(self, keys: Sequence[str], doing: str, *, is_begun: bool = False) -> dict[str, int]:
        """Return which of these sessions are live, with the clock."""
        wanted = both({"_id": {"$in": list(dict.fromkeys(keys))}}, documents.live())
        stages: list[Document] = [{"$match": wanted}, {"$project": {"_id": 1, "now": "$$NOW"}}]
        found = await self._all(doing, stages, is_begun=is_begun)
        return {one["_id"]: documents.now_us(one) for one in found}

    async def stored_keys_after(self, stored_key: str, *, limit: int) -> list[str]:
        """See RenamableStore."""
        wanted = {"_id": {"$gt": stored_key}}
        stages: list[Document] = [
            {"$match": wanted},
            {"$sort": _BY_KEY},
            {"$limit": limit},
            {"$project": {"_id": 1}},
        ]
        return [one["_id"] for one in await self._all("walk", stages) if documents.is_text(one["_id"])]

    async def stored_from(self, stored_key: str, *, limit: int) -> list[StoredSession]:
        """See CheckableStore."""
        wanted = {"_id": {"$gte": stored_key}}
        stages: list[Document] = [{"$match": wanted}, {"$sort": _BY_KEY}, {"$limit": limit}]
        page = await self._page("walk", stages, limit, MAX_PAGE_BYTES)
        return [
            StoredSession(stored_key=key, found=found, version=version)
            for key, found, version in zip(page.keys, page.sessions, page.versions, strict=True)
        ]

    def _live(self) -> dict[str, Any]:
        """Return the filter of live sessions, with a bound that an index can use."""
        return both({"e": {"$gt": Int64(self._seen_us - _SKEW_US)}}, documents.live())

    async def _key_after(self, first: str, place: int) -> str | None:
        """Return the key that is so many places after the first one that is not less; None: there is none."""
        stages: list[Document] = [
            {"$match": {"_id": {"$gte": first}}},
            {"$sort": _BY_KEY},
            {"$skip": place},
            {"$limit": 1},
        ]
        found = [one["_id"] for one in await self._all("walk", [*stages, {"$project": {"_id": 1}}])]
        return found[0] if found and documents.is_text(found[0]) else None

    async def _page(self, doing: str, stages: list[Document], limit: int, max_bytes: int) -> _Portion:
        async def read(database: Database) -> _Portion:
            shown = self._read(database, [*stages, documents.SHOWN], min(limit + 1, _PORTION))
            async with aclosing(shown):
                return await _taken(shown, limit, max_bytes)

        page = await self._pool.run(doing, read)
        self._seen_us = page.now_us or self._seen_us
        return page

    async def _all(self, doing: str, stages: list[Document], *, is_begun: bool = False) -> list[Document]:
        async def read(database: Database) -> list[Document]:
            return [one async for one in self._read(database, stages)]

        return await self._pool.run(doing, read, is_begun=is_begun)

    async def _read(
        self, database: Database, stages: list[Document], portion: int | None = None
    ) -> AsyncGenerator[Document, None]:
        options: dict[str, Any] = {} if portion is None else {"batchSize": portion}
        async with await self._names.read(database).aggregate(stages, **options) as cursor:
            async for found in cursor:
                yield found


async def _taken(shown: AsyncIterator[Document], limit: int, max_bytes: int) -> _Portion:
    """Take the first sessions, and no document: a damaged one may be large."""
    page = _Portion()
    size_bytes = 0
    async for one in shown:
        page.now_us = documents.now_us(one)
        if not documents.is_text(one["_id"]):
            continue
        session = documents.session_of(one)
        size_bytes += len(session.bag) if isinstance(session, Session) else 0
        page.is_cut = bool(page.keys) and len(page.keys) < limit and size_bytes > max_bytes
        if page.is_cut or len(page.keys) == limit:
            page.following = one["_id"]
            break
        page.keys.append(one["_id"])
        page.sessions.append(session)
        page.versions.append(documents.version_of(one))
    return page
