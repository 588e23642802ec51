"""The MongoDB engine: each method of the storage port is a command or two for a whole batch.

`documents.py` has the form of a session and the expressions that the server evaluates, `node_rows.py` the
rows of nodes, `walks.py` what reads many sessions, `value_writer.py` SetValue, `pool.py` connections and
errors.

A primary that a partition has cut off goes on answering until it notices, for ten seconds or more. Another
one may be elected meanwhile, and acknowledge calls. What the former one says must not be believed:

    a write that changes something   a majority must have it; a primary that is cut off reaches none
    a read                           is linearizable: a majority confirms that the server is the primary
    a write that changes nothing     proves nothing, so a read follows

Reads at "majority" would not do. What they show is durable, but may be older than an Abandon that the new
primary has acknowledged, and would refill a cache with the ended session. A linearizable read costs a round
trip to a majority, as a write does. Only misses pay for it: copies are under a lease (`cluster/lease.py`),
whose renewals are writes. MongoDB promises linearizability of reads of one document, and so does the port.

A call of several commands (Start, Delete, cleanup) leaves after each of them what another call may meet.
Rename changes two documents together, in a transaction.

The clock. `$$NOW` is the server's clock at the beginning of a command. The limit of a write
(`not_after_us`) is compared with it in the write itself. A command that waits within the server is done
later than its clock says, though not after `maxTimeMS`. When the driver repeats a command, the server has
either done it, and answers as the first time; or it has not, and looks at the clock again. So a repeated
write is not done late either, and its outcome is unknown only if the last answer is missing.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final, cast

from bson import Int64
from pymongo import UpdateOne

from aio.units import NEVER_US
from mnemosyned.errors import (
    DeadlineExceeded,
    MnemosyneError,
    SessionNotFound,
    StorageUnavailable,
)
from mnemosyned.sessions.model import (
    Abandonment,
    ChangedBag,
    Criteria,
    Lookup,
    NewSession,
    Session,
    Touch,
    ValueChange,
)
from mnemosyned.sessions.store import Deletion, Renaming, StorageRefused, StoredSession
from mnemosyned.storage.mongodb import documents, renaming, schema, server_check, starting, trial
from mnemosyned.storage.mongodb.filters import both, matching
from mnemosyned.storage.mongodb.node_rows import NodeRows
from mnemosyned.storage.mongodb.value_writer import ValueWriter
from mnemosyned.storage.mongodb.walks import Walks

if TYPE_CHECKING:
    from mnemosyned.storage.mongodb.client import Client, Database, Document
    from mnemosyned.storage.mongodb.pool import MongoPool
    from mnemosyned.storage.mongodb.schema import Names

log = logging.getLogger(__name__)

# Sessions that one step ends, each by a command of its own.
_STEP: Final = 100
_TRIES: Final = 3


class MongoStore:
    """Every part of the storage port (FullStore), on a replica set or a sharded cluster of MongoDB.

    It keeps no state but the pool, so any number of stores, on any number of nodes, may use one database.
    """

    def __init__(self, pool: MongoPool, names: Names, *, timeout_s: float) -> None:
        self._pool = pool
        self._names = names
        self._timeout_s = timeout_s
        self._missing_indexes: list[str] = []
        self._rows = NodeRows(pool, names)
        self.renew, self.bar, self.resign = self._rows.renew, self._rows.bar, self._rows.resign
        self._walks = walks = Walks(pool, names)
        self.find, self.walk = walks.find, walks.walk
        self.stored_keys_after, self.stored_from = walks.stored_keys_after, walks.stored_from
        self._values = ValueWriter(pool, names, walks, timeout_s=timeout_s)

    async def open(self) -> None:
        """See Storage; makes the collections, and tries all commands on sessions of its own."""
        await self._pool.open(self._look_at_server)
        try:
            await self._pool.run("create", lambda database: schema.make(database, self._names))
            await self.check()
            await self._try_out()
        except StorageUnavailable as exc:
            refusal = self._pool.refused(exc)
            await self._pool.close()
            raise refusal or exc from exc.__cause__
        except BaseException:
            await self._pool.close()
            raise

    async def close(self) -> None:
        """See Storage. Writes under way have an unknown outcome: the server may still do them."""
        await self._pool.close()

    async def now_us(self) -> int:
        """See Storage."""
        _, _, now_us = await self._rows.state()
        return now_us

    async def check(self) -> object:
        """See Storage: whether the primary takes writes, and whether the collection is that of before."""
        identity, epoch, _ = await self._rows.state()
        uuid = await self._pool.run("check", lambda database: schema.look(database, self._names))
        missing = await self._pool.run(
            "check", lambda database: schema.missing_indexes(database, self._names)
        )
        for command in missing if missing != self._missing_indexes else ():
            log.warning("index_missing", extra={"collection": self._names.sessions, "mend": command})
        self._missing_indexes = missing
        return identity, epoch, uuid

    async def identity(self) -> bytes:
        """See Storage. If the database has lost it, the nodes that know it put it back."""
        identity, _, _ = await self._rows.state()
        return identity

    async def estimated_sessions(self) -> int:
        """See Storage; from the statistics of the collection."""
        return await self._pool.run(
            "estimate", lambda database: self._names.written(database).estimated_document_count()
        )

    async def start(self, sessions: Sequence[NewSession]) -> list[Session | MnemosyneError]:
        """See SessionStore."""
        return await starting.start(self._pool, self._names, self._walks, sessions)

    async def load(self, lookups: Sequence[Lookup]) -> list[Session | MnemosyneError]:
        """See SessionStore; a second command moves what is behind."""
        shown = await self._walks.those_of([one.access_token for one in lookups], "load")
        moves: dict[str, int] = {}
        loaded: list[Session | MnemosyneError] = []
        for lookup in lookups:
            token, one = lookup.access_token, shown.get(lookup.access_token)
            if one is None or not documents.is_live(one):
                loaded.append(SessionNotFound())
                continue
            found = documents.session_of(one)
            if not isinstance(found, Session):
                loaded.append(found.error())
                continue
            expires_at_us = documents.now_us(one) + lookup.ttl_us
            if found.expires_at_us < expires_at_us - lookup.touch_interval_us:
                moves[token] = found.expires_at_us = max(expires_at_us, moves.get(token, 0))
            loaded.append(found)
        if moves:
            await self._moved("move", list(moves.items()))
        return loaded

    async def exist(self, tokens: Sequence[str]) -> list[bool | MnemosyneError]:
        """See SessionStore."""
        live = await self._walks.live_of(tokens, "exist")
        return [token in live for token in tokens]

    async def set_values(self, changes: Sequence[ValueChange]) -> list[ChangedBag | MnemosyneError]:
        """See SessionStore; a command that reads, one for each bag, and more if others change the same."""
        return await self._values.apply(changes)

    async def abandon(self, endings: Sequence[Abandonment]) -> list[bool | MnemosyneError]:
        """See SessionStore; a command for each session, and one for all that were not there."""
        results: dict[int, bool | MnemosyneError] = {}
        left, tries = list(range(len(endings))), 0
        while left and tries < _TRIES:
            # Each token once: of several, the first one ends the session.
            places = list({endings[at].access_token: at for at in reversed(left)}.values())[::-1]
            ends = [self._ending(endings[at].access_token, endings[at].not_after_us) for at in places]
            flags = await self._pool.run_each("abandon", ends, is_begun=bool(results))
            results |= {at: True for at, flag in zip(places, flags, strict=True) if flag}
            unsure = [at for at in left if at not in results]
            if unsure:
                tokens = [endings[at].access_token for at in unsure]
                live = await self._walks.live_of(tokens, "abandon", is_begun=True)
                for at, token in zip(unsure, tokens, strict=True):
                    if token not in live:
                        results[at] = False
                    elif documents.is_late(live[token], endings[at].not_after_us):
                        results[at] = DeadlineExceeded()
            left, tries = [at for at in left if at not in results], tries + 1
        return [results[at] if at in results else _contended() for at in range(len(endings))]

    async def touch(self, touches: Sequence[Touch]) -> list[bool | MnemosyneError]:
        """See SessionStore; a second command only if a session is not there."""
        moves = [(touch.access_token, touch.expires_at_us) for touch in touches]
        if await self._moved("touch", moves) == len(moves):
            return [True] * len(moves)
        live = await self._walks.live_of([token for token, _ in moves], "touch", is_begun=True)
        return [token in live for token, _ in moves]

    async def delete(self, criteria: Criteria, *, limit: int, not_after_us: int = NEVER_US) -> Deletion:
        """See SessionStore: looks for sessions, and ends each by a command of its own."""
        keys: list[str] = []
        is_begun = False
        while len(keys) < limit:
            wanted = min(limit - len(keys), _STEP)
            found, now_us = await self._walks.candidates(criteria, wanted, is_begun=is_begun)
            if not found:
                return Deletion(stored_keys=keys, is_all=True)
            if documents.is_late(now_us, not_after_us):
                if not keys:
                    raise DeadlineExceeded
                break
            ends = [self._deleting(criteria, key, not_after_us) for key in found]
            flags = await self._pool.run_each("delete", ends, is_begun=is_begun)
            is_begun = True
            keys += [key for key, flag in zip(found, flags, strict=True) if flag]
        return Deletion(stored_keys=keys, is_all=False)

    async def clean_up(self, *, limit: int) -> list[str]:
        """See SessionStore. Nodes take turns; what another one has removed meanwhile is named by both."""
        now_us = await self._rows.begin_cleanup()
        keys = await self._walks.expired(now_us, limit) if now_us else []
        if not keys:
            return []
        wanted = {"_id": {"$in": keys}, "e": {"$lte": Int64(now_us)}}

        async def remove(database: Database) -> int:
            return (await self._names.written(database).delete_many(wanted)).deleted_count

        if await self._pool.run("clean_up", remove, is_begun=True) == len(keys):
            return keys
        # Some were started once more under the same key.
        left = await self._walks.those_of(keys, "clean_up", is_begun=True)
        return [key for key in keys if key not in left]

    async def rename(self, renamings: Sequence[Renaming]) -> list[bool | MnemosyneError]:
        """See RenamableStore; a transaction for each session that has the old key."""
        return await renaming.rename(self._pool, self._names, self._walks, renamings)

    async def remove_unchanged(self, sessions: Sequence[StoredSession]) -> list[str]:
        """See CheckableStore."""
        works = [self._deleting_where(cast("Document", session.version)) for session in sessions]
        flags = await self._pool.run_each("remove_unchanged", works)
        return [session.stored_key for session, flag in zip(sessions, flags, strict=True) if flag]

    def _ending(self, token: str, not_after_us: int) -> Callable[[Database], Awaitable[bool]]:
        return self._deleting_where({"_id": token, **documents.live(not_after_us)})

    def _deleting(
        self, criteria: Criteria, key: str, not_after_us: int
    ) -> Callable[[Database], Awaitable[bool]]:
        wanted = both(matching(criteria), {"_id": key})
        return self._deleting_where(both(wanted, {"$expr": documents.in_time(not_after_us)}))

    def _deleting_where(self, wanted: Document) -> Callable[[Database], Awaitable[bool]]:
        async def delete(database: Database) -> bool:
            return (await self._names.written(database).delete_one(wanted)).deleted_count > 0

        return delete

    async def _moved(self, doing: str, moves: Sequence[tuple[str, int]]) -> int:
        """Move expiries forward, never back; return how many sessions were live."""
        updates = [
            UpdateOne({"_id": token, **documents.live()}, {"$max": documents.expiry(expires_at_us)})
            for token, expires_at_us in moves
        ]
        if not updates:
            return 0

        async def move(database: Database) -> int:
            return (await self._names.written(database).bulk_write(updates, ordered=False)).matched_count

        return await self._pool.run(doing, move)

    async def _try_out(self) -> None:
        names = self._names.trial
        await self._pool.run("create", lambda database: schema.make(database, names))
        await trial.run(MongoStore(self._pool, names, timeout_s=self._timeout_s))

    async def _look_at_server(self, client: Client) -> None:
        """Judge the server. Raises PyMongo's errors; StorageRefused."""
        refusal = server_check.refusal(await client.hello(), await client.build_info())
        if refusal:
            raise StorageRefused(f"MongoDB at {client.address}: {refusal}")


def _contended() -> StorageUnavailable:
    return StorageUnavailable("mnemosyned: storage: other writers start and end the session all the time")
