"""Gives a table that others made the form in which touches are cheap (`walks.py`), while it is in use.

    read the catalog ──> Facts ──> steps ──> the first one is run ──> read again … until no step is left

Every step is a statement of its own, and leaves a table that every daemon can use: this one, one of a former
version, and the Go daemon. So an interruption at any point needs no repair but the next round.

    step                          lock                     what others notice
    ADD COLUMN due_at             ACCESS EXCLUSIVE         some ms: neither rewrites nor reads the table. It
                                                           gives up after 0.3 s of waiting, and tries again
    SET (fillfactor)              SHARE UPDATE EXCLUSIVE   nothing
    DROP an invalid INDEX         SHARE UPDATE EXCLUSIVE   nothing; it is what an interrupted build leaves
    CREATE INDEX CONCURRENTLY     SHARE UPDATE EXCLUSIVE   load; hours for hundreds of millions of rows
    DROP the INDEX on expire_at   SHARE UPDATE EXCLUSIVE   former versions clean up and list slowly

One node at a time runs steps, under an advisory lock of its session. The other nodes ask for the lock without
waiting: a statement that waits has a snapshot, for whose end CREATE INDEX CONCURRENTLY would wait.

Which form the table has is read once a minute for as long as the daemon runs, and when the health check finds
that the catalog has changed. So each node notices what another node or a person has done. A daemon of a
former version makes the index on expire_at again when it starts, and the next round drops it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn

import asyncpg

from aio.tasks import Tasks
from mnemosyned.errors import StorageUnavailable
from mnemosyned.storage.postgres.schema import FILLFACTOR, INDEXED_COLUMNS, Table

if TYPE_CHECKING:
    from asyncpg import Record
    from asyncpg.pool import PoolConnectionProxy

    from mnemosyned.storage.postgres.pool import PostgresPool
    from mnemosyned.storage.postgres.table_facts import AnyConnection

log = logging.getLogger(__name__)

# How long a start waits for the change of a table, which goes on in the background.
_START_WAIT_S: Final = 2.0
_LOOK_AGAIN_S: Final = 60.0
# While another node runs the steps, or a long transaction keeps the table locked.
_TRY_AGAIN_S: Final = 1.0
_STEP_TIMEOUT_S: Final = 24 * 3600.0
# Whoever wants the table queues behind a waiting ALTER TABLE.
_EXCLUSIVE_WAIT_MS: Final = 300
# The indexes that daemons make, by their columns. Others belong to those who made them.
_OUR_INDEXES: Final = frozenset({("due_at",), ("refresh_token",), ("subject_id",)})
_FORMER_INDEXES: Final = frozenset({("expire_at",), ("expire_at", "access_token")})

_READ_FACTS: Final = (
    "SELECT relkind = 'r' AS is_plain, "
    "EXISTS (SELECT FROM unnest(reloptions) AS one WHERE one LIKE 'fillfactor=%') AS has_fillfactor, "
    "(SELECT format_type(atttypid, NULL) FROM pg_attribute WHERE attrelid = pg_class.oid "
    "AND attname = 'due_at' AND NOT attisdropped) AS due_type, "
    "COALESCE((SELECT atthasdef AND attgenerated = '' FROM pg_attribute WHERE attrelid = pg_class.oid "
    "AND attname = 'due_at' AND NOT attisdropped), false) AS has_default, "
    "EXISTS (SELECT FROM pg_stat_progress_create_index WHERE relid = pg_class.oid) AS is_building "
    "FROM pg_class WHERE oid = to_regclass($1)"
)
_READ_INDEXES: Final = (
    "SELECT format('%I.%I', nspname, relname) AS name, indisvalid AS is_valid, "
    "NOT indisunique AND indpred IS NULL AND amname = 'btree' AS is_simple, "
    "ARRAY(SELECT COALESCE(attname::text, '') FROM unnest(indkey) WITH ORDINALITY AS key (number, at) "
    "LEFT JOIN pg_attribute ON attrelid = indrelid AND attnum = number ORDER BY at) AS columns "
    "FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid JOIN pg_am ON pg_am.oid = relam "
    "JOIN pg_namespace ON pg_namespace.oid = relnamespace "
    "WHERE indrelid = to_regclass($1) ORDER BY relname"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """An index of the table; a column that is an expression has no name."""

    name: str
    columns: tuple[str, ...]
    is_valid: bool
    is_simple: bool  # a B-tree of all rows that is not unique


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the catalog says of the table."""

    is_plain: bool  # no partitioned table, which cannot be changed in these steps
    has_fillfactor: bool
    due_type: str | None  # of the column `due_at`
    has_default: bool
    is_building: bool  # somebody builds an index right now
    indexes: tuple[Index, ...]

    @property
    def is_due(self) -> bool:
        """Whether the statements may use `due_at`."""
        is_kept = self.due_type == "timestamp with time zone" and self.has_default
        return is_kept and any(index.is_valid and index.columns[0] == "due_at" for index in self.indexes)


_NO_TABLE: Final = Facts(
    is_plain=False, has_fillfactor=False, due_type=None, has_default=False, is_building=False, indexes=()
)


@dataclass(frozen=True, slots=True)
class Step:
    """A statement that brings the table nearer to its form."""

    sql: str
    is_exclusive: bool = False  # it locks the table against everyone


def steps(facts: Facts, table: Table) -> list[Step]:
    """Return what is left to do, in its sequence; nothing if the table must stay as it is. Pure."""
    if not facts.is_plain or facts.due_type not in {None, "timestamp with time zone"}:
        return []
    left: list[Step] = []
    if facts.due_type is None:
        column = "due_at timestamptz NOT NULL DEFAULT now()"
        left.append(Step(f"ALTER TABLE {table.sql} ADD COLUMN IF NOT EXISTS {column}", is_exclusive=True))
    elif not facts.has_default:
        left.append(Step(f"ALTER TABLE {table.sql} ALTER COLUMN due_at SET DEFAULT now()", is_exclusive=True))
    if not facts.has_fillfactor:
        left.append(Step(f"ALTER TABLE {table.sql} SET (fillfactor = {FILLFACTOR})"))
    valid = {index.columns[0] for index in facts.indexes if index.is_valid and index.is_simple}
    dropped = [index for index in facts.indexes if _is_useless(index)]
    left += [_drop(index) for index in dropped if not index.is_valid]
    left += [
        Step(f"CREATE INDEX CONCURRENTLY ON {table.sql} ({column})")
        for column in INDEXED_COLUMNS
        if column not in valid
    ]
    return left + [_drop(index) for index in dropped if index.is_valid]


def _drop(index: Index) -> Step:
    return Step(f"DROP INDEX CONCURRENTLY IF EXISTS {index.name}")


def _is_useless(index: Index) -> bool:
    if not index.is_simple:
        return False
    return index.columns in _FORMER_INDEXES or (index.columns in _OUR_INDEXES and not index.is_valid)


class Migration:
    """Runs the steps and tells which form the table has, from `start` to `close`."""

    def __init__(self, pool: PostgresPool, table: Table, use_form: Callable[[bool], None]) -> None:
        """`use_form` is told whether the statements may use `due_at`."""
        self._pool = pool
        self._table = table
        self._use_form = use_form
        self._told: set[str] = set()
        self._tasks = Tasks("migration", max_tasks=1)

    async def start(self) -> None:
        """Begin, and wait a little: most tables are as they should be, or small."""
        has_looked = asyncio.Event()
        self._tasks = Tasks("migration", max_tasks=1)
        self._tasks.spawn(self._run_rounds(has_looked))
        with suppress(TimeoutError):
            await asyncio.wait_for(has_looked.wait(), _START_WAIT_S)

    async def close(self) -> None:
        """Stop. A step under way is cancelled; the next start begins with it."""
        await self._tasks.close()

    async def _run_rounds(self, has_looked: asyncio.Event) -> NoReturn:
        while True:
            try:
                pause_s = await self._round()
            except (asyncpg.InsufficientPrivilegeError, asyncpg.ReadOnlySQLTransactionError):
                pause_s = _LOOK_AGAIN_S
            except asyncpg.LockNotAvailableError:
                pause_s = _TRY_AGAIN_S
            except (StorageUnavailable, asyncpg.PostgresError) as exc:
                pause_s = _LOOK_AGAIN_S
                error = getattr(exc, "sqlstate", None) or type(exc).__name__
                self._tell_once("migration_failed", error=error)
            has_looked.set()
            await asyncio.sleep(pause_s)

    async def _round(self) -> float:
        """Run steps until none is left; return after how many seconds to look again."""
        async with self._pool.connection(passing=(asyncpg.PostgresError,)) as connection:
            facts = await self.look(connection)
            left = steps(facts, self._table)
            if not left:
                return _LOOK_AGAIN_S
            if facts.is_building or not await connection.fetchval(
                "SELECT pg_try_advisory_lock($1)", self._table.migration_key
            ):
                return _TRY_AGAIN_S
            try:
                await self._run(connection, left)
            finally:
                # With its time-outs and its lock, which end with it.
                connection.terminate()
        return _LOOK_AGAIN_S

    async def _run(self, connection: PoolConnectionProxy[Record], left: list[Step]) -> None:
        await connection.execute("SET statement_timeout = 0")
        while left:
            step = left[0]
            try:
                wait_ms = _EXCLUSIVE_WAIT_MS if step.is_exclusive else 0
                await connection.execute(f"SET lock_timeout = {wait_ms}")
                await connection.execute(step.sql, timeout=_STEP_TIMEOUT_S)
            except asyncpg.InsufficientPrivilegeError:
                sql = "; ".join(one.sql for one in left)
                self._tell_once("migration_needs_rights", table=self._table.sql, sql=sql)
                raise
            except asyncpg.LockNotAvailableError:
                self._tell_once("migration_waits", table=self._table.sql, sql=step.sql)
                raise
            log.info("table_migrated", extra={"sql": step.sql})
            left = steps(await self.look(connection), self._table)

    async def look(self, connection: AnyConnection) -> Facts:
        """Read which form the table has, and pass it on."""
        row = await connection.fetchrow(_READ_FACTS, self._table.sql)
        if row is None:
            # Dropped meanwhile: there is nothing to change.
            return _NO_TABLE
        rows = await connection.fetch(_READ_INDEXES, self._table.sql)
        indexes = tuple(Index(**{**one, "columns": tuple(one["columns"])}) for one in rows)
        facts = Facts(**row, indexes=indexes)
        self._use_form(facts.is_due)
        for index in indexes:
            if index.columns[0] == "expire_at" and not _is_useless(index):
                self._tell_once("touches_are_costly", index=index.name, sql=f"DROP INDEX {index.name}")
        return facts

    def _tell_once(self, event: str, **extra: str) -> None:
        if event not in self._told:
            self._told.add(event)
            log.warning(event, extra=extra)
