"""The table in PostgreSQL: created where missing, checked where the Go daemon made it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mnemosyned.sessions.store import StorageRefused

if TYPE_CHECKING:
    from asyncpg import Connection, Record
    from asyncpg.pool import PoolConnectionProxy

# Raise it when a change to the table needs a step that older daemons must not meet.
SCHEMA_VERSION: Final = 1
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
# What must lead some index: cleanup and List go by expiry, Delete and List by the other two.
_INDEXED_COLUMNS: Final = {
    "expire_at": "(expire_at, access_token)",
    "refresh_token": "(refresh_token)",
    "subject_id": "(subject_id)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Where the sessions are; both names are used as they are, quoted."""

    schema: str
    name: str

    @property
    def sql(self) -> str:
        """The qualified, quoted name."""
        return f"{quoted(self.schema)}.{quoted(self.name)}"

    @property
    def advisory_key(self) -> int:
        """The key of the advisory lock for set-up and cleanup: a signed 64-bit hash of the name."""
        digest = hashlib.blake2b(self.sql.encode(), digest_size=8, person=b"mnemosyned").digest()
        return int.from_bytes(digest, "big", signed=True)


def quoted(identifier: str) -> str:
    """Quote an SQL identifier."""
    return '"' + identifier.replace('"', '""') + '"'


async def set_up(connection: Connection[Record] | PoolConnectionProxy[Record], table: Table) -> None:
    """Make the table ready; running it again, or on many nodes at once, changes nothing.

    Raises:
        StorageRefused: the table has other columns, or a newer daemon's version.
    """
    async with connection.transaction():
        # An index of a large table takes longer than a statement may otherwise; other nodes wait for it.
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
    # CREATE SCHEMA IF NOT EXISTS demands the right to create even where nothing is missing.
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
    # A table of the Go daemon has no mark and is version 1 as it stands.
    if version.isdecimal() and int(version) > SCHEMA_VERSION:
        raise StorageRefused(
            f"table {table.sql} has schema version {version}; this mnemosyned knows {SCHEMA_VERSION}"
        )


async def _add_missing_indexes(
    connection: Connection[Record] | PoolConnectionProxy[Record], table: Table
) -> None:
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
