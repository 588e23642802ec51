"""The PostgreSQL engine: each method of the storage port is one statement for a whole batch.

`queries.py` holds the statements and their locks, `pool.py` connections and errors. This module turns
items into columns, and rows into one result per item:

- Duplicates. A statement must not meet a token twice: ON CONFLICT would fail, an UPDATE would apply one of
  them. Each method merges the items of one token first, and gives each item its own result after.
- Isolation. Some errors are the fault of one item (`pool.ITEM_FAULTS`), but PostgreSQL rolls back the whole
  statement. Then nothing is done yet, and `_isolating` runs each item as a batch of one.
- SetValue changes bags here: see `value_writer.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Final, TypeVar

import asyncpg

from aio.slices import in_slices
from aio.units import NEVER_US
from mnemosyned.errors import (
    CorruptSession,
    DeadlineExceeded,
    InvalidArgument,
    MnemosyneError,
    SessionAlreadyExists,
    SessionNotFound,
    StorageUnavailable,
)
from mnemosyned.sessions.model import (
    MAX_BAG_BYTES,
    MAX_PAGE_BYTES,
    Abandonment,
    ChangedBag,
    Criteria,
    Lookup,
    NewSession,
    Session,
    Touch,
    ValueChange,
)
from mnemosyned.sessions.store import Deletion, KeyedPage, Page, Renaming, StoredSession
from mnemosyned.storage.postgres import plain, renaming, trial
from mnemosyned.storage.postgres.cleaning import Cleaner
from mnemosyned.storage.postgres.faults import ITEM_FAULTS, REFUSALS, Faults
from mnemosyned.storage.postgres.kind import POSTGRESQL, Kind
from mnemosyned.storage.postgres.migration import Migration
from mnemosyned.storage.postgres.node_table import NodeTable
from mnemosyned.storage.postgres.pool import PostgresPool
from mnemosyned.storage.postgres.queries import Queries
from mnemosyned.storage.postgres.rows import (
    abandoned,
    escaped,
    keyed_page_of,
    page_of,
    session_of,
    started,
    text,
)
from mnemosyned.storage.postgres.schema import Table, set_up
from mnemosyned.storage.postgres.table_health import TableHealth
from mnemosyned.storage.postgres.value_writer import ValueWriter
from mnemosyned.storage.postgres.walks import Call, Walks

if TYPE_CHECKING:
    from asyncpg import Record

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

# Only the nodes of a cluster need it.
_GRANT_IDENTITY: Final = "GRANT EXECUTE ON FUNCTION pg_catalog.pg_control_system() TO PUBLIC"


class PostgresStore:
    """Every part of the storage port (FullStore), on one table.

    It keeps no state but the pool, so any number of stores, on any number of nodes, may use one table. All
    instants are microseconds since the epoch on the server's clock.
    """

    def __init__(
        self, pool: PostgresPool, table: Table, *, is_due: bool = False, kind: Kind = POSTGRESQL
    ) -> None:
        """`kind` is of the server, if it is known before `open`."""
        self._pool = pool
        self._table = table
        # Every table takes those of False; `migration.py` tells whether it takes the others.
        self._queries = Queries(table.sql, is_due=is_due)
        self._values = ValueWriter(pool, self._queries)
        self._health: TableHealth | None = None
        self._migration = Migration(pool, table, self._use_form)
        self._nodes = nodes = NodeTable(pool, table)
        self._cleaner = Cleaner(pool, nodes)
        self.renew, self.bar, self.resign = nodes.renew, nodes.bar, nodes.resign
        self._use_kind(kind)

    async def open(self) -> None:
        """See Storage: connect, and create what is missing of the table.

        PostgreSQL refuses in two places: the server at the connection (no such user or database), and the
        table at set-up (no right to create it). Both mean that a retry is useless.
        """
        await self._pool.open()
        try:
            async with self._pool.connection(passing=REFUSALS) as connection:
                self._use_kind(self._pool.kind)
                if self._queries.is_plain:
                    await plain.set_up(connection, self._table)
                else:
                    await set_up(connection, self._table)
                    await self._migration.look(connection)
                await trial.run(connection, self._table, self._same_on)
            if not self._queries.is_plain:
                await self._migration.start()
        except BaseException as exc:
            # A cancelled or failed open leaves no pool behind: `open` may be called again.
            await self.close()
            if isinstance(exc, REFUSALS):
                raise self._pool.address.refused(exc, doing="set up the table") from exc
            raise

    def _use_form(self, is_due: bool) -> None:  # noqa: FBT001  # a callback with one argument
        if is_due != self._queries.is_due:
            self._queries = Queries(self._table.sql, is_due=is_due)

    def _use_kind(self, kind: Kind) -> None:
        if kind.is_plain != self._queries.is_plain:
            identity = self._table.identity.sql if kind.is_plain else None
            self._queries = self._values.queries = Queries(self._table.sql, identity=identity)
            self._nodes.use(is_plain=kind.is_plain)

    def _same_on(self, pool: PostgresPool, table: Table) -> PostgresStore:
        return PostgresStore(pool, table, is_due=self._queries.is_due, kind=self._pool.kind)

    async def close(self) -> None:
        """See Storage. Writes under way have an unknown outcome: the server may still commit them."""
        await self._migration.close()
        await self._pool.close()

    async def now_us(self) -> int:
        """See Storage. It waits for a connection like any call: a full pool counts as unhealthy."""
        rows = await self._pool.fetch(self._queries.now)
        return int(rows[0]["now"])

    async def check(self) -> object:
        """See Storage."""
        if self._health is None:
            self._health = TableHealth(self._pool, self._table, self._same_on, self._migration.look)
        return await self._health.check()

    async def identity(self) -> bytes:
        """See Storage. Hashed, since nodes send it to each other, and the numbers are the database's own."""
        try:
            rows = await self._pool.fetch(self._queries.identity)
        except StorageUnavailable as exc:
            if isinstance(exc.__cause__, asyncpg.InsufficientPrivilegeError):
                log.error("right_missing", extra={"mending": _GRANT_IDENTITY})
            raise
        return hashlib.blake2b(str(rows[0]["identity"]).encode(), digest_size=16).digest()

    async def estimated_sessions(self) -> int:
        """See Storage: the planner's estimate, from statistics; 0 while PostgreSQL has none."""
        (row,) = await self._pool.fetch(self._queries.estimate)
        return int(row["sessions"])

    async def start(self, sessions: Sequence[NewSession]) -> list[Session | MnemosyneError]:
        """See SessionStore; an item's InvalidArgument: a token too long to index."""
        return await _isolating(self._start, sessions)

    async def load(self, lookups: Sequence[Lookup]) -> list[Session | MnemosyneError]:
        """See SessionStore. Two lookups of one token with the same times are one parameter and one row."""
        return await _isolating(self._load, lookups)

    async def _load(self, lookups: Sequence[Lookup]) -> list[Session | MnemosyneError]:
        keys = [lookup.access_token.encode() for lookup in lookups]
        # One statement for all sessions with the same times, which today are all of them.
        tokens_by_times: dict[tuple[int, int], list[bytes]] = {}
        for lookup, key in zip(lookups, keys, strict=True):
            tokens_by_times.setdefault((lookup.ttl_us, lookup.touch_interval_us), []).append(key)
        loaded: dict[bytes, Session | MnemosyneError] = {}
        for (ttl_us, touch_interval_us), tokens in tokens_by_times.items():
            ttl, fresh = timedelta(microseconds=ttl_us), timedelta(microseconds=ttl_us - touch_interval_us)
            try:
                rows = await self._rows(tokens, ttl, fresh)
            except asyncpg.DataError:
                if len(lookups) > 1:
                    raise
                # A database without an encoding (SQL_ASCII) may hold any bytes, and does not send them.
                return [_not_utf8()]
            for row in rows:
                found = session_of(row)
                if isinstance(found, Session):
                    self._values.bags.add(row["access_token"], found.bag)
                loaded[row["access_token"]] = found if isinstance(found, Session) else found.error()
                if row["is_behind"]:
                    loaded[row["access_token"]] = StorageUnavailable("mnemosyned: storage: read-only")
        return [loaded.get(key) or SessionNotFound() for key in keys]

    async def _rows(self, tokens: list[bytes], ttl: timedelta, fresh: timedelta) -> list[Record]:
        if not self._pool.read_only.is_known:
            try:
                return await self._pool.fetch(
                    self._queries.load, tokens, ttl, fresh, passing=(asyncpg.DataError,)
                )
            except StorageUnavailable as exc:
                if not isinstance(exc.__cause__, asyncpg.ReadOnlySQLTransactionError):
                    raise
        # What need not be extended can be read from a standby too.
        return await self._pool.fetch(self._queries.load_unmoved, tokens, fresh, passing=(asyncpg.DataError,))

    async def exist(self, tokens: Sequence[str]) -> list[bool | MnemosyneError]:
        """See SessionStore."""
        rows = await self._pool.fetch(self._queries.exist, _encoded(tokens))
        found = {row["access_token"] for row in rows}
        return [token.encode() in found for token in tokens]

    async def set_values(self, changes: Sequence[ValueChange]) -> list[ChangedBag | MnemosyneError]:
        """See SessionStore; 1 statement for bags that are remembered, 2 for others, and at most 11."""
        return await _isolating(self._set_values, changes)

    async def _set_values(self, changes: Sequence[ValueChange]) -> list[ChangedBag | MnemosyneError]:
        try:
            return await self._values.apply(changes)
        except asyncpg.DataError:
            if len(changes) > 1:
                raise
            # As for a load: the row's fields are in the answer, and nothing that was sent is a text.
            return [_not_utf8()]

    async def abandon(self, endings: Sequence[Abandonment]) -> list[bool | MnemosyneError]:
        """See SessionStore."""
        return await _isolating(self._abandon, endings)

    async def touch(self, touches: Sequence[Touch]) -> list[bool | MnemosyneError]:
        """See SessionStore."""
        return await _isolating(self._touch, touches)

    async def find(
        self, criteria: Criteria, *, offset: int, limit: int, max_bytes: int = MAX_PAGE_BYTES
    ) -> Page:
        """See SessionStore. PostgreSQL withholds the bags beyond the bytes, so memory is bounded."""
        # The first bag must not be withheld.
        page_bytes = max(max_bytes, MAX_BAG_BYTES)
        rows = await self._walk(
            lambda walks: walks.find(criteria, offset=offset, limit=limit, page_bytes=page_bytes)
        )
        return await in_slices(page_of(rows, max_bytes))

    async def walk(
        self, criteria: Criteria, *, start: bytes, limit: int, max_bytes: int = MAX_PAGE_BYTES
    ) -> KeyedPage:
        """See SessionStore; `find` has more of it."""
        page_bytes = max(max_bytes, MAX_BAG_BYTES)
        rows = await self._walk(
            lambda walks: walks.walk(criteria, start=start, limit=limit, page_bytes=page_bytes)
        )
        return await in_slices(keyed_page_of(rows, max_bytes))

    async def delete(self, criteria: Criteria, *, limit: int, not_after_us: int = NEVER_US) -> Deletion:
        """See SessionStore. No isolation: a Delete is one item, and criteria are checked before.

        `is_all` is True only if the condition met fewer rows than the limit, and all of them were deleted
        by this statement. Otherwise the caller runs another step.
        """
        (row,) = await self._walk(
            lambda walks: walks.delete(criteria, limit=limit, not_after_us=not_after_us)
        )
        if row["is_late"]:
            raise DeadlineExceeded
        return Deletion(
            stored_keys=[text(token) for token in row["tokens"]],
            # Fewer deleted than picked: another node's Delete has the others, and may not be done.
            is_all=len(row["tokens"]) == row["picked"] < limit,
        )

    async def clean_up(self, *, limit: int) -> list[str]:
        """See SessionStore; one node at a time, as far as possible."""
        return [text(token) for token in await self._cleaner.clean_up(self._queries.walks, limit)]

    async def rename(self, renamings: Sequence[Renaming]) -> list[bool | MnemosyneError]:
        """See RenamableStore; an item's StorageUnavailable: its lock, or its new key is being taken."""
        return await _isolating(self._rename, renamings)

    async def stored_keys_after(self, stored_key: str, *, limit: int) -> list[str]:
        """See RenamableStore. Surrogates keep invalid UTF-8 intact, so that the walk can go on from it."""
        after = stored_key.encode(errors="surrogateescape")
        rows = await self._pool.fetch(self._queries.stored_keys_after, after, limit)
        return [escaped(row["access_token"]) for row in rows]

    async def stored_from(self, stored_key: str, *, limit: int) -> list[StoredSession]:
        """See CheckableStore; the version is that of `set_values`."""
        key = stored_key.encode(errors="surrogateescape")
        rows = await self._pool.fetch(self._queries.stored_from, key, limit, MAX_PAGE_BYTES)
        return [
            StoredSession(
                stored_key=escaped(row["access_token"]), found=session_of(row), version=row["version"]
            )
            for row in rows
        ]

    async def remove_unchanged(self, sessions: Sequence[StoredSession]) -> list[str]:
        """See CheckableStore."""
        keys = [session.stored_key.encode(errors="surrogateescape") for session in sessions]
        versions = [session.version for session in sessions]
        rows = await self._pool.fetch(self._queries.remove_unchanged, keys, versions)
        return [escaped(row["access_token"]) for row in rows]

    async def _rename(self, renamings: Sequence[Renaming]) -> list[bool | MnemosyneError]:
        olds = [renaming.old.encode() for renaming in renamings]
        news = [renaming.new.encode() for renaming in renamings]
        # One alone waits for its row; many skip locked rows, or they could deadlock (`queries._rename`).
        if self._queries.is_plain:
            return [*await renaming.in_steps(self._pool, self._table.sql, olds, news)]
        query = self._queries.rename if len(renamings) > 1 else self._queries.rename_one
        rows = await self._pool.fetch(query, olds, news, passing=ITEM_FAULTS)
        return [row["is_there"] for row in rows]

    async def _walk(self, call: Callable[[Walks], Call]) -> list[Record]:
        return await self._formed(lambda queries: call(queries.walks))

    async def _formed(self, call: Callable[[Queries], Call], passing: Faults = ()) -> list[Record]:
        """Run a statement of the table's form, or that of every table if `due_at` is gone.

        A table that was restored from an older dump has none. PostgreSQL finds that before it does anything.
        """
        if self._queries.is_due:
            query, values = call(self._queries)
            expected: Faults = (*passing, asyncpg.UndefinedColumnError)
            try:
                return await self._pool.fetch(query, *values, passing=expected)
            except asyncpg.UndefinedColumnError:
                self._use_form(False)
        query, values = call(self._queries)
        return await self._pool.fetch(query, *values, passing=passing)

    async def _start(self, sessions: Sequence[NewSession]) -> list[Session | MnemosyneError]:
        # Of several starts of one token, the first is made. A later one replaces it only if it has more
        # time: the first may be late, and its place must not fail a start that still has time.
        first_by_token: dict[str, NewSession] = {}
        for new in sessions:
            first = first_by_token.setdefault(new.access_token, new)
            if new.not_after_us > first.not_after_us:
                first_by_token[new.access_token] = new
        firsts = first_by_token.values()
        columns: list[object] = [
            [new.access_token.encode() for new in firsts],
            [new.refresh_token.encode() for new in firsts],
            [new.subject_id for new in firsts],
            [new.subject_client for new in firsts],
            [new.bag for new in firsts],
            [new.ttl_us for new in firsts],
            [new.not_after_us for new in firsts],
        ]
        rows = await self._formed(lambda queries: (queries.start, columns), ITEM_FAULTS)
        row_by_token = {row["access_token"].decode(): row for row in rows}
        for new in firsts:
            if row_by_token[new.access_token]["expire_at"] is not None:
                self._values.bags.add(new.access_token.encode(), new.bag)
        return [
            started(new, row_by_token[new.access_token])
            if first_by_token[new.access_token] is new
            else SessionAlreadyExists()
            for new in sessions
        ]

    async def _abandon(self, endings: Sequence[Abandonment]) -> list[bool | MnemosyneError]:
        # The latest limit: while one caller still has time, ending the session is what all of them want.
        latest_us: dict[bytes, int] = {}
        for ending in endings:
            token = ending.access_token.encode()
            self._values.bags.take(token)
            latest_us[token] = max(ending.not_after_us, latest_us.get(token, 0))
        rows = await self._pool.fetch(
            self._queries.abandon, list(latest_us), list(latest_us.values()), passing=ITEM_FAULTS
        )
        row_by_token = {row["access_token"]: row for row in rows}
        # Of several callers for one token, the first has ended the session; `pop` leaves the others none.
        return [abandoned(row_by_token.pop(ending.access_token.encode(), None)) for ending in endings]

    async def _touch(self, touches: Sequence[Touch]) -> list[bool | MnemosyneError]:
        # The latest expiry of a token is what its row would have after all touches one by one.
        latest: dict[bytes, int] = {}
        for touch in touches:
            token = touch.access_token.encode()
            latest[token] = max(touch.expires_at_us, latest.get(token, 0))
        rows = await self._pool.fetch(
            self._queries.touch, list(latest.keys()), list(latest.values()), passing=ITEM_FAULTS
        )
        found = {row["access_token"] for row in rows}
        return [touch.access_token.encode() in found for touch in touches]


def _encoded(tokens: Sequence[str] | set[str]) -> list[bytes]:
    return [token.encode() for token in tokens]


async def _isolating(
    run: Callable[[Sequence[Item]], Awaitable[list[Result | MnemosyneError]]], items: Sequence[Item]
) -> list[Result | MnemosyneError]:
    """Run a batch; if an item's fault fails the batch, run each item alone.

    Cost: one statement per item, over as many connections as are free. A caller can cause this by its own
    text, but only for the batch that it is in. Two items for one token then race like two callers.
    """
    try:
        return await run(items)
    except ITEM_FAULTS as exc:
        if len(items) == 1:
            return [_item_error(exc)]
        alone = [_isolating(run, [item]) for item in items]
        return [result for results in await asyncio.gather(*alone) for result in results]


def _not_utf8() -> CorruptSession:
    return CorruptSession("mnemosyned: storage: a field is not UTF-8")


def _item_error(exc: Exception) -> MnemosyneError:
    if isinstance(exc, asyncpg.DivisionByZeroError):
        # `queries._start`: made too late, and taken back.
        return DeadlineExceeded()
    # A lock not released within lock_timeout, or a key that another transaction has just taken: a retry
    # may succeed.
    if isinstance(exc, asyncpg.LockNotAvailableError | asyncpg.UniqueViolationError):
        return StorageUnavailable("mnemosyned: storage: the session is locked by another writer")
    if isinstance(exc, asyncpg.ProgramLimitExceededError):
        # An index entry of about 2,700 bytes at most, after compression: only PostgreSQL can tell.
        return InvalidArgument("mnemosyned: access_token is too long for PostgreSQL to index")
    if isinstance(exc, asyncpg.CheckViolationError):
        return InvalidArgument("mnemosyned: a constraint of the table refuses the session")
    if isinstance(exc, asyncpg.IntegrityConstraintViolationError):
        return StorageUnavailable("mnemosyned: storage: a constraint of the table refuses the session")
    return InvalidArgument("mnemosyned: a field holds text that PostgreSQL cannot store")
