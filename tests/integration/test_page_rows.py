"""Pages of List in each form of the table: every field of many sessions, in their sequence."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Final

import asyncpg
import pytest
from stores import new_postgres_store

from aio.steps import STEP_BYTES, STEP_ITEMS
from mnemosyned.sessions import bag
from mnemosyned.sessions.columns import SessionColumns
from mnemosyned.sessions.model import Criteria, DamagedSession, Session
from mnemosyned.storage.postgres.kind import POSTGRESQL, Kind
from mnemosyned.storage.postgres.schema import Table
from mnemosyned.storage.postgres.store import PostgresStore

TABLE: Final = Table(schema="mnemosyne", name="session")
SESSIONS: Final = 3 * STEP_ITEMS + 1
LARGE: Final = bag.encode({"k": "v" * (STEP_BYTES // 2)})


@pytest.fixture(params=["by due time", "by expiry", "plain"])
async def store(request: pytest.FixtureRequest, postgres_dsn: str) -> AsyncIterator[PostgresStore]:
    is_plain = request.param == "plain"
    store = new_postgres_store(postgres_dsn, TABLE, Kind("plain", is_plain=True) if is_plain else POSTGRESQL)
    await store.open()
    if not is_plain:
        store._use_form(request.param == "by due time")
    yield store
    await store.close()


@pytest.fixture
async def sql(postgres_dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(postgres_dsn)
    yield connection
    await connection.close()


async def insert(sql: asyncpg.Connection) -> None:
    """Insert sessions 000, 001 and so on. The last expires first, and every fifth has a large bag."""
    await sql.execute(
        f"INSERT INTO {TABLE.sql} (access_token, refresh_token, subject_id, subject_client, bag, expire_at) "  # noqa: S608
        "SELECT convert_to(to_char(n, 'FM000'), 'UTF8'), "
        "CASE WHEN n % 2 = 0 THEN convert_to('r' || n, 'UTF8') END, 's' || n, "
        "CASE WHEN n % 3 = 0 THEN 'c' || n END, CASE WHEN n % 5 = 0 THEN $1::bytea ELSE '' END, "
        f"now() + interval '1 hour' - n * interval '1.000001 s' FROM generate_series(0, {SESSIONS - 1}) n",
        LARGE,
    )


def wanted(number: int) -> tuple[str, str, str, str, bytes]:
    return (
        f"{number:03}",
        f"s{number}",
        "" if number % 3 else f"c{number}",
        "" if number % 2 else f"r{number}",
        b"" if number % 5 else LARGE,
    )


def fields(one: Session | DamagedSession) -> tuple[str, str, str, str, bytes]:
    assert isinstance(one, Session)
    return one.access_token, one.subject_id, one.subject_client, one.refresh_token, one.bag


async def test_a_page_has_every_field_of_each_session_in_its_sequence(
    store: PostgresStore, sql: asyncpg.Connection
) -> None:
    await insert(sql)
    page = await store.find(Criteria(), offset=1, limit=1000)
    keyed = await store.walk(Criteria(), start=b"001", limit=1000)

    assert isinstance(page.sessions, SessionColumns)
    assert isinstance(keyed.sessions, SessionColumns)
    assert [*map(fields, page.sessions)] == [wanted(number) for number in reversed(range(SESSIONS - 1))]
    assert [*map(fields, keyed.sessions)] == [wanted(number) for number in range(1, SESSIONS)]
    expiries = page.sessions.expiries_us
    assert {after - before for before, after in pairwise(expiries)} == {1_000_001}
    assert [*reversed(keyed.sessions.expiries_us)][1:] == expiries[:-1]


async def test_a_damaged_session_among_many_is_damaged_alone(
    store: PostgresStore, sql: asyncpg.Connection
) -> None:
    await insert(sql)
    await sql.execute(
        f"UPDATE {TABLE.sql} SET refresh_token = repeat('x', 9000)::bytea WHERE subject_id = 's200'"  # noqa: S608
    )
    found = (await store.walk(Criteria(), start=b"", limit=1000)).sessions

    assert [at for at, one in enumerate(found) if isinstance(one, DamagedSession)] == [200]
    assert [fields(one) for at, one in enumerate(found) if at != 200] == [
        wanted(number) for number in range(SESSIONS) if number != 200
    ]


async def test_a_page_that_is_cut_goes_on_where_it_ended(
    store: PostgresStore, sql: asyncpg.Connection
) -> None:
    await insert(sql)
    page = await store.walk(Criteria(), start=b"", limit=1000, max_bytes=10 * len(LARGE))

    assert page.is_cut
    assert [*map(fields, page.sessions)] == [wanted(number) for number in range(50)]
    assert page.keys[-1] == b"049"
    assert page.next_key == b"05"
