"""The table of the nodes, beside that of the sessions: the statements for leases (`cluster/lease.py`).

    name        text  primary key   of the node
    instance    bigint              of one process
    number      bigint              of its last renewal
    ring        text                the fingerprint of the ring it routes by
    epoch       bigint              raised by each bar
    base        bigint              the epoch that the row was made with
    seen        bigint              the epoch for which the node has dropped its copies
    renewed_at  timestamptz         for people, and for the choice of who cleans up; no lease uses it

Each statement is a transaction of its own, on one row, so PostgreSQL's lock of the row makes it linearizable,
also behind a pooler. Commits wait for the disk as those of sessions do: after a crash no lease is older than
its node believes.

The other rows that a renewal returns are of the snapshot of its statement, which is taken after it was sent.
That is all that the rules need of them.

The identity has the start of the server and the number of the table. A copy of the server that was promoted
has another start, and so has the same server after a restart, which then counts as another store too: that
costs a second and a half without copies, and needs no right that a role does not have.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from operator import itemgetter
from typing import TYPE_CHECKING, Final

import asyncpg

from cluster.node_row import Barred, NodeRow, Renewal, Renewed
from mnemosyned.errors import StorageUnavailable
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.postgres.columns import Query
from mnemosyned.storage.postgres.faults import REFUSALS

if TYPE_CHECKING:
    from asyncpg import Record

    from mnemosyned.storage.postgres.pool import PostgresPool
    from mnemosyned.storage.postgres.schema import Table
    from mnemosyned.storage.postgres.table_facts import AnyConnection

log = logging.getLogger(__name__)

_RIGHTS: Final = ("SELECT", "INSERT", "UPDATE", "DELETE")
_COLUMNS: Final = "name, instance, number, ring, epoch, base, seen"
_MAKE_AGAIN_AFTER_S: Final = 3.0
# Each node reads all rows some times a second: by name, one by one, that was a tenth of what a renewal costs.
_node_of: Final = itemgetter(*NodeRow._fields)
# A lease must not depend on a statement that has no answer: a later one may have.
_TIMEOUT_S: Final = 1.0
# Each row is written some times a second. Half-filled pages keep the versions of a row on one page (HOT).
COLUMNS_SQL: Final = (
    "name TEXT PRIMARY KEY, instance BIGINT NOT NULL, number BIGINT NOT NULL, ring TEXT NOT NULL, "
    "epoch BIGINT NOT NULL, base BIGINT NOT NULL, seen BIGINT NOT NULL, renewed_at TIMESTAMPTZ NOT NULL"
)
_FORM: Final = f"{COLUMNS_SQL}) WITH (fillfactor = 50"


class NodeTable:
    """The rows of nodes (LeaseStore), in one table of their own."""

    def __init__(self, pool: PostgresPool, table: Table) -> None:
        self._pool = pool
        self._table = table
        self._name = ""  # of this node, once it has renewed
        self._missing_since_s: float | None = None
        self.use(is_plain=False)

    def use(self, *, is_plain: bool) -> None:
        """Use the statements of this kind of server (`kind.py`)."""
        node = self._table.node.sql
        literal = node.replace("'", "''")
        start = "pg_postmaster_start_time()"
        if is_plain:
            # Its servers start one by one, and a connection may be to any of them.
            start = f"(SELECT identity FROM {self._table.identity.sql} WHERE id = 1)"
        identity = f"concat_ws('/', {start}, '{literal}'::regclass::oid::text)"
        self._renew = Query(
            "renew",
            f"WITH renewed AS (INSERT INTO {node} AS n ({_COLUMNS}, renewed_at) "
            "VALUES ($1::text, $2::bigint, $3::bigint, $4::text, $5::bigint + 1, $5::bigint + 1, $5::bigint, "
            "clock_timestamp()) ON CONFLICT (name) DO UPDATE SET instance = excluded.instance, "
            "number = excluded.number, ring = excluded.ring, seen = excluded.seen, "
            "epoch = CASE WHEN excluded.seen > n.epoch THEN excluded.seen + 1 ELSE n.epoch END, "
            "renewed_at = clock_timestamp() "
            "WHERE n.instance = excluded.instance AND n.number < excluded.number "
            f"OR n.instance = $6::bigint AND n.number = $7::bigint RETURNING {_COLUMNS}, renewed_at), "
            f"found AS (SELECT {_COLUMNS}, renewed_at FROM renewed UNION ALL "
            f"SELECT {_COLUMNS}, renewed_at FROM {node} "
            "WHERE name <> $1 OR NOT EXISTS (SELECT 1 FROM renewed)) "
            f"SELECT {_COLUMNS}, (extract(epoch FROM now() - renewed_at) * 1000000)::bigint AS age_us, "
            f"clock_timestamp() AS now, {identity} AS identity FROM found",
        )
        self._bar = Query(
            "bar",
            f"UPDATE {node} SET epoch = epoch + 1 WHERE name = $1 "
            f"RETURNING epoch, instance, number, {identity} AS identity",
        )
        self._resign = Query(
            "resign",
            f"DELETE FROM {node} WHERE name = $1 AND instance = $2 AND number = coalesce($3, number)",
        )
        # Of the nodes that have renewed lately, by the clock of the server, each for five minutes: one that
        # is alive and fails to clean up is not asked for long.
        self._cleaner = Query(
            "cleaner",
            f"SELECT COALESCE((SELECT name FROM {node} "
            "WHERE renewed_at > clock_timestamp() - interval '2 seconds' "
            "ORDER BY md5(name || floor(extract(epoch FROM now()) / 300)::bigint::text), name LIMIT 1), "
            "$1::text) = $1::text AS is_it",
        )

    async def renew(self, renewal: Renewal) -> Renewed:
        """See LeaseStore."""
        self._name = renewal.name
        arguments = (*renewal[:5], *renewal.replaces)
        try:
            rows = await self._fetch(self._renew, *arguments)
        except StorageUnavailable as exc:
            if not isinstance(exc.__cause__, asyncpg.UndefinedTableError):
                raise
            await self._make_again(exc)
            rows = await self._fetch(self._renew, *arguments)
        self._missing_since_s = None
        nodes = tuple(NodeRow._make(_node_of(row)) for row in rows)
        return Renewed(nodes, rows[0]["identity"], rows[0]["now"])

    async def bar(self, name: str) -> Barred | None:
        """See LeaseStore."""
        rows = await self._fetch(self._bar, name)
        return Barred(*rows[0].values()) if rows else None

    async def resign(self, row: tuple[str, int, int | None]) -> None:
        """See LeaseStore."""
        await self._fetch(self._resign, *row)

    async def is_cleaner(self) -> bool:
        """Tell whether this node is the one that cleans up now; so is any where no node has a lease."""
        (row,) = await self._fetch(self._cleaner, self._name)
        return bool(row["is_it"])

    async def _fetch(self, query: Query, *args: object) -> list[Record]:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                return await self._pool.fetch(query, *args, is_urgent=True)
        except TimeoutError:
            self._pool.doubt()
            error = StorageUnavailable("mnemosyned: storage: no answer in time")
            error.detail = f"{query.name}: no answer in {_TIMEOUT_S:g} s"
            raise error from None

    async def _make_again(self, exc: StorageUnavailable) -> None:
        """Make a table that somebody has dropped, unless the whole schema is being restored just now."""
        now_s = asyncio.get_running_loop().time()
        if self._missing_since_s is None:
            self._missing_since_s = now_s
        if now_s - self._missing_since_s < _MAKE_AGAIN_AFTER_S:
            raise exc
        try:
            async with self._pool.connection(passing=REFUSALS) as connection, connection.transaction():
                if self._pool.kind.is_plain:
                    await connection.execute(
                        f"CREATE TABLE IF NOT EXISTS {self._table.node.sql} ({COLUMNS_SQL})"
                    )
                else:
                    await connection.execute("SELECT pg_advisory_xact_lock($1)", self._table.advisory_key)
                    await set_up(connection, self._table)
        except (StorageRefused, *REFUSALS) as refusal:
            exc.detail = " ".join(str(refusal).split())
            raise exc from refusal
        log.error("table_made_again", extra={"table": self._table.node.sql})


async def set_up(connection: AnyConnection, table: Table) -> None:
    """Make the table if it is missing; the caller holds the lock of set-up, in a transaction.

    Raises:
        StorageRefused: the role may not make it, or may not use it; the text has the SQL.
    """
    node = table.node
    row = await connection.fetchrow(
        "SELECT pg_catalog.quote_ident(current_user) AS role, to_regclass($1) IS NOT NULL AS is_there, "
        "pg_catalog.has_schema_privilege($2, 'CREATE') AS may_create, "
        "ARRAY(SELECT one FROM pg_catalog.unnest($3::text[]) AS one WHERE to_regclass($1) IS NOT NULL "
        "AND NOT pg_catalog.has_table_privilege(to_regclass($1)::oid, one)) AS lacking",
        node.sql,
        table.schema,
        list(_RIGHTS),
    )
    assert row is not None
    role, grant = row["role"], f"GRANT {', '.join(_RIGHTS)} ON TABLE {node.sql} TO {row['role']}"
    if row["lacking"]:
        raise StorageRefused(
            f"PostgreSQL: user {role} lacks {', '.join(row['lacking'])} on table {node.sql}. "
            f"This SQL mends it: {grant}"
        )
    if row["is_there"]:
        return
    if not row["may_create"]:
        raise StorageRefused(
            f"table {node.sql} is missing, and user {role} may not make it. "
            f"This SQL mends it: CREATE TABLE {node.sql} ({_FORM}); {grant}"
        )
    await connection.execute(f"CREATE TABLE {node.sql} ({_FORM})")


def name_beside(name: str, what: str = "node") -> str:
    """Return a name that is made of the table's, such as that of the nodes; names may have 63 bytes."""
    beside = f"{name}_{what}"
    if len(beside.encode()) <= _MAX_NAME_BYTES:
        return beside
    digest = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
    kept = _MAX_NAME_BYTES - len(f"_{digest}_{what}")
    return f"{name.encode()[: min(kept, _KEPT_BYTES)].decode(errors='ignore')}_{digest}_{what}"


_MAX_NAME_BYTES: Final = 63
_KEPT_BYTES: Final = 40
