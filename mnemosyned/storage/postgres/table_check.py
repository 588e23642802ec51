"""What the statements need of the table, and the SQL that mends a table which lacks it.

    pg_catalog ──> Facts (table_facts.py) ──> RULES ──> Faults ──> one line, for the end of the start

A rule looks at the facts and yields faults: what is wrong, and SQL after which it is right. The SQL is for a
person to read and run. `schema.py` and `migration.py` alone change anything by themselves.

- Refused is what can make a Start, a Get or the end of a session fail, or lose what was acknowledged.
- Accepted is what cannot: more columns with a default, more indexes, CHECKs on other columns, a unique index
  instead of the primary key, partitions that cover every token, a policy that lets every row through.
- Triggers are accepted if the trial (`trial.py`) finds that the statements still do what they should.
- The SQL is one list for all faults. A later rule may rely on the SQL of an earlier one.

Pure, apart from what reads the facts. The tests run the SQL of each rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from mnemosyned.storage.postgres.table_facts import Column, Facts, UniqueIndex

TYPE_BY_COLUMN: Final = {
    "access_token": "bytea",
    "refresh_token": "bytea",
    "subject_id": "text",
    "subject_client": "text",
    "bag": "bytea",
    "expire_at": "timestamptz",
}
# What a table may lack: `migration.py` adds it. A column of another type that has the name is not ours.
_DUE_TIME: Final = "due_at"
_OUR_COLUMNS: Final = TYPE_BY_COLUMN.keys() | {_DUE_TIME}
_FULL_NAMES: Final = {"timestamptz": "timestamp with time zone"}
_KEY: Final = "access_token"
_KINDS: Final = {
    "v": "VIEW",
    "m": "MATERIALIZED VIEW",
    "f": "FOREIGN TABLE",
    "S": "SEQUENCE",
    "i": "INDEX",
    "I": "INDEX",
    "c": "TYPE",
}
# Defaults that give each row another value, so that a unique index over the column refuses none.
_DIFFERENT_EACH_TIME: Final = re.compile(r"nextval\(|uuid|random")


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with the table, in a few words, and the statement that mends it."""

    what: str
    mend: str


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the table of rules; `meaning` says why, for those who read it."""

    meaning: str
    faults: Callable[[Facts], Iterator[Fault]]


def faults_of(facts: Facts) -> list[Fault]:
    """Return all that is wrong; where the relation is no table of sessions at all, that alone."""
    for rule in FORM:
        if found := list(rule.faults(facts)):
            return found
    return [fault for rule in RULES for fault in rule.faults(facts)]


def line_of(table: str, faults: list[Fault]) -> str:
    """Return all faults in one line, with the SQL at its end."""
    whats = "; ".join(fault.what for fault in faults)
    mends = "; ".join(dict.fromkeys(fault.mend for fault in faults))
    return f"table {table}: {whats}. This SQL mends it: {mends}"


def _other_relation(facts: Facts) -> Iterator[Fault]:
    if facts.kind in _KINDS:
        kind = _KINDS[facts.kind]
        renamed = f"ALTER {kind} {facts.table} RENAME TO {facts.free_name}"
        yield Fault(f"it is a {kind.lower()}, not a table", renamed)


def _temporary(facts: Facts) -> Iterator[Fault]:
    if facts.persistence == "t":
        yield Fault("it is temporary, and ends with its connection", f"DROP TABLE {facts.table}")


def _no_tokens(facts: Facts) -> Iterator[Fault]:
    if _KEY not in facts.columns:
        renamed = f"ALTER TABLE {facts.table} RENAME TO {facts.free_name}"
        yield Fault(f"column {_KEY} is missing, so it has no sessions", renamed)


def _partition(facts: Facts) -> Iterator[Fault]:
    if facts.parent:
        detached = f"ALTER TABLE {facts.parent} DETACH PARTITION {facts.table}"
        yield Fault(f"it is a partition of {facts.parent}, and takes only some sessions", detached)


def _columns(facts: Facts) -> Iterator[Fault]:
    for name, wanted in TYPE_BY_COLUMN.items():
        column = facts.columns.get(name)
        if column is None:
            added = f"ALTER TABLE {facts.table} ADD COLUMN {name} {wanted}"
            yield Fault(f"column {name} should be {wanted}, and is missing", added)
        elif column.generated:
            yield Fault(f"column {name} is generated", _ungenerated(facts, column))
        elif column.type != _FULL_NAMES.get(wanted, wanted):
            shown = f"{column.type}(n)" if column.has_length else column.type
            yield Fault(f"column {name} should be {wanted}, and is {shown}", _converted(facts, column))
        elif not column.is_deterministic:
            changed = f'ALTER TABLE {facts.table} ALTER COLUMN {name} TYPE {wanted} COLLATE pg_catalog."C"'
            yield Fault(f"column {name} has a collation by which different texts are equal", changed)


def _ungenerated(facts: Facts, column: Column) -> str:
    if column.generated == "s":
        return f"ALTER TABLE {facts.table} ALTER COLUMN {column.name} DROP EXPRESSION"
    # A virtual column has no values that could be kept.
    added = f"ADD COLUMN {column.name} {TYPE_BY_COLUMN[column.name]}"
    return f"ALTER TABLE {facts.table} DROP COLUMN {column.name}, {added}"


def _converted(facts: Facts, column: Column) -> str:
    name, wanted = column.name, TYPE_BY_COLUMN[column.name]
    using = {
        "bytea": f"pg_catalog.convert_to({name}::text, 'UTF8')",
        "text": f"pg_catalog.convert_from({name}, 'UTF8')" if column.type == "bytea" else f"{name}::text",
        "timestamptz": f"{name}::text::timestamptz",
    }[wanted]
    if column.type == "timestamp without time zone":
        using = f"{name} AT TIME ZONE 'UTC'"
    elif wanted == "timestamptz" and column.type in {"smallint", "integer", "bigint", "numeric"}:
        using = f"pg_catalog.to_timestamp({name}::double precision)"
    alter = f"ALTER TABLE {facts.table} ALTER COLUMN {name}"
    # A default of the old type may not convert, and a start names every column.
    first = "" if column.default is None else f"{alter} DROP DEFAULT; "
    if column.is_identity:
        first = f"{alter} DROP IDENTITY; "
    return f"{first}{alter} TYPE {wanted} USING {using}"


def _deferrable_keys(facts: Facts) -> Iterator[Fault]:
    for index in facts.unique_indexes:
        if _is_key(index) and not index.is_immediate:
            kind = "PRIMARY KEY" if index.is_primary else "UNIQUE"
            dropped = f"ALTER TABLE {facts.table} DROP CONSTRAINT {index.constraint}"
            yield Fault(
                f"constraint {index.constraint} is deferrable, and ON CONFLICT refuses it",
                f"{dropped}, ADD {kind} ({_KEY})",
            )


def _missing_key(facts: Facts) -> Iterator[Fault]:
    if any(_is_key(index) for index in facts.unique_indexes):
        return
    has_primary = any(index.is_primary for index in facts.unique_indexes)
    kind = "UNIQUE" if has_primary or facts.kind == "p" else "PRIMARY KEY"
    what = f"it has no primary key on {_KEY}"
    for index in facts.unique_indexes:
        if index.keys == (_KEY,) and not index.is_exclusion:
            reason = "is partial" if index.is_partial else "is invalid"
            what += f" (the index {index.name} {reason})"
    yield Fault(what, f"ALTER TABLE {facts.table} ADD {kind} ({_KEY})")


def without_unusable_keys(facts: Facts, faults: list[Fault]) -> list[Fault]:
    """Return the faults of a table with a token twice, or without one: a primary key needs these removed."""
    newer = "one.expire_at, one.ctid) < (other.expire_at, other.ctid"
    if "expire_at" not in facts.columns:
        newer = "one.ctid) < (other.ctid"
    removed = (
        f"DELETE FROM {facts.table} WHERE {_KEY} IS NULL; DELETE FROM {facts.table} AS one "  # noqa: S608
        f"USING {facts.table} AS other WHERE one.{_KEY} = other.{_KEY} AND ({newer})"
    )
    return [Fault("some rows have no token, or the token of another row", removed), *faults]


def lacks_key(facts: Facts) -> bool:
    """Tell whether no index keeps a token from being stored twice."""
    return next(_missing_key(facts), None) is not None and _KEY in facts.columns


def _is_key(index: UniqueIndex) -> bool:
    """Tell whether ON CONFLICT (access_token) finds this index."""
    is_whole = index.is_valid and not index.is_partial and not index.is_exclusion
    return is_whole and index.keys == (_KEY,)


def _further_unique(facts: Facts) -> Iterator[Fault]:
    for index in facts.unique_indexes:
        if (_KEY in index.keys and not index.is_exclusion) or _is_different_each_time(facts, index):
            continue
        keys = ", ".join(key or "an expression" for key in index.keys)
        if index.constraint is None:
            yield Fault(
                f"index {index.name} refuses sessions with the same {keys}", f"DROP INDEX {index.name}"
            )
        else:
            dropped = f"ALTER TABLE {facts.table} DROP CONSTRAINT {index.constraint}"
            yield Fault(f"constraint {index.constraint} refuses sessions with the same {keys}", dropped)


def _is_different_each_time(facts: Facts, index: UniqueIndex) -> bool:
    """Tell whether a column of the index, not ours, differs in each row by its default."""
    columns = [facts.columns[key] for key in index.keys if key and key not in _OUR_COLUMNS]
    return not index.is_exclusion and any(
        column.is_identity
        or (column.default is None and not column.is_not_null)  # NULL, which equals nothing
        or _DIFFERENT_EACH_TIME.search(column.default or "")
        for column in columns
    )


def _constraints(facts: Facts) -> Iterator[Fault]:
    for one in facts.constraints:
        dropped = f"ALTER TABLE {one.table} DROP CONSTRAINT {one.name}"
        if one.is_referring:
            if one.keeps_rows:
                what = f"constraint {one.name} of {one.table} keeps sessions from being ended"
                yield Fault(what, dropped)
        elif one.columns & _OUR_COLUMNS:
            yield Fault(f"constraint {one.name} refuses some sessions", dropped)


def _further_columns(facts: Facts) -> Iterator[Fault]:
    for column in facts.columns.values():
        is_filled = column.default is not None or column.is_identity or column.generated
        if column.name not in TYPE_BY_COLUMN and column.is_not_null and not is_filled:
            name = '"' + column.name.replace('"', '""') + '"'
            if column.name == _DUE_TIME and column.type == _FULL_NAMES["timestamptz"]:
                filled = f"ALTER TABLE {facts.table} ALTER COLUMN {_DUE_TIME} SET DEFAULT now()"
                yield Fault(f"column {_DUE_TIME} is NOT NULL and has no default", filled)
                continue
            keys = [index for index in facts.unique_indexes if column.name in index.keys and index.is_primary]
            dropped = "".join(f"DROP CONSTRAINT {index.constraint}, " for index in keys)
            yield Fault(
                f"column {name} is NOT NULL and has no default, so no session can be started",
                f"ALTER TABLE {facts.table} {dropped}ALTER COLUMN {name} DROP NOT NULL",
            )


def _unlogged(facts: Facts) -> Iterator[Fault]:
    if facts.persistence == "u":
        yield Fault(
            "it is UNLOGGED, so a crash of the server loses all sessions",
            f"ALTER TABLE {facts.table} SET LOGGED",
        )


def _rewriting(facts: Facts) -> Iterator[Fault]:
    for rule in facts.rules:
        yield Fault(f"rule {rule} changes what statements do", f"DROP RULE {rule} ON {facts.table}")


def _row_security(facts: Facts) -> Iterator[Fault]:
    if facts.has_row_security:
        disabled = f"ALTER TABLE {facts.table} DISABLE ROW LEVEL SECURITY"
        yield Fault(f"row security hides sessions from {facts.role}", disabled)


def _inherited(facts: Facts) -> Iterator[Fault]:
    for child in facts.children:
        removed = f"ALTER TABLE {child} NO INHERIT {facts.table}"
        yield Fault(f"{child} inherits from it, and no key covers both", removed)


def _gaps(facts: Facts) -> Iterator[Fault]:
    if facts.has_gap:
        renamed = f"ALTER TABLE {facts.table} RENAME TO {facts.free_name}"
        yield Fault("its partitions do not cover every token", renamed)


# Is it a table of sessions at all? The first of these that finds a fault is the only one told.
FORM: Final = (
    Rule("a relation of another kind has the name", _other_relation),
    Rule("a temporary table is seen by one connection, and ends with it", _temporary),
    Rule("without tokens there are no sessions, so this is a table of something else", _no_tokens),
    Rule("INSERT finds no partition for some tokens", _gaps),
)
# In the sequence in which their SQL must run.
RULES: Final = (
    Rule("a partition takes only the rows of its part", _partition),
    Rule("INSERT has rules instead, which ON CONFLICT refuses; others change what happens", _rewriting),
    Rule("a foreign key or CHECK refuses what callers may send; a referring row keeps ours", _constraints),
    Rule("one subject, client or refresh token may have several sessions", _further_unique),
    Rule("INSERT gives further columns no value", _further_columns),
    Rule("values are bytes, text and instants; `=` of tokens and subjects is exact", _columns),
    Rule("ON CONFLICT takes no deferrable constraint", _deferrable_keys),
    Rule("ON CONFLICT needs a unique index over access_token alone, of all rows", _missing_key),
    Rule("rows of a child table are read, and no key covers them", _inherited),
    Rule("an acknowledged session survives a crash", _unlogged),
    Rule("a statement must see every row", _row_security),
)
