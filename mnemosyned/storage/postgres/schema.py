"""The table in PostgreSQL: created if it is missing, checked if it exists.

Set-up runs at the start of every node, and again after a failed start. It is one transaction under an
advisory lock, so that:

- many nodes may start at once on an empty database. CREATE TABLE IF NOT EXISTS alone is not safe for that:
  two transactions may both find nothing and collide in the system catalogue;
- a crash or an error half-way leaves nothing behind.

A table that is there stays as it is here, so one of the Go daemon opens in place. `migration.py` changes it
while it is in use, and both daemons may use it then.

Versions. The comment on the table holds the version of its schema. A daemon refuses a table with a newer
version than its own. A table without this mark is version 1, which is what the Go daemon creates. To
change the schema:

1. If older daemons can use the changed table (one more index, a column that may be NULL), do not raise
   SCHEMA_VERSION.
2. Otherwise raise it, and add the step here, under the lock. Older nodes go on until they restart, so the
   step must suit them during a rolling update.

`table_check.py` says what the statements need of the table. One that lacks it is refused, with the SQL that
mends it: to change what people have made is theirs.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.postgres import node_table, rights, table_check, table_facts

if TYPE_CHECKING:
    from mnemosyned.storage.postgres.table_facts import AnyConnection

log = logging.getLogger(__name__)

# Raised only by a change that older daemons cannot work with.
SCHEMA_VERSION: Final = 1
# The index of a table with hundreds of millions of rows takes hours.
_SET_UP_TIMEOUT_S: Final = 6 * 3600.0
_VERSION_MARK: Final = "mnemosyned schema version "

# Columns that must lead some index. Cleanup and List go by the due time, Delete and List by the other two.
# Statements may not scan the table (`pool.py`), so a missing index is no mere loss of speed. No index may
# have `expire_at`: every touch would write all indexes.
INDEXED_COLUMNS: Final = ("due_at", "refresh_token", "subject_id")
# How full pages are filled, in percent. The rest is for touches, which need room on the page of the row.
FILLFACTOR: Final = 75


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
    def node(self) -> Table:
        """The table of the nodes, beside it (`node_table.py`)."""
        return Table(schema=self.schema, name=node_table.name_beside(self.name))

    @property
    def identity(self) -> Table:
        """The table with the store's identity, where the server has none (`plain.py`)."""
        return Table(schema=self.schema, name=node_table.name_beside(self.name, "identity"))

    def index(self, columns: tuple[str, ...]) -> str:
        """The quoted name of an index."""
        return quoted(node_table.name_beside(self.name, "_".join(columns)))

    @property
    def sql_schema(self) -> str:
        """The quoted name of the schema."""
        return quoted(self.schema)

    @property
    def advisory_key(self) -> int:
        """The key of the advisory lock for set-up, and for cleanup by daemons of former versions.

        A signed 64-bit hash of the table's name, since advisory locks have numbers. Other applications in
        the database choose theirs freely; a collision would only make set-up wait.
        """
        digest = hashlib.blake2b(self.sql.encode(), digest_size=8, person=b"mnemosyned").digest()
        return int.from_bytes(digest, "big", signed=True)

    @property
    def migration_key(self) -> int:
        """The key of the advisory lock for changes of a table in use, during which cleanup goes on."""
        return self.advisory_key ^ 1


def quoted(identifier: str) -> str:
    """Quote an SQL identifier."""
    return '"' + identifier.replace('"', '""') + '"'


async def set_up(connection: AnyConnection, table: Table) -> None:
    """Make the table ready; a second run, or runs on many nodes at once, change nothing.

    A partitioned table without an index gets it here, and cannot be written meanwhile. That takes at most 6
    hours: CREATE INDEX CONCURRENTLY is for plain tables.

    Raises:
        StorageRefused: a right is missing, the statements cannot work on the table, or a newer daemon has
            changed it.
    """
    async with connection.transaction():
        # An index of a large table takes longer than a statement may otherwise, and other nodes wait for
        # the advisory lock meanwhile. SET LOCAL ends with the transaction.
        await connection.execute("SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0")
        await connection.execute(
            "SELECT pg_advisory_xact_lock($1)", table.advisory_key, timeout=_SET_UP_TIMEOUT_S
        )
        await rights.check(connection, table)
        if await _is_missing(connection, table):
            await _create(connection, table)
        await node_table.set_up(connection, table)
        await inspect(connection, table)
        lacking = await lacking_indexes(connection, table)
        await rights.check_owner(connection, table, lacking)
        if await _is_partitioned(connection, table):
            for columns in lacking:
                await connection.execute(f"CREATE INDEX ON {table.sql} {columns}", timeout=_SET_UP_TIMEOUT_S)


async def inspect(connection: AnyConnection, table: Table) -> None:
    """Raise StorageRefused if a start would refuse the table. Changes nothing, and waits for nothing."""
    await rights.check(connection, table)
    await _check_version(connection, table)
    await _check_form(connection, table)


async def _is_missing(connection: AnyConnection, table: Table) -> bool:
    return await connection.fetchval("SELECT to_regclass($1) IS NULL", table.sql) is True


async def _is_partitioned(connection: AnyConnection, table: Table) -> bool:
    sql = "SELECT relkind = 'p' FROM pg_class WHERE oid = $1::text::regclass"
    return await connection.fetchval(sql, table.sql) is True


async def _create(connection: AnyConnection, table: Table) -> None:
    if table.schema.startswith("pg_") or table.schema == "information_schema":
        raise StorageRefused(f"flag -postgres.schema: {table.schema} is PostgreSQL's own; name another")
    renaming = await table_facts.type_of_name(connection, table.sql)
    if renaming is not None:
        raise StorageRefused(f"table {table.sql}: a type has its name. This SQL mends it: {renaming}")
    for other in await table_facts.others(connection, table.sql, table.name):
        # A dump that was restored into another schema, or a flag that was forgotten: the sessions are there.
        log.warning(
            "sessions_in_another_schema",
            extra={"made": table.sql, "found": other, "flags": "-postgres.schema, -postgres.table"},
        )
    # CREATE SCHEMA IF NOT EXISTS demands the right to create even if the schema exists, and a user may have
    # rights on the schema alone. IF NOT EXISTS remains for a schema that others create meanwhile.
    if await connection.fetchval("SELECT to_regnamespace($1) IS NULL", quoted(table.schema)):
        await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {quoted(table.schema)}")
    await connection.execute(
        f"CREATE TABLE {table.sql} ("
        "access_token BYTEA PRIMARY KEY, refresh_token BYTEA, subject_id TEXT NOT NULL, "
        "subject_client TEXT, bag BYTEA NOT NULL, expire_at TIMESTAMPTZ NOT NULL, "
        f"due_at TIMESTAMPTZ NOT NULL DEFAULT now()) WITH (fillfactor = {FILLFACTOR})"
    )
    for column in INDEXED_COLUMNS:
        await connection.execute(f"CREATE INDEX ON {table.sql} ({column})")
    await connection.execute(f"COMMENT ON TABLE {table.sql} IS '{_VERSION_MARK}{SCHEMA_VERSION}'")


async def _check_form(connection: AnyConnection, table: Table) -> None:
    """Raise StorageRefused if the statements cannot work on the table, with the SQL that mends it."""
    facts = await table_facts.read(connection, table.sql)
    if facts is None:
        raise StorageRefused(f"table {table.sql} is missing")
    faults = table_check.faults_of(facts)
    if not faults:
        return
    # Only now: it reads the whole table.
    if table_check.lacks_key(facts) and await table_facts.has_unusable_keys(connection, table.sql):
        faults = table_check.without_unusable_keys(facts, faults)
    raise StorageRefused(table_check.line_of(table.sql, faults))


async def trial_refused(connection: AnyConnection, table: Table, complaint: str) -> StorageRefused:
    """Return the refusal of a table on which the trial (`trial.py`) failed, most likely by its triggers."""
    facts = await table_facts.read(connection, table.sql)
    if facts is None or not facts.triggers:
        return StorageRefused(f"table {table.sql}: {complaint}")
    disabled = "; ".join(f"ALTER TABLE {table.sql} DISABLE TRIGGER {name}" for name in facts.triggers)
    names = ", ".join(facts.triggers)
    return StorageRefused(f"table {table.sql}: {complaint}; triggers: {names}. This SQL mends it: {disabled}")


async def _check_version(connection: AnyConnection, table: Table) -> None:
    comment = await connection.fetchval("SELECT obj_description($1::text::regclass, 'pg_class')", table.sql)
    version = (comment or "").removeprefix(_VERSION_MARK)
    # No mark, or a comment that an administrator wrote over it: version 1.
    if version.isdecimal() and int(version) > SCHEMA_VERSION:
        raise StorageRefused(
            f"table {table.sql} has schema version {version}; this mnemosyned knows {SCHEMA_VERSION}"
        )


async def lacking_indexes(connection: AnyConnection, table: Table) -> list[str]:
    """Return the columns of each index that no statement should be without, and that the table lacks."""
    # By the first column and not by name: the Go daemon's indexes have other names and directions. An
    # invalid index (a CREATE INDEX CONCURRENTLY that failed) serves no statement.
    rows = await connection.fetch(
        "SELECT DISTINCT attname::text AS leading FROM pg_index "
        "JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0] "
        "WHERE indrelid = $1::text::regclass AND indisvalid "
        # A column of others may have the name by chance.
        "AND (attname <> 'due_at' OR atttypid = 'timestamptz'::regtype)",
        table.sql,
    )
    leading = {row["leading"] for row in rows}
    columns = [f"({column})" for column in ("refresh_token", "subject_id") if column not in leading]
    if leading.isdisjoint({"due_at", "expire_at"}):
        # The index of the form that the table has by now.
        has_due_time = await connection.fetchval(
            "SELECT EXISTS (SELECT FROM pg_attribute WHERE attrelid = $1::text::regclass "
            "AND attname = 'due_at' AND atttypid = 'timestamptz'::regtype)",
            table.sql,
        )
        columns.insert(0, "(due_at)" if has_due_time else "(expire_at, access_token)")
    return columns
