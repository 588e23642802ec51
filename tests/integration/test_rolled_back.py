"""Transactions that PostgreSQL rolls back for the sake of others: they are run again while there is time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import asyncpg
import pytest
from prometheus_client import CollectorRegistry
from stores import lookups, new, new_postgres_store

from mnemosyned.errors import StorageUnavailable
from mnemosyned.observe.metrics import QueryMetrics
from mnemosyned.sessions import bag
from mnemosyned.sessions.model import Abandonment, ChangedBag, Session, Touch, ValueChange
from mnemosyned.storage.postgres import session_settings
from mnemosyned.storage.postgres.address_in_use import PostgresOptions
from mnemosyned.storage.postgres.pool import PostgresPool
from mnemosyned.storage.postgres.schema import Table
from mnemosyned.storage.postgres.store import PostgresStore

TABLE = Table(schema="mnemosyne", name="session")
TIMEOUT_S = 0.6


@pytest.fixture
async def connection(postgres_dsn: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    one = await asyncpg.connect(postgres_dsn)
    yield one
    one.terminate()


async def opened(dsn: str, timeout_s: float = 5.0) -> PostgresStore:
    options = PostgresOptions(dsn=dsn, pool_size=8, connect_timeout_s=5, statement_timeout_s=timeout_s)
    store = PostgresStore(PostgresPool(options, QueryMetrics(CollectorRegistry())), TABLE)
    await store.open()
    return store


async def test_a_batch_that_is_the_victim_of_a_deadlock_is_run_again(
    postgres_dsn: str, connection: asyncpg.Connection[asyncpg.Record]
) -> None:
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute(f"ALTER DATABASE {name} SET deadlock_timeout = '300ms'")
    await connection.execute("SET deadlock_timeout = '20s'")
    store = await opened(postgres_dsn)
    await store.start([new("a"), new("b")])
    locking = f"SELECT FROM {TABLE.sql} WHERE access_token = $1 FOR UPDATE"  # quoted

    async with connection.transaction():
        await connection.execute(locking, b"b")
        # It locks a, and waits for b.
        ending = asyncio.create_task(store.abandon([Abandonment(access_token=one) for one in "ab"]))
        await until_one_waits(postgres_dsn)
        # Returns when the batch was rolled back.
        await connection.execute(locking, b"a")

    assert await asyncio.wait_for(ending, 10) == [True, True]
    # Its connections tell what they have counted when they end.
    await store.close()
    assert await deadlocks(postgres_dsn) == 1


async def until_one_waits(dsn: str) -> None:
    watcher = await asyncpg.connect(dsn)
    sql = (
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    async with asyncio.timeout(10):
        while not await watcher.fetchval(sql):
            await asyncio.sleep(0.005)
    await watcher.close()


async def deadlocks(dsn: str) -> int:
    watcher = await asyncpg.connect(dsn)
    sql = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    async with asyncio.timeout(10):
        while not (found := await watcher.fetchval(sql)):
            await asyncio.sleep(0.05)
    await watcher.close()
    return int(found)


async def test_every_write_succeeds_where_transactions_are_serializable(
    postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings(timeout_s: float, major: int) -> dict[str, str]:
        return settings_of(timeout_s, major) | {"default_transaction_isolation": "serializable"}

    settings_of = session_settings.settings_of
    monkeypatch.setattr(session_settings, "settings_of", settings)
    stores = [await opened(postgres_dsn) for _ in range(2)]
    # So large that no node remembers it: read, and then written.
    large = bag.encode({"large": "x" * 2000})
    await stores[0].start([new("a", bag=large), *(new(f"t{number}") for number in range(20))])
    expires_at_us = await stores[0].now_us() + 10**9
    tokens = [f"t{number}" for number in range(20)]

    async def change(number: int) -> object:
        store = stores[number % 2]
        (value,) = await store.set_values([ValueChange(access_token="a", key=f"k{number}", value="v")])
        await store.touch([Touch(access_token=one, expires_at_us=expires_at_us + number) for one in tokens])
        (loaded,) = await store.load(lookups("a"))
        assert isinstance(loaded, Session)
        return value

    changed = await asyncio.gather(*(change(number) for number in range(16)))
    (after,) = await stores[0].load(lookups("a"))

    assert [one for one in changed if not isinstance(one, ChangedBag)] == []
    assert isinstance(after, Session)
    assert bag.decode(after.bag).keys() == {"large", *(f"k{number}" for number in range(16))}
    await asyncio.gather(*(store.close() for store in stores))


async def failing(connection: asyncpg.Connection[asyncpg.Record], sqlstate: str) -> None:
    """Have every end of a session fail, and count the tries: what a sequence has given is not rolled back."""
    await connection.execute(
        "CREATE SEQUENCE tries; CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"PERFORM nextval('tries'); RAISE EXCEPTION 'no' USING ERRCODE = '{sqlstate}'; END $$; "
        f"CREATE TRIGGER fail BEFORE DELETE ON {TABLE.sql} FOR EACH ROW EXECUTE FUNCTION fail()"
    )


@pytest.mark.parametrize("sqlstate", ["40001", "40P01"])
async def test_a_transaction_that_is_rolled_back_each_time_fails_when_its_time_is_over(
    postgres_dsn: str, connection: asyncpg.Connection[asyncpg.Record], sqlstate: str
) -> None:
    store = await opened(postgres_dsn, TIMEOUT_S)
    await store.start([new("a")])
    await failing(connection, sqlstate)
    begun_s = time.monotonic()

    with pytest.raises(StorageUnavailable) as failed:
        await store.abandon([Abandonment(access_token="a")])
    assert time.monotonic() - begun_s < TIMEOUT_S + 1
    assert sqlstate in failed.value.detail
    assert await connection.fetchval("SELECT last_value FROM tries") > 3
    assert await store.exist(["a"]) == [True]
    await store.close()


async def test_a_write_that_is_late_when_it_is_repeated_is_not_done(
    postgres_dsn: str, connection: asyncpg.Connection[asyncpg.Record]
) -> None:
    store = await opened(postgres_dsn)
    await store.start([new("a")])
    await failing(connection, "40001")
    begun_s = time.monotonic()
    until_us = await store.now_us() + 300_000
    (outcome,) = await store.abandon([Abandonment(access_token="a", not_after_us=until_us)])

    assert str(outcome) == "mnemosyned: deadline exceeded"
    assert time.monotonic() - begun_s < 2
    await store.close()


async def test_a_commit_of_unknown_outcome_is_not_repeated(
    postgres_dsn: str, connection: asyncpg.Connection[asyncpg.Record]
) -> None:
    store = new_postgres_store(postgres_dsn, TABLE)
    await store.open()
    await store.start([new("a")])
    await failing(connection, "40003")

    with pytest.raises(StorageUnavailable) as failed:
        await store.abandon([Abandonment(access_token="a")])
    assert failed.value.is_under_way
    assert await connection.fetchval("SELECT last_value FROM tries") == 1
    await store.close()
