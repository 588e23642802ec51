"""The table in PostgreSQL: created if it is missing, checked if it exists.

Set-up runs at the start of every node, and again after a failed start. It is one transaction under an
advisory lock, so that:

- many nodes may start at once on an empty database. CREATE TABLE IF NOT EXISTS alone is not safe for that:
  two transactions may both find nothing and collide in the system catalogue;
- a crash or an error half-way leaves nothing behind.

It adds what is missing and changes nothing else. A table of the Go daemon, which has the same columns and
indexes by other names, therefore opens in place. It is never rewritten, and both daemons may use it.

Versions. The comment on the table holds the version of its schema. A daemon refuses a table with a newer
version than its own. A table without this mark is version 1, which is what the Go daemon creates. To
change the schema:

1. If older daemons can use the changed table (one more index, a column that may be NULL), do not raise
   SCHEMA_VERSION.
2. Otherwise raise it, and add the step here, under the lock. Older nodes go on until they restart, so the
   step must suit them during a rolling update.

Columns are checked by name and type. Further columns are allowed if they have a default, since a start does
not fill them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mnemosyned.sessions.store import StorageRefused

if TYPE_CHECKING:
    from asyncpg import Connection, Record
    from asyncpg.pool import PoolConnectionProxy

# Raised only by a change that older daemons cannot work with.
SCHEMA_VERSION: Final = 1
# The index of a table with hundreds of millions of rows takes hours.
_SET_UP_TIMEOUT_S: Final = 6 * 3600.0
_VERSION_MARK: Final = "mnemosyned schema version "

_TYPE_BY_COLUMN: Final = {
    "access_token": "bytea",
    "refresh_token": "bytea",
    "subject_id": "text",
    "subject_client": "text",
    "bag": "bytea",
    "expire_at": "timestamptz",
}
# Columns that must lead some index, and the index to create otherwise. Cleanup and List go by expiry, Delete
# and List by the other two. Statements may not scan the table (`pool.py`), so a missing index is no mere
# loss of speed.
_INDEXED_COLUMNS: Final = {
    "expire_at": "(expire_at, access_token)",
    "refresh_token": "(refresh_token)",
    "subject_id": "(subject_id)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Where the sessions are. Both names are quoted, so upper case and any character keep their meaning."""

    schema: str
    name: str

    @property
    def sql(self) -> str:
        """The qualified, quoted name."""
        return f"{quoted(self.schema)}.{quoted(self.name)}"

    @property
    def advisory_key(self) -> int:
        """The key of the advisory lock for set-up and cleanup.

        A signed 64-bit hash of the table's name, since advisory locks have numbers. Other applications in
        the database choose theirs freely; a collision would only make set-up or cleanup wait.
        """
        digest = hashlib.blake2b(self.sql.encode(), digest_size=8, person=b"mnemosyned").digest()
        return int.from_bytes(digest, "big", signed=True)


def quoted(identifier: str) -> str:
    """Quote an SQL identifier."""
    return '"' + identifier.replace('"', '""') + '"'


async def set_up(connection: Connection[Record] | PoolConnectionProxy[Record], table: Table) -> None:
    """Make the table ready; a second run, or runs on many nodes at once, change nothing.

    It takes as long as the slowest index, at most 6 hours. Sessions cannot be written while an index is
    built: CREATE INDEX CONCURRENTLY cannot run in a transaction. Only a table with sessions and without
    one of the indexes is concerned.

    Raises:
        StorageRefused: the table has other columns, or a newer daemon's version.
    """
    async with connection.transaction():
        # An index of a large table takes longer than a statement may otherwise, and other nodes wait for
        # the advisory lock meanwhile. SET LOCAL ends with the transaction.
        await connection.execute("SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0")
        await connection.execute(
            "SELECT pg_advisory_xact_lock($1)", table.advisory_key, timeout=_SET_UP_TIMEOUT_S
        )
        if await _is_missing(connection, table):
            await _create(connection, table)
        await _check_columns(connection, table)
        await _check_version(connection, table)
        await _add_missing_indexes(connection, table)


async def _is_missing(connection: Connection[Record] | PoolConnectionProxy[Record], table: Table) -> bool:
    return await connection.fetchval("SELECT to_regclass($1) IS NULL", table.sql) is True


async def _create(connection: Connection[Record] | PoolConnectionProxy[Record], table: Table) -> None:
    # CREATE SCHEMA IF NOT EXISTS demands the right to create even if the schema exists, and a user may have
    # rights on the schema alone. IF NOT EXISTS remains for a schema that others create meanwhile.
    if await connection.fetchval("SELECT to_regnamespace($1) IS NULL", quoted(table.schema)):
        await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {quoted(table.schema)}")
    await connection.execute(
        f"CREATE TABLE {table.sql} ("
        "access_token BYTEA PRIMARY KEY, refresh_token BYTEA, subject_id TEXT NOT NULL, "
        "subject_client TEXT, bag BYTEA NOT NULL, expire_at TIMESTAMPTZ NOT NULL)"
    )
    await connection.execute(f"COMMENT ON TABLE {table.sql} IS '{_VERSION_MARK}{SCHEMA_VERSION}'")


async def _check_columns(connection: Connection[Record] | PoolConnectionProxy[Record], table: Table) -> None:
    rows = await connection.fetch(
        "SELECT attname::text AS name, format_type(atttypid, NULL) AS type FROM pg_attribute "
        "WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped",
        table.sql,
    )
    found = {row["name"]: row["type"].replace("timestamp with time zone", "timestamptz") for row in rows}
    for column, expected in _TYPE_BY_COLUMN.items():
        if found.get(column) != expected:
            raise StorageRefused(
                f"table {table.sql}: column {column} should be {expected}, "
                f"and is {found.get(column, 'missing')}"
            )


async def _check_version(connection: Connection[Record] | PoolConnectionProxy[Record], table: Table) -> None:
    comment = await connection.fetchval("SELECT obj_description($1::text::regclass, 'pg_class')", table.sql)
    version = (comment or "").removeprefix(_VERSION_MARK)
    # No mark, or a comment that an administrator wrote over it: version 1.
    if version.isdecimal() and int(version) > SCHEMA_VERSION:
        raise StorageRefused(
            f"table {table.sql} has schema version {version}; this mnemosyned knows {SCHEMA_VERSION}"
        )


async def _add_missing_indexes(
    connection: Connection[Record] | PoolConnectionProxy[Record], table: Table
) -> None:
    # By the first column and not by name: the Go daemon's indexes have other names and directions. An
    # invalid index (a CREATE INDEX CONCURRENTLY that failed) serves no statement.
    rows = await connection.fetch(
        "SELECT DISTINCT attname::text AS leading FROM pg_index "
        "JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0] "
        "WHERE indrelid = $1::text::regclass AND indisvalid",
        table.sql,
    )
    leading = {row["leading"] for row in rows}
    for column, columns in _INDEXED_COLUMNS.items():
        if column not in leading:
            await connection.execute(f"CREATE INDEX ON {table.sql} {columns}", timeout=_SET_UP_TIMEOUT_S)
