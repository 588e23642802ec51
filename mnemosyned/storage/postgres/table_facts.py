"""What PostgreSQL's catalog says of the table: read here, judged by `table_check.py`.

Nothing here reads the table itself or waits for its lock, except `has_unusable_keys`. All names are qualified
by `pg_catalog`, since an address may set another `search_path`. All columns exist in PostgreSQL 12 already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from asyncpg import Connection, Record
    from asyncpg.pool import PoolConnectionProxy

    AnyConnection = Connection[Record] | PoolConnectionProxy[Record]

# Deleting duplicates needs an answer, but not at the price of a start that takes an hour.
_KEYS_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column: its type without length, and how a row that does not name it gets a value."""

    name: str
    type: str
    has_length: bool  # as in varchar(n)
    is_not_null: bool
    default: str | None  # as SQL
    is_identity: bool
    generated: str  # "s" stored, "v" virtual, "" not
    is_deterministic: bool  # texts that differ in bytes are never equal


@dataclass(frozen=True, slots=True, kw_only=True)
class UniqueIndex:
    """A unique index or an exclusion constraint; `keys` has None for an expression."""

    name: str  # qualified, as SQL
    constraint: str | None  # whose index it is, as SQL
    keys: tuple[str | None, ...]
    is_primary: bool
    is_valid: bool
    is_partial: bool
    is_immediate: bool
    is_exclusion: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """A CHECK or FOREIGN KEY; all names are SQL."""

    name: str
    table: str  # whose constraint it is: the table of sessions, or one that refers to it
    kind: str  # "c" check, "f" foreign key
    columns: frozenset[str]
    is_referring: bool  # another table refers to the sessions
    keeps_rows: bool  # a referred row cannot be deleted


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that `table_check.py` judges."""

    table: str  # qualified, as SQL
    schema: str  # as SQL
    name: str
    kind: str  # pg_class.relkind
    persistence: str  # pg_class.relpersistence
    role: str  # as SQL
    has_row_security: bool  # and it holds for this role
    columns: dict[str, Column]
    unique_indexes: tuple[UniqueIndex, ...]
    constraints: tuple[Constraint, ...]
    rules: tuple[str, ...]  # as SQL
    triggers: tuple[str, ...]  # enabled ones, as SQL
    children: tuple[str, ...]  # tables that inherit, as SQL
    parent: str  # of a partition, as SQL
    free_name: str  # what it could be renamed to
    has_gap: bool  # partitioned, and some token has no partition


_RELATION: Final = """
SELECT c.oid, c.relname::text AS name, c.relkind::text AS kind, c.relpersistence::text AS persistence,
  pg_catalog.quote_ident(n.nspname) AS schema, pg_catalog.quote_ident(current_user) AS role,
  CASE WHEN c.relkind IN ('r', 'p') THEN pg_catalog.row_security_active(c.oid) ELSE false END
    AND NOT EXISTS (
      SELECT FROM pg_catalog.pg_policy WHERE polrelid = c.oid AND polpermissive AND polcmd = '*'
        AND pg_catalog.pg_get_expr(polqual, polrelid) = 'true'
        AND COALESCE(pg_catalog.pg_get_expr(polwithcheck, polrelid), 'true') = 'true'
        AND (0::oid = ANY(polroles) OR (SELECT oid FROM pg_catalog.pg_roles WHERE rolname = current_user)
          = ANY(polroles))
        AND NOT EXISTS (SELECT FROM pg_catalog.pg_policy WHERE polrelid = c.oid AND NOT polpermissive)
    ) AS has_row_security,
  ARRAY(SELECT pg_catalog.quote_ident(rulename) FROM pg_catalog.pg_rewrite
    WHERE ev_class = c.oid AND rulename <> '_RETURN' AND ev_enabled <> 'D' ORDER BY rulename) AS rules,
  ARRAY(SELECT pg_catalog.quote_ident(tgname) FROM pg_catalog.pg_trigger
    WHERE tgrelid = c.oid AND NOT tgisinternal AND tgenabled <> 'D' ORDER BY tgname) AS triggers,
  ARRAY(SELECT pg_catalog.quote_ident(cn.nspname) || '.' || pg_catalog.quote_ident(child.relname)
    FROM pg_catalog.pg_inherits JOIN pg_catalog.pg_class AS child ON child.oid = inhrelid
    JOIN pg_catalog.pg_namespace AS cn ON cn.oid = child.relnamespace
    WHERE inhparent = c.oid AND NOT child.relispartition ORDER BY 1) AS children,
  COALESCE((SELECT pg_catalog.quote_ident(pn.nspname) || '.' || pg_catalog.quote_ident(parent.relname)
    FROM pg_catalog.pg_inherits JOIN pg_catalog.pg_class AS parent ON parent.oid = inhparent
    JOIN pg_catalog.pg_namespace AS pn ON pn.oid = parent.relnamespace
    WHERE inhrelid = c.oid AND c.relispartition), '') AS parent,
  (SELECT candidate FROM pg_catalog.generate_series(1, 1000) AS number,
    LATERAL (SELECT pg_catalog.quote_ident(pg_catalog.left(c.relname::text, 12) || '_old' || number))
      AS one(candidate)
    WHERE pg_catalog.to_regclass(pg_catalog.quote_ident(n.nspname) || '.' || candidate) IS NULL
      AND pg_catalog.to_regtype(pg_catalog.quote_ident(n.nspname) || '.' || candidate) IS NULL
    ORDER BY number LIMIT 1) AS free_name
FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.oid = pg_catalog.to_regclass($1)
"""

_COLUMNS: Final = """
SELECT attname::text AS name, pg_catalog.format_type(atttypid, NULL) AS type, attnotnull AS is_not_null,
  atttypmod >= 0 AS has_length, attgenerated::text AS generated,
  CASE WHEN attgenerated = '' THEN COALESCE(pg_catalog.pg_get_expr(adbin, adrelid), t.typdefault) END
    AS "default",
  attidentity <> '' AS is_identity, COALESCE(collisdeterministic, true) AS is_deterministic
FROM pg_catalog.pg_attribute AS a JOIN pg_catalog.pg_type AS t ON t.oid = atttypid
LEFT JOIN pg_catalog.pg_attrdef ON adrelid = attrelid AND adnum = attnum
LEFT JOIN pg_catalog.pg_collation AS k ON k.oid = attcollation
WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped ORDER BY attnum
"""

_UNIQUE_INDEXES: Final = """
SELECT pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname) AS name,
  pg_catalog.quote_ident(conname) AS constraint, indisprimary AS is_primary, indisvalid AS is_valid,
  indpred IS NOT NULL AS is_partial, indimmediate AS is_immediate, indisexclusion AS is_exclusion,
  ARRAY(SELECT attname::text FROM pg_catalog.generate_series(0, indnkeyatts - 1) AS at
    LEFT JOIN pg_catalog.pg_attribute ON attrelid = indrelid AND attnum = indkey[at] AND attnum <> 0
    ORDER BY at) AS keys
FROM pg_catalog.pg_index JOIN pg_catalog.pg_class AS c ON c.oid = indexrelid
JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
LEFT JOIN pg_catalog.pg_constraint ON conindid = indexrelid AND conrelid = indrelid
  AND contype IN ('p', 'u', 'x')
WHERE indrelid = $1 AND (indisunique OR indisexclusion) ORDER BY c.relname
"""

# Foreign keys of partitions are those of their table.
_CONSTRAINTS: Final = """
SELECT pg_catalog.quote_ident(conname) AS name, contype::text AS kind, conrelid <> $1 AS is_referring,
  pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname) AS "table",
  confdeltype IN ('a', 'r') AS keeps_rows,
  ARRAY(SELECT attname::text FROM pg_catalog.pg_attribute
    WHERE attrelid = conrelid AND attnum = ANY(conkey)) AS columns
FROM pg_catalog.pg_constraint JOIN pg_catalog.pg_class AS c ON c.oid = conrelid
JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
WHERE ((conrelid = $1 AND contype IN ('c', 'f')) OR (confrelid = $1 AND contype = 'f')) AND conparentid = 0
ORDER BY conname
"""

# Hash partitions cover all tokens if their shares, 1 / modulus each, sum up to 1.
_HAS_GAP: Final = """
SELECT CASE partstrat WHEN 'h' THEN COALESCE((
    SELECT pg_catalog.sum(1.0 / (pg_catalog.substring(
      pg_catalog.pg_get_expr(relpartbound, oid), 'modulus ([0-9]+)'))::numeric)
    FROM pg_catalog.pg_inherits JOIN pg_catalog.pg_class ON oid = inhrelid WHERE inhparent = $1
  ), 0) < 0.999999
  ELSE partdefid = 0 END
FROM pg_catalog.pg_partitioned_table WHERE partrelid = $1
"""


async def read(connection: AnyConnection, table: str) -> Facts | None:
    """Return the facts of the relation with this qualified, quoted name; None: there is none."""
    row = await connection.fetchrow(_RELATION, table)
    if row is None:
        return None
    oid = row["oid"]
    columns = [Column(**dict(one)) for one in await connection.fetch(_COLUMNS, oid)]
    indexes = [
        UniqueIndex(**(dict(one) | {"keys": tuple(one["keys"])}))
        for one in await connection.fetch(_UNIQUE_INDEXES, oid)
    ]
    constraints = [
        Constraint(**(dict(one) | {"columns": frozenset(one["columns"])}))
        for one in await connection.fetch(_CONSTRAINTS, oid)
    ]
    # `Any`: what a catalog's column holds, mypy cannot know.
    fields: dict[str, Any] = {key: value for key, value in row.items() if key != "oid"}
    fields |= {name: tuple(row[name]) for name in ("rules", "triggers", "children")}
    return Facts(
        table=table,
        **fields,
        columns={column.name: column for column in columns},
        unique_indexes=tuple(indexes),
        constraints=tuple(constraints),
        has_gap=row["kind"] == "p" and await connection.fetchval(_HAS_GAP, oid),
    )


async def has_unusable_keys(connection: AnyConnection, table: str) -> bool:
    """Tell whether a token is NULL or stored twice, so that no primary key can be made; reads the table."""
    return bool(
        await connection.fetchval(
            "SELECT pg_catalog.count(*) > pg_catalog.count(DISTINCT access_token) "  # noqa: S608  # quoted
            f"FROM {table}",
            timeout=_KEYS_TIMEOUT_S,
        )
    )


async def type_of_name(connection: AnyConnection, table: str) -> str | None:
    """Return how to rename the type that has the table's name, though no relation has it; None: no type."""
    row = await connection.fetchrow(
        "SELECT CASE typtype WHEN 'd' THEN 'DOMAIN' ELSE 'TYPE' END AS kind, "
        "pg_catalog.quote_ident(pg_catalog.left(typname::text, 12) || '_type') AS free_name "
        "FROM pg_catalog.pg_type WHERE oid = pg_catalog.to_regtype($1)",
        table,
    )
    return None if row is None else f"ALTER {row['kind']} {table} RENAME TO {row['free_name']}"


async def others(connection: AnyConnection, table: str, name: str) -> list[str]:
    """Return tables of this name in other schemas, with a column of tokens: the sessions may be there."""
    rows = await connection.fetch(
        "SELECT pg_catalog.quote_ident(nspname) || '.' || pg_catalog.quote_ident(relname) AS name "
        "FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = relnamespace "
        "WHERE relname = $2 AND relkind IN ('r', 'p') AND c.oid IS DISTINCT FROM pg_catalog.to_regclass($1) "
        "AND EXISTS (SELECT FROM pg_catalog.pg_attribute WHERE attrelid = c.oid "
        "AND attname = 'access_token' AND NOT attisdropped)",
        table,
        name,
    )
    return [row["name"] for row in rows]
