"""Walks by stored key on tables larger than what one statement looks at."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Final

import asyncpg
import pytest
from stores import new_postgres_store

from mnemosyned.sessions.model import Criteria
from mnemosyned.storage.postgres import key_walk
from mnemosyned.storage.postgres.schema import Table
from mnemosyned.storage.postgres.store import PostgresStore

TABLE: Final = Table(schema="mnemosyne", name="session")
ROWS: Final = 3 * key_walk._MOST_LOOKED
HOUR_US: Final = 3_600_000_000


@pytest.fixture(params=[True, False], ids=["by due time", "by expiry"])
async def store(request: pytest.FixtureRequest, postgres_dsn: str) -> AsyncIterator[PostgresStore]:
    store = new_postgres_store(postgres_dsn, TABLE)
    await store.open()
    store._use_form(request.param)
    yield store
    await store.close()


@pytest.fixture
async def sql(postgres_dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(postgres_dsn)
    yield connection
    await connection.close()


async def insert(sql: asyncpg.Connection, *, expiry: str = "interval '2 hours'", refresh: str = "''") -> None:
    """Insert ROWS sessions, 00000 and so on; `n` is the number of one."""
    await sql.execute(
        f"INSERT INTO {TABLE.sql} (access_token, refresh_token, subject_id, bag, expire_at, due_at) "  # noqa: S608
        f"SELECT key, {refresh}::bytea, 's', '', at, at FROM (SELECT n, convert_to(to_char(n, 'FM00000'), "
        f"'UTF8') AS key, now() + {expiry} AS at FROM generate_series(0, {ROWS - 1}) n) AS made"
    )


async def walked(store: PostgresStore, criteria: Criteria, limit: int = 400) -> tuple[list[int], int]:
    """Return the numbers of what a walk shows, and how many pages it had."""
    shown: list[int] = []
    start: bytes | None = b""
    count = 0
    while start is not None:
        page = await store.walk(criteria, start=start, limit=limit)
        shown += [int(one.access_token) for one in page.sessions]
        start, count = page.next_key, count + 1
    return shown, count


async def test_a_page_looks_at_so_many_rows_and_leaves_the_others_to_the_next(
    store: PostgresStore, sql: asyncpg.Connection
) -> None:
    # Half of them have expired, in one piece, and are not cleaned up.
    await insert(
        sql, expiry=f"CASE WHEN n BETWEEN 100 AND {ROWS - 100} THEN -1 ELSE 1 END * interval '1 hour'"
    )
    shown, count = await walked(store, Criteria())

    assert shown == [*range(100), *range(ROWS - 99, ROWS)]
    assert count == 3


async def test_criteria_that_few_or_many_meet_find_the_same_in_the_same_sequence(
    store: PostgresStore, sql: asyncpg.Connection
) -> None:
    await insert(
        sql,
        expiry="CASE WHEN n % 700 = 0 THEN 1 ELSE 2 + n % 2 END * interval '1 hour'",
        refresh="CASE WHEN n % 1000 = 0 THEN 'few' ELSE 'many' END",
    )
    now_us = await store.now_us()
    few = await walked(store, Criteria(refresh_token="few"))
    many = await walked(store, Criteria(refresh_token="many"))
    soon = await walked(store, Criteria(expires_before_us=now_us + HOUR_US))
    late = await walked(store, Criteria(expires_before_us=now_us + 4 * HOUR_US))
    odd = await walked(store, Criteria(expires_after_us=now_us + 2 * HOUR_US + HOUR_US // 2))

    assert few == ([*range(0, ROWS, 1000)], 1)
    assert many[0] == [number for number in range(ROWS) if number % 1000]
    assert soon == ([*range(0, ROWS, 700)], 1)
    assert late[0] == [*range(ROWS)]
    assert odd[0] == [number for number in range(ROWS) if number % 2 and number % 700]


async def test_sessions_that_become_many_during_a_walk_change_nothing_of_it(
    store: PostgresStore, sql: asyncpg.Connection
) -> None:
    await insert(sql, refresh="CASE WHEN n % 10 = 0 THEN 'r' ELSE 'q' END")
    criteria = Criteria(refresh_token="r")
    first = await store.walk(criteria, start=b"", limit=200)
    await sql.execute(f"UPDATE {TABLE.sql} SET refresh_token = 'r'")  # noqa: S608
    assert first.next_key is not None
    rest = await store.walk(criteria, start=first.next_key, limit=1000)

    shown = [int(one.access_token) for one in (*first.sessions, *rest.sessions)]
    assert shown == [*range(0, 2000, 10), *range(2000, 3000)]


async def test_a_deep_page_costs_no_more_than_the_first(
    store: PostgresStore, sql: asyncpg.Connection
) -> None:
    await insert(sql)
    await sql.execute(f"VACUUM ANALYZE {TABLE.sql}")

    async def took_s(start: bytes) -> float:
        best_s = 1.0
        for _ in range(10):
            begun_s = time.perf_counter()
            assert len((await store.walk(Criteria(), start=start, limit=10)).sessions) == 10
            best_s = min(best_s, time.perf_counter() - begun_s)
        return best_s

    assert await took_s(b"07400") < 5 * await took_s(b"") + 0.005
