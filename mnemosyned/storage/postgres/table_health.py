"""Whether calls can be answered from the table: asked every second or two (`storage/health.py`), and mended.

The question is the callers' own statements with no items. PostgreSQL finds the table, its columns, the key
for ON CONFLICT and the rights of the role, and refuses writes if it is read-only; no row is read or locked.

    start, abandon of nothing ── all right ──> has the catalog changed, or a call failed? ── no ──> healthy
         │                                         └── yes ──> the trial (`trial.py`) ── all right ──> healthy
         ├── no table  ──> 3 s later it is made again, empty, if the role may
         ├── read-only ──> `read_only.py`
         └── otherwise ──> the reason, with the SQL that mends it (`schema.py`)

- A table that is locked (ALTER TABLE, VACUUM FULL) is no reason: calls wait for it and fail by themselves.
- A dump is often restored by DROP and CREATE. The 3 s keep the daemon from making the table in between.
- When the catalog has changed, the form of the table is read again, and it is judged as at the start. What a
  restart would refuse or add is a warning.
- The answer has the numbers of the table and its file. They change when its rows are no longer those of
  before: dropped, restored, truncated. Then no copy of a session may be served (`StorageHealth`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, cast

from mnemosyned.errors import StorageUnavailable
from mnemosyned.sessions.store import FullStore, StorageRefused
from mnemosyned.storage.postgres import plain, schema, trial
from mnemosyned.storage.postgres.faults import REFUSALS, is_of_the_table
from mnemosyned.storage.postgres.queries import Query

if TYPE_CHECKING:
    from asyncpg import Record

    from mnemosyned.storage.postgres.pool import PostgresPool
    from mnemosyned.storage.postgres.schema import Table
    from mnemosyned.storage.postgres.table_facts import AnyConnection

log = logging.getLogger(__name__)

_MISSING: Final = frozenset({"42P01", "3F000"})
_MAKE_AGAIN_AFTER_S: Final = 3.0
# Of one look that does more than ask.
_TIMEOUT_S: Final = 10.0
# The table, its file, and all of the catalog by which it can change, as one text.
_STATE: Final = """
SELECT c.oid::bigint AS oid, pg_relation_filenode(c.oid)::bigint AS file, concat_ws(' ', c.oid, c.relkind,
  c.relpersistence, c.relrowsecurity, c.relforcerowsecurity, c.relreplident, c.relowner, c.relacl,
  ARRAY(SELECT concat_ws(' ', attname, atttypid, atttypmod, attnotnull, attgenerated, attcollation)
    FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 ORDER BY attnum),
  ARRAY(SELECT concat_ws(' ', tgname, tgenabled, p.oid, p.xmin)
    FROM pg_trigger JOIN pg_proc AS p ON p.oid = tgfoid WHERE tgrelid = c.oid ORDER BY pg_trigger.oid),
  ARRAY(SELECT concat_ws(' ', indexrelid, indisvalid)
    FROM pg_index WHERE indrelid = c.oid ORDER BY indexrelid),
  ARRAY(SELECT oid FROM pg_constraint WHERE c.oid IN (conrelid, confrelid) ORDER BY oid),
  ARRAY(SELECT concat_ws(' ', oid, xmin) FROM pg_policy WHERE polrelid = c.oid ORDER BY oid),
  ARRAY(SELECT concat_ws(' ', oid, ev_enabled)
    FROM pg_rewrite WHERE ev_class = c.oid ORDER BY oid)) AS catalog
FROM pg_class AS c WHERE c.oid = '{table}'::regclass
"""


# The catalog of a plain server (`kind.py`) says less.
_PLAIN_STATE: Final = "SELECT '{table}'::regclass::oid::bigint AS oid, NULL::bigint AS file, '' AS catalog"


class _UnderItsName:
    """Stands in for the pool: its statements are counted as those of the health check."""

    def __init__(self, pool: PostgresPool) -> None:
        self._pool = pool
        self.read_only = pool.read_only

    async def fetch(self, query: Query, *args: object, **passing: object) -> list[Record]:
        return await self._pool.fetch(Query("check", query.sql), *args, **passing)  # type: ignore[arg-type]


class TableHealth:
    """Asks for one table; `store_on` makes a store, and `look` reads which form the table has by now."""

    def __init__(
        self,
        pool: PostgresPool,
        table: Table,
        store_on: Callable[[PostgresPool, Table], FullStore],
        look: Callable[[AnyConnection], Awaitable[object]],
    ) -> None:
        self._pool = pool
        self._table = table
        self._store_on = store_on
        self._look = look
        self._store: FullStore = store_on(cast("PostgresPool", _UnderItsName(pool)), table)
        state = _PLAIN_STATE if pool.kind.is_plain else _STATE
        self._state = Query("check", state.format(table=table.sql.replace("'", "''")))
        self._catalog = ""
        self._missing_since_s: float | None = None
        self._warned = ""

    async def check(self) -> tuple[int, int | None]:
        """Return the numbers of the table and its file.

        Raises:
            StorageUnavailable: calls cannot be answered; its `detail` says why, for the log and readiness.
        """
        try:
            await self._store.start([])
            await self._store.abandon([])
            (row,) = await self._pool.fetch(self._state)
            has_changed = row["catalog"] != self._catalog
            if has_changed or self._pool.is_table_suspected:
                await self._try()
        except StorageUnavailable as exc:
            await self._explain(exc)
            raise
        self._missing_since_s = None
        self._pool.read_only.is_known = False
        if has_changed:
            await self._judge()
            self._catalog = row["catalog"]
        return row["oid"], row["file"]

    async def _try(self) -> None:
        try:
            async with self._own_connection() as connection:
                if not self._pool.kind.is_plain:
                    await self._look(connection)
                await trial.run(connection, self._table, self._store_on)
        except (StorageRefused, *REFUSALS) as exc:
            error = _unavailable(exc)
            error.detail = await self._reason() or error.detail
            raise error from exc
        self._pool.is_table_suspected = False

    async def _explain(self, exc: StorageUnavailable) -> None:
        """Give a failure the reason that the catalog knows, and make a missing table again."""
        cause = exc.__cause__
        if getattr(cause, "sqlstate", None) in _MISSING:
            await self._make_again(exc)
        elif is_of_the_table(cause):
            exc.detail = await self._reason() or exc.detail

    async def _make_again(self, exc: StorageUnavailable) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._missing_since_s is None:
            self._missing_since_s = now_s
        exc.detail, exc.hint = f"table {self._table.sql} is missing", ""
        if now_s - self._missing_since_s < _MAKE_AGAIN_AFTER_S:
            return
        try:
            async with self._own_connection() as connection:
                set_up = plain.set_up if self._pool.kind.is_plain else schema.set_up
                await set_up(connection, self._table)
        except (StorageRefused, *REFUSALS) as refusal:
            exc.detail += f", and cannot be made again: {' '.join(str(refusal).split())}"
        except StorageUnavailable as failure:
            exc.detail += f", and cannot be made again now: {failure.detail or failure}"
        else:
            log.error("table_made_again", extra={"table": self._table.sql, "sessions": "all are gone"})

    async def _reason(self) -> str:
        if self._pool.kind.is_plain:
            return ""
        try:
            async with self._own_connection() as connection:
                await schema.inspect(connection, self._table)
        except (StorageRefused, *REFUSALS) as exc:
            return str(exc)
        except StorageUnavailable:
            return ""
        return ""

    async def _judge(self) -> None:
        """Warn, once, of what a restart would refuse or add."""
        warning = await self._reason() or await self._lacking_indexes()
        if warning and warning != self._warned:
            log.warning("table_changed", extra={"reason": warning})
        self._warned = warning

    async def _lacking_indexes(self) -> str:
        try:
            async with self._own_connection() as connection:
                lacking = await schema.lacking_indexes(connection, self._table)
        except StorageUnavailable:
            return ""
        created = "; ".join(f"CREATE INDEX CONCURRENTLY ON {self._table.sql} {one}" for one in lacking)
        return f"table {self._table.sql} lacks indexes. This SQL mends it: {created}" if created else ""

    @asynccontextmanager
    async def _own_connection(self) -> AsyncIterator[AnyConnection]:
        try:
            async with asyncio.timeout(_TIMEOUT_S), self._pool.connection(passing=REFUSALS) as connection:
                yield connection
        except TimeoutError as exc:
            raise _unavailable(exc) from exc


def _unavailable(exc: BaseException) -> StorageUnavailable:
    error = StorageUnavailable("mnemosyned: storage: unavailable")
    error.detail = " ".join(str(exc).split()) or "no answer in time"
    return error
