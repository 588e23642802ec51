"""Set-up on a server that is not PostgreSQL itself (`kind.py`): tables, indexes, and the store's identity.

    CREATE … IF NOT EXISTS ── collides with that of another node ──> once more
           └── done ──> the identity: a random one, of the node that was first

The table has no `due_at`: its statements are those of WalksByExpiry. A table that is there stays as it is,
and nothing looks into the catalog: the trial (`trial.py`) tells whether the statements work on it.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final

import asyncpg

from mnemosyned.storage.postgres import node_table
from mnemosyned.storage.postgres.repeats import ROLLED_BACK, Repeats

if TYPE_CHECKING:
    from mnemosyned.storage.postgres.schema import Table
    from mnemosyned.storage.postgres.table_facts import AnyConnection

# Two nodes have made the same thing at once.
_COLLIDED: Final = (
    *ROLLED_BACK,
    asyncpg.DuplicateTableError,
    asyncpg.DuplicateObjectError,
    asyncpg.DuplicateSchemaError,
    asyncpg.UniqueViolationError,
)
_SET_UP_S: Final = 60.0


async def set_up(connection: AnyConnection, table: Table) -> None:
    """Make what is missing; raises asyncpg's errors, such as that of a right that is missing."""
    repeats = Repeats(_SET_UP_S)
    while True:
        try:
            for statement in _statements(table):
                await connection.execute(statement, timeout=_SET_UP_S)
            await connection.execute(
                f"INSERT INTO {table.identity.sql} (id, identity) VALUES (1, $1) ON CONFLICT (id) DO NOTHING",  # noqa: S608  # quoted
                secrets.token_hex(16),
            )
        except _COLLIDED:
            if not await repeats.pause():
                raise
        else:
            return


def _statements(table: Table) -> list[str]:
    columns_sql = (
        "access_token BYTEA PRIMARY KEY, refresh_token BYTEA, subject_id TEXT NOT NULL, "
        "subject_client TEXT, bag BYTEA NOT NULL, expire_at TIMESTAMPTZ NOT NULL"
    )
    # Each commits by itself: not every such server changes its catalog within a transaction.
    return [
        f"CREATE SCHEMA IF NOT EXISTS {table.sql_schema}",
        f"CREATE TABLE IF NOT EXISTS {table.sql} ({columns_sql})",
        *(
            f"CREATE INDEX IF NOT EXISTS {table.index(columns)} ON {table.sql} ({', '.join(columns)})"
            for columns in (("expire_at", "access_token"), ("refresh_token",), ("subject_id",))
        ),
        f"CREATE TABLE IF NOT EXISTS {table.node.sql} ({node_table.COLUMNS_SQL})",
        f"CREATE TABLE IF NOT EXISTS {table.identity.sql} (id BIGINT PRIMARY KEY, identity TEXT NOT NULL)",
    ]
