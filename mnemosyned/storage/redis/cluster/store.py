"""The Redis engine on a cluster: named sessions by bucket, and all else by asking every bucket.

    named sessions            items.py, one script for each bucket that has some (pool.py)
    List, and all names       pages.py
    another name              moves.py
    Delete, cleanup           sweeps.py
    health, clocks            state.py
    rows of nodes, identity   at the home (slots.py), which is on one primary; for others see admission.py

It keeps no state of sessions, so any number of stores, on any number of nodes, may use one cluster.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from aio.units import NEVER_US
from cluster.node_row import Renewal, Renewed
from mnemosyned.errors import MnemosyneError, StorageUnavailable
from mnemosyned.sessions.model import MAX_PAGE_BYTES, Criteria
from mnemosyned.sessions.store import Deletion, KeyedPage, Page, Renaming, StoredSession
from mnemosyned.storage.redis import scripts
from mnemosyned.storage.redis.cluster import trial
from mnemosyned.storage.redis.cluster.moves import Moves
from mnemosyned.storage.redis.cluster.pages import Pages
from mnemosyned.storage.redis.cluster.space_pool import SpacePool
from mnemosyned.storage.redis.cluster.state import ClusterState
from mnemosyned.storage.redis.cluster.sweeps import Sweeps
from mnemosyned.storage.redis.items import Items
from mnemosyned.storage.redis.node_rows import NodeRows
from mnemosyned.storage.redis.records import escaped, session_of, state_of, stored_name
from mnemosyned.storage.redis.store import RedisStore

if TYPE_CHECKING:
    from mnemosyned.storage.redis.cluster.pool import ClusterPool
    from mnemosyned.storage.redis.cluster.primary import Primary
    from mnemosyned.storage.redis.cluster.slots import Space
    from mnemosyned.storage.redis.pool import RedisPool


class ClusterStore:
    """Every part of the storage port (FullStore), on a Redis Cluster."""

    def __init__(self, pool: ClusterPool, *, timeout_s: float, buckets: int) -> None:
        """`buckets` is how many a cluster without any session gets."""
        self._pool = pool
        self._timeout_s = timeout_s
        self._wanted_buckets = buckets
        self._home = SpacePool(pool, pool.home)
        self._moves, self._pages, self._state = Moves(pool), Pages(pool), ClusterState(pool, self._home)
        self._sweeps = Sweeps(pool, self._moves)
        self._rows = NodeRows(self._home)
        self.bar, self.resign = self._rows.bar, self._rows.resign
        items = Items(pool, timeout_s=timeout_s)
        self.start, self.load, self._exist = items.start, items.load, items.exist
        self.set_values, self.abandon, self.touch = items.set_values, items.abandon, items.touch
        self.remove_unchanged = items.remove_unchanged
        self.check, self.identity = self._state.check, self._state.identity
        self.estimated_sessions = self._state.sessions

    async def open(self) -> None:
        """See Storage; tries the scripts on each primary, on keys of their own."""
        try:
            await self._pool.open()
            self._divide(await self._buckets())
            await self.check()
            self._state.refuse_clocks()
            await self._try_scripts()
        except StorageUnavailable as exc:
            await self._pool.close()
            raise self._pool.refused(exc.__cause__) or exc from exc.__cause__
        except BaseException:
            await self._pool.close()
            raise
        self._pool.opened()

    async def _buckets(self) -> int:
        try:
            return int(await self._home.run(scripts.BUCKETS, self._wanted_buckets, is_write=True))
        except StorageUnavailable as exc:
            primary = self._pool.primary_of(self._pool.home)
            refusal = self._pool.refused(exc.__cause__, primary.host) if primary is not None else None
            raise refusal or exc from exc.__cause__

    def _divide(self, count: int) -> None:
        self._pool.divide(count)
        self._sweeps.stores = [
            RedisStore(cast("RedisPool", SpacePool(self._pool, space)), timeout_s=self._timeout_s)
            for space in self._pool.buckets
        ]

    async def _try_scripts(self) -> None:
        """Try the scripts on each primary: each has users of its own."""
        spaces = (self._pool.home, *self._pool.buckets)
        of_primaries = {self._pool.primary_of(space): space for space in spaces}
        await asyncio.gather(
            *(self._try_on(primary, space) for primary, space in of_primaries.items() if primary is not None)
        )

    async def _try_on(self, primary: Primary, space: Space) -> None:
        """Raise StorageRefused if it refuses us. One that does not answer may do so later, as in `check`."""
        try:
            await trial.run(SpacePool(self._pool, space))
        except StorageUnavailable as exc:
            refusal = self._pool.refused(exc.__cause__, primary.host)
            if refusal is None and primary.is_suspect:
                return
            raise refusal or exc from exc.__cause__

    async def close(self) -> None:
        """See Storage. Writes under way have an unknown outcome: a server may still do them."""
        await self._pool.close()

    async def now_us(self) -> int:
        """See Storage: the clock of the primary that is furthest behind (clocks.py)."""
        return await self._state.now_us()

    async def renew(self, renewal: Renewal) -> Renewed:
        """See LeaseStore."""
        answer = await self._rows.renew(renewal)
        self._pool.admission.has_renewed = True
        return answer._replace(clock_us=answer.clock_us - self._state.behind_us())

    async def exist(self, tokens: Sequence[str]) -> list[bool | MnemosyneError]:
        """See SessionStore. A session that is renamed from one of the tokens to another is not missed."""
        return await (self._moves.are_there(tokens) if self._moves.has_moved else self._exist(tokens))

    async def find(
        self, criteria: Criteria, *, offset: int, limit: int, max_bytes: int = MAX_PAGE_BYTES
    ) -> Page:
        """See SessionStore."""
        return await self._pages.find(criteria, offset=offset, limit=limit, max_bytes=max_bytes)

    async def walk(
        self, criteria: Criteria, *, start: bytes, limit: int, max_bytes: int = MAX_PAGE_BYTES
    ) -> KeyedPage:
        """See SessionStore."""
        return await self._pages.walk(criteria, start=start, limit=limit, max_bytes=max_bytes)

    async def delete(self, criteria: Criteria, *, limit: int, not_after_us: int = NEVER_US) -> Deletion:
        """See SessionStore."""
        return await self._sweeps.delete(criteria, limit=limit, not_after_us=not_after_us)

    async def clean_up(self, *, limit: int) -> list[str]:
        """See SessionStore. A script is atomic, so no two nodes remove the same sessions."""
        return await self._sweeps.clean_up(limit=limit)

    async def rename(self, renamings: Sequence[Renaming]) -> list[bool | MnemosyneError]:
        """See RenamableStore; nothing is ever held, so nothing is passed over."""
        self._moves.has_moved = True
        names = [(stored_name(one.old), stored_name(one.new)) for one in renamings]
        bucket_of = self._pool.bucket_of
        near = [at for at, (old, new) in enumerate(names) if bucket_of(old) == bucket_of(new)]
        far = [at for at, (old, new) in enumerate(names) if bucket_of(old) != bucket_of(new)]
        found: dict[int, bool | MnemosyneError] = {}
        if near:
            flags = await self._pool.each(scripts.RENAME, (), [names[at] for at in near], is_write=True)
            for at, flag in zip(near, flags, strict=True):
                found[at] = flag if isinstance(flag, MnemosyneError) else bool(flag)
        if far:
            found |= dict(zip(far, await self._moves.move([names[at] for at in far]), strict=True))
        return [found[at] for at in range(len(names))]

    async def stored_keys_after(self, stored_key: str, *, limit: int) -> list[str]:
        """See RenamableStore."""
        names = await self._pages.stored_keys_after(stored_name(stored_key), limit=limit)
        return [escaped(name) for name in names]

    async def stored_from(self, stored_key: str, *, limit: int) -> list[StoredSession]:
        """See CheckableStore."""
        found = await self._pages.stored_from(stored_name(stored_key), limit=limit, max_bytes=MAX_PAGE_BYTES)
        return [
            StoredSession(
                stored_key=escaped(name), found=session_of(escaped(name), record), version=state_of(record)
            )
            for name, record in found
        ]
