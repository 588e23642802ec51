"""Which rights this role lacks, and the GRANT statements that give them.

    for running   USAGE on the schema; SELECT, INSERT, UPDATE, DELETE on the table
    for set-up    CREATE on the database if the schema is missing, CREATE on the schema if the table is;
                  ownership of the table if an index is

docs/storage.md has the same as SQL. The check comes before everything else at a start: PostgreSQL's own
errors name the object, but neither the right nor the role.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mnemosyned.sessions.store import StorageRefused

if TYPE_CHECKING:
    from mnemosyned.storage.postgres.schema import Table
    from mnemosyned.storage.postgres.table_facts import AnyConnection

RUNNING: Final = ("SELECT", "INSERT", "UPDATE", "DELETE")

# The table is looked up in the catalog: by its name, PostgreSQL would demand USAGE of the schema.
_RIGHTS: Final = """
SELECT pg_catalog.quote_ident(current_user) AS role,
  pg_catalog.quote_ident(pg_catalog.current_database()) AS database,
  pg_catalog.has_database_privilege(pg_catalog.current_database(), 'CREATE') AS may_create_schema,
  n.oid IS NOT NULL AS has_schema, c.oid IS NOT NULL AS has_table,
  pg_catalog.has_schema_privilege(n.oid, 'USAGE') AS may_use, pg_catalog.has_schema_privilege(n.oid, 'CREATE')
    AS may_create_table,
  ARRAY(SELECT one FROM pg_catalog.unnest($3::text[]) AS one
    WHERE NOT pg_catalog.has_table_privilege(c.oid, one)) AS lacking
FROM (SELECT) AS nothing
LEFT JOIN pg_catalog.pg_namespace AS n ON nspname = $1
LEFT JOIN pg_catalog.pg_class AS c ON c.relnamespace = n.oid AND relname = $2
"""


async def check(connection: AnyConnection, table: Table) -> None:
    """Raise StorageRefused if the role lacks a right; the text names it, and the SQL that grants it."""
    row = await connection.fetchrow(_RIGHTS, table.schema, table.name, list(RUNNING))
    assert row is not None
    role = row["role"]
    lacking: list[tuple[str, str, str]] = []  # right, kind of object, object
    if not row["has_schema"]:
        if not row["may_create_schema"]:
            lacking.append(("CREATE", "DATABASE", row["database"]))
    elif not row["may_use"]:
        lacking.append(("USAGE", "SCHEMA", table.sql_schema))
    if row["has_schema"] and not row["has_table"] and not row["may_create_table"]:
        lacking.append(("CREATE", "SCHEMA", table.sql_schema))
    if row["has_table"] and row["lacking"]:
        lacking.append((", ".join(row["lacking"]), "TABLE", table.sql))
    if lacking:
        whats = "; ".join(f"{right} on {kind.lower()} {name}" for right, kind, name in lacking)
        grants = "; ".join(f"GRANT {right} ON {kind} {name} TO {role}" for right, kind, name in lacking)
        raise StorageRefused(f"PostgreSQL: user {role} lacks {whats}. This SQL mends it: {grants}")


async def check_owner(connection: AnyConnection, table: Table, lacking_indexes: list[str]) -> None:
    """Raise StorageRefused if indexes are to be made, and the role may not: only the owner of a table may."""
    row = await connection.fetchrow(
        "SELECT pg_catalog.quote_ident(current_user) AS role, "
        "pg_catalog.pg_has_role(relowner, 'USAGE') AS is_owner "
        "FROM pg_catalog.pg_class WHERE oid = $1::text::pg_catalog.regclass",
        table.sql,
    )
    assert row is not None
    if lacking_indexes and not row["is_owner"]:
        created = "; ".join(f"CREATE INDEX ON {table.sql} {columns}" for columns in lacking_indexes)
        raise StorageRefused(
            f"table {table.sql}: indexes are missing, and user {row['role']} is not its owner, who may make "
            f"them. This SQL mends it: {created}"
        )
