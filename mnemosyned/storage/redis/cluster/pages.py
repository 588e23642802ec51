"""Pages of List on a Redis Cluster: what each bucket has, put in order here.

    1. heads      each bucket tells the names and the first bytes of its next sessions, without their bags
    2. merge      the least of them are the page: by count, and by the lengths of their bags
    3. records    of these alone, from the buckets that have them

A page costs as much as `limit` sessions of each bucket, without bags. A session that ends between the first
and the last step is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import merge
from typing import TYPE_CHECKING, Any, Final

from mnemosyned.errors import StorageUnavailable
from mnemosyned.sessions.model import MAX_BAG_BYTES, Criteria, DamagedSession, Session
from mnemosyned.sessions.page_token import between
from mnemosyned.sessions.store import KeyedPage, Page
from mnemosyned.storage.redis import scripts
from mnemosyned.storage.redis.criteria import texts_of
from mnemosyned.storage.redis.records import (
    bag_bytes_of,
    escaped,
    expiry_of,
    pairs_of,
    session_of,
    stored_name,
)

if TYPE_CHECKING:
    from mnemosyned.storage.redis.cluster.pool import ClusterPool
    from mnemosyned.storage.redis.cluster.primary import Call
    from mnemosyned.storage.redis.cluster.slots import Space
    from mnemosyned.storage.redis.scripts import Script

# Sessions that one page of a walk looks at in each bucket, also if it wants none of them.
_MOST_LOOKED: Final = 500
# No bag, and no bound on what is sent.
_HEADS: Final = (2**50, -1)
# An offset is sought for, until the sessions that come before the page are at most so many.
_NEAR: Final = 1000
_LATEST_US: Final = 2**53


@dataclass(frozen=True, slots=True)
class _Head:
    """A session, without its bag."""

    name: bytes
    record: Any  # its first bytes, or a number in place of what cannot be read

    @property
    def expires_at_us(self) -> float:
        return expiry_of(self.record)


class Pages:
    """Finds sessions in all buckets."""

    def __init__(self, pool: ClusterPool) -> None:
        self._pool = pool

    async def find(self, criteria: Criteria, *, offset: int, limit: int, max_bytes: int) -> Page:
        """See SessionStore."""
        spaces = await self._pool.holding(criteria)
        after_us, before = await self._sought(criteria, spaces, offset)
        given = texts_of(criteria if after_us is None else replace(criteria, expires_after_us=after_us))
        left = offset - before
        arguments = (*given, 0, left + limit, *_HEADS)
        replies = await self._all(scripts.FIND, [(space, arguments) for space in spaces])
        heads = sorted(
            (_Head(*pair) for _, *pairs in replies for pair in pairs_of(pairs)),
            key=lambda head: (head.expires_at_us, head.name),
        )
        wanted, is_cut = _cut(heads[left : left + limit], max_bytes)
        return Page(sessions=[found for _, found in await self._read(wanted)], is_cut=is_cut)

    async def walk(self, criteria: Criteria, *, start: bytes, limit: int, max_bytes: int) -> KeyedPage:
        """See SessionStore."""
        replies = await self._all(scripts.LIST, await self._walks(criteria, start, limit))
        # Where the first bucket has stopped; what others have behind that is for the next page.
        end, before_end = min(((one[1], one[2]) for one in replies if one[1]), default=(b"", b""))
        found = merge(
            *([_Head(*pair) for pair in pairs_of(pairs)] for _, _, _, *pairs in replies),
            key=lambda head: head.name,
        )
        heads = [head for head in found if not end or head.name < end]
        wanted, is_cut = _cut(heads[:limit], max_bytes)
        count = len(wanted)
        if count < len(heads):
            next_key = between(wanted[-1].name, heads[count].name)
        elif end:
            next_key = between(max(before_end, wanted[-1].name if wanted else b""), end)
        else:
            next_key = None
        read = await self._read(wanted)
        return KeyedPage(
            sessions=[found for _, found in read],
            keys=[name for name, _ in read],
            next_key=next_key,
            is_cut=is_cut,
        )

    async def stored_keys_after(self, start: bytes, *, limit: int) -> list[bytes]:
        """Return the least names that are greater; expired sessions too."""
        replies = await self._all(
            scripts.WALK, [(space, (b"(" + start, limit, "", "")) for space in self._pool.buckets]
        )
        return list(merge(*replies))[:limit]

    async def stored_from(self, start: bytes, *, limit: int, max_bytes: int) -> list[tuple[bytes, Any]]:
        """Return the least names from this one on, and their records; expired sessions too."""
        arguments = (b"[" + start, limit, *_HEADS)
        replies = await self._all(scripts.WALK, [(space, arguments) for space in self._pool.buckets])
        found = merge(
            *([_Head(*pair) for pair in pairs_of(one)] for one in replies), key=lambda one: one.name
        )
        wanted, _ = _cut(list(found)[:limit], max_bytes)
        records = await self._records(wanted, are_all_wanted=True)
        return [
            (head.name, record) for head, record in zip(wanted, records, strict=True) if record is not None
        ]

    async def _walks(self, criteria: Criteria, start: bytes, limit: int) -> list[Call]:
        """Return how each bucket is asked. The names of a subject or refresh token are sorted here.

        Lua would compare them as the locale of the server does.
        """
        given = (*texts_of(criteria), limit, *_HEADS, _MOST_LOOKED)
        spaces = await self._pool.holding(criteria)
        if criteria.access_token is not None:
            name = stored_name(criteria.access_token)
            return [(spaces[0], (*given, b"", name))] if name >= start else []
        whole = (*given, b"[" + start)
        if criteria.subject_id is None and criteria.refresh_token is None:
            return [(space, whole) for space in spaces]
        asked = (*texts_of(criteria), _MOST_LOOKED)
        calls: list[Call] = []
        for space, names in zip(
            spaces, await self._all(scripts.NAMES, [(space, asked) for space in spaces]), strict=True
        ):
            if names is None:
                calls.append((space, whole))
            elif left := sorted(name for name in names if name >= start):
                calls.append((space, (*given, b"", *left)))
        return calls

    async def _sought(
        self, criteria: Criteria, spaces: Sequence[Space], offset: int
    ) -> tuple[int | None, int]:
        """Return an instant by which no more than `offset` of the sessions expire, and how many do.

        With few sessions before the page, or criteria by which each is looked at, that is none.
        """
        is_filtered = criteria.subject_id is not None and criteria.refresh_token is not None
        if offset <= _NEAR or is_filtered or criteria.access_token is not None:
            return None, 0
        low, high, passed = criteria.expires_after_us or 0, criteria.expires_before_us or _LATEST_US, 0
        while high - low > 1 and offset - passed > _NEAR:
            middle = (low + high) // 2
            given = texts_of(replace(criteria, expires_before_us=middle + 1))
            counts = await self._all(scripts.COUNT, [(space, (*given, "live")) for space in spaces])
            count = sum(one for one, _ in counts)
            if count <= offset:
                low, passed = middle, count
            else:
                high = middle
        return low, passed

    async def _read(self, heads: Sequence[_Head]) -> list[tuple[bytes, Session | DamagedSession]]:
        records = await self._records(heads)
        return [
            (head.name, session_of(escaped(head.name), record))
            for head, record in zip(heads, records, strict=True)
            if record is not None
        ]

    async def _records(self, heads: Sequence[_Head], *, are_all_wanted: bool = False) -> list[Any]:
        """Return the records of sessions, None where there is none any more."""
        if not heads:
            return []
        given = (MAX_BAG_BYTES, "1" if are_all_wanted else "")
        return _checked(await self._pool.each(scripts.RECORDS, given, [(head.name,) for head in heads]))

    async def _all(self, script: Script, calls: Sequence[Call]) -> list[Any]:
        """Run a script on all of these buckets. Raises StorageUnavailable if one of them fails."""
        return _checked(await self._pool.run_all(script, calls))


def _checked(replies: list[Any]) -> list[Any]:
    for reply in replies:
        if isinstance(reply, StorageUnavailable):
            raise reply
    return replies


def _cut(heads: Sequence[_Head], max_bytes: int) -> tuple[Sequence[_Head], bool]:
    """Return the heads whose bags fit, one at least, and whether that are not all."""
    size_bytes = 0
    for count, head in enumerate(heads):
        size_bytes += bag_bytes_of(head.record)
        if count and size_bytes > max_bytes:
            return heads[:count], True
    return heads, False
