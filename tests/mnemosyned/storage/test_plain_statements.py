"""The statements for CockroachDB and YugabyteDB, as texts: they call what both document as callable."""

from __future__ import annotations

import re
from typing import Any, Final

import pytest

from mnemosyned.sessions.model import Criteria
from mnemosyned.storage.postgres import table_health
from mnemosyned.storage.postgres.columns import Query
from mnemosyned.storage.postgres.node_table import NodeTable
from mnemosyned.storage.postgres.queries import Queries
from mnemosyned.storage.postgres.renaming import _Steps
from mnemosyned.storage.postgres.schema import Table

TABLE: Final = Table(schema="mnemosyne", name="session")
# CockroachDB knows more names than it can call: those that send and receive a type, such as textsend, fail.
CALLABLE: Final = frozenset(
    {"clock_timestamp", "concat_ws", "convert_to", "count", "current_database", "encode", "extract", "floor"}
    | {"lag", "md5", "now", "octet_length", "row_number", "substring", "sum", "unnest", "coalesce"}
)
# What only PostgreSQL and YugabyteDB have.
INSIDES: Final = re.compile(r"\b(xmin|ctid|xid|tid|due_at|pg_[a-z_]+)\b")

# `renaming.py` has the steps that stand in for them.
UNUSED: Final = frozenset({"rename", "rename_one"})


def queries_of(owner: object) -> list[str]:
    return [one.sql for name, one in vars(owner).items() if isinstance(one, Query) and name not in UNUSED]


def plain_statements() -> list[str]:
    queries = Queries(TABLE.sql, identity=TABLE.identity.sql)
    pool: Any = None
    nodes = NodeTable(pool, TABLE)
    nodes.use(is_plain=True)
    found = [
        *queries_of(queries),
        *queries_of(queries.walks),
        *queries_of(nodes),
        *queries_of(_Steps(TABLE.sql)),
    ]
    for criteria in (
        Criteria(),
        Criteria(subject_id="s"),
        Criteria(access_token="a", refresh_token="r"),
        Criteria(expires_before_us=1, expires_after_us=0),
    ):
        found += [
            queries.walks.find(criteria, offset=0, limit=1, page_bytes=1)[0].sql,
            queries.walks.walk(criteria, start=b"", limit=1, page_bytes=1)[0].sql,
            queries.walks.delete(criteria, limit=1)[0].sql,
        ]
    return [*found, table_health._PLAIN_STATE]


@pytest.mark.parametrize("sql", sorted(set(plain_statements())), ids=lambda sql: sql[:40])
def test_a_plain_statement_calls_what_both_servers_can_call(sql: str) -> None:
    assert {name.lower() for name in re.findall(r"\b([a-z_][a-z_0-9]*)\(", sql)} <= CALLABLE
    assert not INSIDES.search(sql)
    # CockroachDB's concat_ws takes texts alone, and not an oid.
    assert "::oid)" not in sql
