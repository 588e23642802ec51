"""Writes that wait for a lock while somebody else has long done them instead."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from prometheus_client import CollectorRegistry
from stores import TTL_US, bags, lookups

from mnemosyned.errors import DeadlineExceeded
from mnemosyned.observe.metrics import QueryMetrics
from mnemosyned.sessions import bag
from mnemosyned.sessions.model import Abandonment, ChangedBag, Criteria, NewSession, Session, ValueChange
from mnemosyned.storage.postgres.address_in_use import PostgresOptions
from mnemosyned.storage.postgres.pool import PostgresPool
from mnemosyned.storage.postgres.schema import Table
from mnemosyned.storage.postgres.store import PostgresStore

TOKENS = ["first", "locked", "other"]  # in the order of locking
IN_TIME_US = 100_000


@pytest.fixture
async def store(postgres_dsn: str) -> AsyncIterator[PostgresStore]:
    options = PostgresOptions(dsn=postgres_dsn, pool_size=4, connect_timeout_s=5, statement_timeout_s=9)
    pool = PostgresPool(options, QueryMetrics(CollectorRegistry()))
    table = Table(schema="mnemosyne", name="session")
    one = PostgresStore(pool, table)
    await one.open()
    await one.start([NewSession(ttl_us=TTL_US, access_token=token, subject_id="s") for token in TOKENS])
    yield one
    await one.close()


@contextlib.asynccontextmanager
async def held(dsn: str, statement: str) -> AsyncIterator[None]:
    """Keep what a statement locks, and take it back at the end."""
    connection = await asyncpg.connect(dsn)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute(statement)
    try:
        yield
    finally:
        await transaction.rollback()
        await connection.close()


async def until_waiting(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    async with asyncio.timeout(20):
        while not await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        ):
            await asyncio.sleep(0.005)
    await connection.close()


LOCKED = "SELECT 1 FROM mnemosyne.session WHERE access_token = 'locked' FOR UPDATE"


async def until_late(store: PostgresStore, not_after_us: int) -> None:
    while await store.now_us() < not_after_us:
        await asyncio.sleep(0.01)


async def test_a_change_that_gets_its_lock_too_late_is_not_made(
    store: PostgresStore, postgres_dsn: str
) -> None:
    not_after_us = await store.now_us() + IN_TIME_US
    changes = [
        ValueChange(access_token=token, key="k", value="1", not_after_us=not_after_us) for token in TOKENS
    ]
    async with held(postgres_dsn, LOCKED):
        late = asyncio.create_task(store.set_values(changes))
        await until_waiting(postgres_dsn)
        await until_late(store, not_after_us)
        # Behind the locked one: whoever repeats it now must not be overwritten later.
        (repeated,) = bags(await store.set_values([ValueChange(access_token="other", key="k", value="2")]))
    results = await late
    loaded = [one for one in await store.load(lookups(*TOKENS)) if isinstance(one, Session)]

    assert repeated == {"k": "2"}
    assert [type(one) for one in results] == [ChangedBag, DeadlineExceeded, DeadlineExceeded]
    assert [bag.decode(one.bag) for one in loaded] == [{"k": "1"}, {}, {"k": "2"}]


async def test_an_abandonment_that_gets_its_lock_too_late_is_not_done(
    store: PostgresStore, postgres_dsn: str
) -> None:
    not_after_us = await store.now_us() + IN_TIME_US
    async with held(postgres_dsn, LOCKED):
        late = asyncio.create_task(
            store.abandon([Abandonment(access_token=token, not_after_us=not_after_us) for token in TOKENS])
        )
        await until_waiting(postgres_dsn)
        await until_late(store, not_after_us)
        assert await store.abandon([Abandonment(access_token="other")]) == [True]
        (again,) = await store.start([NewSession(ttl_us=TTL_US, access_token="other", subject_id="again")])
    results = await late

    assert isinstance(again, Session)
    assert [one if isinstance(one, bool) else type(one) for one in results[:2]] == [True, DeadlineExceeded]
    assert await store.exist(TOKENS) == [False, True, True]


async def test_a_start_that_waited_too_long_revives_no_session(
    store: PostgresStore, postgres_dsn: str
) -> None:
    insert = (
        "INSERT INTO mnemosyne.session (access_token, subject_id, bag, expire_at) "
        "VALUES ('made 1', 's', '', now() + interval '1 h')"
    )
    not_after_us = await store.now_us() + IN_TIME_US
    new = [
        NewSession(ttl_us=TTL_US, access_token=token, subject_id="s", not_after_us=not_after_us)
        for token in ("made 0", "made 1", "made 2")
    ]
    async with held(postgres_dsn, insert):
        late = asyncio.create_task(store.start(new))
        await until_waiting(postgres_dsn)
        await until_late(store, not_after_us)
        (repeated,) = await store.start([NewSession(ttl_us=TTL_US, access_token="made 2", subject_id="s")])
        assert await store.abandon([Abandonment(access_token="made 2")]) == [True]
    results = await late

    assert isinstance(repeated, Session)
    assert [type(one) for one in results] == [DeadlineExceeded] * 3
    assert await store.exist(["made 0", "made 1", "made 2"]) == [False] * 3


async def test_a_delete_that_gets_its_locks_too_late_ends_nothing(
    store: PostgresStore, postgres_dsn: str
) -> None:
    not_after_us = await store.now_us() + IN_TIME_US
    async with held(postgres_dsn, LOCKED):
        late = asyncio.create_task(store.delete(Criteria(subject_id="s"), limit=9, not_after_us=not_after_us))
        await until_waiting(postgres_dsn)
        await until_late(store, not_after_us)
    with pytest.raises(DeadlineExceeded):
        await late

    assert await store.exist(TOKENS) == [True, True, True]


async def test_a_change_whose_time_passes_between_its_read_and_its_write_is_not_made(
    store: PostgresStore, postgres_dsn: str
) -> None:
    slow = BetweenPool(
        PostgresOptions(dsn=postgres_dsn, pool_size=4, connect_timeout_s=5, statement_timeout_s=9),
        QueryMetrics(CollectorRegistry()),
    )
    other = PostgresStore(slow, Table(schema="mnemosyne", name="session"))
    await other.open()
    not_after_us = await store.now_us() + IN_TIME_US
    slow.until = lambda: until_late(store, not_after_us)
    (result,) = await other.set_values(
        [ValueChange(access_token="first", key="k", value="v", not_after_us=not_after_us)]
    )
    await other.close()
    (loaded,) = await store.load(lookups("first"))

    assert slow.has_waited
    assert isinstance(result, DeadlineExceeded)
    assert isinstance(loaded, Session)
    assert bag.decode(loaded.bag) == {}


async def test_writers_of_one_bag_on_many_connections_lose_nothing(store: PostgresStore) -> None:
    changes = [ValueChange(access_token="first", key=str(number), value="v") for number in range(40)]
    results = await asyncio.gather(*(store.set_values([change]) for change in changes))
    (loaded,) = await store.load(lookups("first"))

    assert all(isinstance(result, ChangedBag) for (result,) in results)
    assert isinstance(loaded, Session)
    assert bag.decode(loaded.bag) == {str(number): "v" for number in range(40)}


async def test_of_two_equal_starts_the_one_with_time_left_is_done(store: PostgresStore) -> None:
    late = NewSession(ttl_us=TTL_US, access_token="twice", subject_id="late", not_after_us=1)
    results = await store.start([late, NewSession(ttl_us=TTL_US, access_token="twice", subject_id="in time")])
    (loaded,) = await store.load(lookups("twice"))

    assert isinstance(results[1], Session)
    assert isinstance(loaded, Session)
    assert loaded.subject_id == "in time"


async def test_a_row_that_another_holds_for_good_fails_alone(store: PostgresStore, postgres_dsn: str) -> None:
    changes = [ValueChange(access_token=token, key="k", value="v") for token in TOKENS]
    async with held(postgres_dsn, LOCKED):
        results = await store.set_values(changes)

    assert [isinstance(result, ChangedBag) for result in results] == [True, False, True]
    assert "locked by another writer" in str(results[1])


async def test_a_writer_far_from_the_database_gets_its_turn(store: PostgresStore, postgres_dsn: str) -> None:
    far = PostgresStore(
        SlowPool(
            PostgresOptions(dsn=postgres_dsn, pool_size=4, connect_timeout_s=5, statement_timeout_s=9),
            QueryMetrics(CollectorRegistry()),
        ),
        Table(schema="mnemosyne", name="session"),
    )
    await far.open()
    is_over = asyncio.Event()

    async def write_near(key: str) -> int:
        count = 0
        while not is_over.is_set():
            (result,) = await store.set_values([ValueChange(access_token="first", key=key, value=str(count))])
            assert isinstance(result, ChangedBag)
            count += 1
        return count

    near = [asyncio.create_task(write_near(key)) for key in ("a", "b")]
    results = [
        (await far.set_values([ValueChange(access_token="first", key="far", value=str(number))]))[0]
        for number in range(10)
    ]
    is_over.set()
    counts = await asyncio.gather(*near)
    await far.close()
    (loaded,) = await store.load(lookups("first"))

    assert all(isinstance(result, ChangedBag) for result in results), results
    assert isinstance(loaded, Session)
    assert bag.decode(loaded.bag) == {"far": "9", "a": str(counts[0] - 1), "b": str(counts[1] - 1)}


class BetweenPool(PostgresPool):
    """A pool that waits for something before the write of a SetValue."""

    until: Callable[[], Awaitable[None]] | None = None
    has_waited = False

    async def run(self, connection: Any, query: Any, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401  # as inherited
        if query.name == "set_value_update" and self.until is not None:
            await self.until()
            self.has_waited = True
        return await super().run(connection, query, *arguments, **options)


class SlowPool(PostgresPool):
    """A pool 5 ms away."""

    async def run(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401  # as inherited
        await asyncio.sleep(0.005)
        return await super().run(*arguments, **options)
