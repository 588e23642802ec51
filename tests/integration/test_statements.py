"""How many statements concurrent calls take, and what becomes of a table of the Go daemon."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import asyncpg
import grpc
import pytest
from mnemosynerpc.session_pb2 import (
    AbandonRequest,
    ExistsRequest,
    GetRequest,
    ListRequest,
    Session,
    SetValueRequest,
    StartRequest,
)
from prometheus_client import CollectorRegistry
from serving import Node, serving

from mnemosyned.observe.metrics import QueryMetrics
from mnemosyned.sessions import bag
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.postgres.address_in_use import PostgresOptions
from mnemosyned.storage.postgres.pool import PostgresPool
from mnemosyned.storage.postgres.schema import Table
from mnemosyned.storage.postgres.store import PostgresStore

TABLE = Table(schema="mnemosyne", name="session")


def new_store(dsn: str, registry: CollectorRegistry) -> PostgresStore:
    options = PostgresOptions(dsn=dsn, pool_size=8, connect_timeout_s=5, statement_timeout_s=5)
    return PostgresStore(PostgresPool(options, QueryMetrics(registry)), TABLE)


@dataclass
class Counted:
    node: Node
    registry: CollectorRegistry

    def statements(self, query: str) -> int:
        name = "mnemosyned_storage_postgres_queries_total"
        return int(self.registry.get_sample_value(name, {"query": query}) or 0)


@pytest.fixture
async def counted(postgres_dsn: str) -> AsyncIterator[Counted]:
    registry = CollectorRegistry()
    store = new_store(postgres_dsn, registry)
    await store.open()
    async with serving(store) as node:
        yield Counted(node, registry)
    await store.close()


async def started(node: Node, count: int) -> list[str]:
    request = StartRequest(session=Session(subject_id="s", bag={"k": "v"}))
    responses = await asyncio.gather(*(node.stub.Start(request) for _ in range(count)))
    return [response.session.access_token for response in responses]


async def test_sixty_four_concurrent_starts_share_statements(counted: Counted) -> None:
    tokens = await started(counted.node, 64)

    assert len(set(tokens)) == 64
    assert counted.statements("start") <= 64 / 5


async def test_concurrent_loads_share_statements(counted: Counted) -> None:
    tokens = await started(counted.node, 64)
    for token in tokens:
        counted.node.cache.drop(token)
    await asyncio.gather(*(counted.node.stub.Get(GetRequest(access_token=token)) for token in tokens))

    assert 1 <= counted.statements("load") <= 64 / 5


async def test_concurrent_gets_of_one_session_load_it_once(counted: Counted) -> None:
    (token,) = await started(counted.node, 1)
    counted.node.cache.drop(token)
    await asyncio.gather(*(counted.node.stub.Get(GetRequest(access_token=token)) for _ in range(64)))

    assert counted.statements("load") == 1


async def test_concurrent_set_values_share_statements(counted: Counted) -> None:
    tokens = await started(counted.node, 64)
    requests = [SetValueRequest(access_token=token, key="k", value="w") for token in tokens]
    await asyncio.gather(*(counted.node.stub.SetValue(request) for request in requests))

    assert 1 <= counted.statements("set_value_select") + counted.statements("set_value_update") <= 128 / 5


async def test_concurrent_abandons_and_exists_share_statements(counted: Counted) -> None:
    tokens = await started(counted.node, 64)
    for token in tokens:
        counted.node.cache.drop(token)
    stub = counted.node.stub
    await asyncio.gather(*(stub.Exists(ExistsRequest(access_token=token)) for token in tokens))
    await asyncio.gather(*(stub.Abandon(AbandonRequest(access_token=token)) for token in tokens))

    assert 1 <= counted.statements("exists") <= 64 / 5
    assert 1 <= counted.statements("abandon") <= 64 / 5


async def test_touches_of_many_sessions_are_one_statement(counted: Counted) -> None:
    tokens = await started(counted.node, 64)
    await asyncio.sleep(0.002)  # so that a Get extends by a whole millisecond
    for _ in range(5):
        await asyncio.gather(*(counted.node.stub.Get(GetRequest(access_token=token)) for token in tokens))
    assert counted.statements("touch") == 0
    await counted.node.touches.flush()

    assert counted.statements("touch") == 1
    assert counted.statements("load") == 0


async def test_a_touch_reaches_the_table(counted: Counted, postgres_dsn: str) -> None:
    (token,) = await started(counted.node, 1)
    await asyncio.sleep(0.002)
    got = (await counted.node.stub.Get(GetRequest(access_token=token))).session
    await counted.node.touches.flush()
    connection = await asyncpg.connect(postgres_dsn)
    stored = await connection.fetchval(f"SELECT expire_at FROM {TABLE.sql}")  # noqa: S608
    await connection.close()

    assert stored.timestamp() * 1e6 == pytest.approx(got.expire_at.ToMicroseconds(), abs=1)


async def test_a_session_that_ended_elsewhere_leaves_the_cache_with_its_next_touch(
    counted: Counted, postgres_dsn: str
) -> None:
    (token,) = await started(counted.node, 1)
    await asyncio.sleep(0.002)
    await counted.node.stub.Get(GetRequest(access_token=token))
    connection = await asyncpg.connect(postgres_dsn)
    await connection.execute(f"DELETE FROM {TABLE.sql}")  # noqa: S608
    await connection.close()
    await counted.node.touches.flush()

    assert token not in counted.node.cache.lru


GO_BAG = bytes.fromhex("127f0401010342616701ff8000010c010c00000cff8000020161013101620132")


async def test_a_table_of_the_go_daemon_opens_in_place(postgres_dsn: str) -> None:
    connection = await asyncpg.connect(postgres_dsn)
    await connection.execute(
        "CREATE SCHEMA IF NOT EXISTS mnemosyne;"
        "CREATE TABLE mnemosyne.session (access_token BYTEA PRIMARY KEY, refresh_token BYTEA, "
        "subject_id TEXT NOT NULL, subject_client TEXT, bag bytea NOT NULL, "
        "expire_at TIMESTAMPTZ NOT NULL DEFAULT (NOW() + '1440 seconds'));"
        "CREATE INDEX ON mnemosyne.session (refresh_token);"
        "CREATE INDEX ON mnemosyne.session (subject_id);"
        "CREATE INDEX ON mnemosyne.session (expire_at DESC);"
    )
    await connection.execute(
        "INSERT INTO mnemosyne.session (access_token, subject_id, bag) VALUES ('old', 'user:1', $1)", GO_BAG
    )
    store = new_store(postgres_dsn, CollectorRegistry())
    await store.open()
    async with serving(store) as node:
        got = (await node.stub.Get(GetRequest(access_token="old"))).session
        bag_after = (await node.stub.SetValue(SetValueRequest(access_token="old", key="b", value="3"))).bag
        again = (await node.stub.Get(GetRequest(access_token="old"))).session
    await store.close()
    indexes = await connection.fetchval("SELECT count(*) FROM pg_indexes WHERE tablename = 'session'")
    stored = await connection.fetchval("SELECT bag FROM mnemosyne.session")
    await connection.close()

    assert (got.subject_id, dict(got.bag)) == ("user:1", {"a": "1", "b": "2"})
    assert dict(bag_after) == dict(again.bag) == {"a": "1", "b": "3"}
    assert indexes == 4
    assert not bag.is_gob(stored)


async def test_a_damaged_row_harms_only_itself(counted: Counted, postgres_dsn: str) -> None:
    damaged, other = await started(counted.node, 2)
    for token in (damaged, other):
        counted.node.cache.drop(token)
    connection = await asyncpg.connect(postgres_dsn)
    change = f"UPDATE {TABLE.sql} SET bag = '\\x12ff', access_token = $2 WHERE access_token = $1"  # noqa: S608
    await connection.execute(change, damaged.encode(), b"damaged")
    stub = counted.node.stub
    results = await asyncio.gather(
        stub.SetValue(SetValueRequest(access_token="damaged", key="k")),
        stub.SetValue(SetValueRequest(access_token=other, key="k", value="w")),
        stub.Get(GetRequest(access_token="damaged")),
        stub.Get(GetRequest(access_token=other)),
        return_exceptions=True,
    )
    await connection.close()

    assert [getattr(result, "code", lambda: None)() for result in results] == [
        grpc.StatusCode.DATA_LOSS,
        None,
        grpc.StatusCode.DATA_LOSS,
        None,
    ]


async def test_a_token_that_is_not_text_is_left_out_of_a_list_and_cleaned_up(
    counted: Counted, postgres_dsn: str
) -> None:
    await started(counted.node, 1)
    connection = await asyncpg.connect(postgres_dsn)
    await connection.execute(f"UPDATE {TABLE.sql} SET access_token = '\\xff'")  # noqa: S608
    listed = await counted.node.stub.List(ListRequest())
    await connection.execute(f"UPDATE {TABLE.sql} SET expire_at = now()")  # noqa: S608
    await connection.close()

    assert (len(listed.sessions), listed.left_out) == (0, 1)
    assert await counted.node.service.clean_up(10) == 1


async def test_many_nodes_may_set_up_an_empty_database_at_once_and_again(postgres_dsn: str) -> None:
    for _ in range(2):
        stores = [new_store(postgres_dsn, CollectorRegistry()) for _ in range(8)]
        await asyncio.gather(*(store.open() for store in stores))
        await asyncio.gather(*(store.close() for store in stores))
    connection = await asyncpg.connect(postgres_dsn)
    indexes = await connection.fetchval("SELECT count(*) FROM pg_indexes WHERE tablename = 'session'")
    await connection.close()

    assert indexes == 4


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("CREATE TABLE mnemosyne.session (access_token TEXT)", "column access_token should be bytea"),
        ("CREATE TABLE mnemosyne.session (access_token BYTEA)", "column refresh_token should be bytea"),
    ],
)
async def test_a_table_of_somebody_else_is_refused(postgres_dsn: str, statement: str, reason: str) -> None:
    connection = await asyncpg.connect(postgres_dsn)
    await connection.execute("CREATE SCHEMA mnemosyne")
    await connection.execute(statement)
    await connection.close()
    store = new_store(postgres_dsn, CollectorRegistry())

    with pytest.raises(StorageRefused, match=reason):
        await store.open()
    await store.close()


async def test_a_table_of_a_newer_daemon_is_refused(postgres_dsn: str) -> None:
    store = new_store(postgres_dsn, CollectorRegistry())
    await store.open()
    connection = await asyncpg.connect(postgres_dsn)
    await connection.execute(f"COMMENT ON TABLE {TABLE.sql} IS 'mnemosyned schema version 99'")
    await connection.close()
    newer = new_store(postgres_dsn, CollectorRegistry())

    with pytest.raises(StorageRefused, match="schema version 99"):
        await newer.open()
    await asyncio.gather(store.close(), newer.close())


async def test_set_up_waits_longer_than_a_statement_may_take(postgres_dsn: str) -> None:
    options = PostgresOptions(dsn=postgres_dsn, pool_size=2, connect_timeout_s=5, statement_timeout_s=0.05)
    store = PostgresStore(PostgresPool(options, QueryMetrics(CollectorRegistry())), TABLE)
    other = await asyncpg.connect(postgres_dsn)
    await other.execute("SELECT pg_advisory_lock($1)", TABLE.advisory_key)
    opening = asyncio.create_task(store.open())
    done, _ = await asyncio.wait([opening], timeout=0.8)
    await other.close()
    await asyncio.wait_for(opening, 10)
    await store.close()

    assert not done


async def test_a_user_who_may_not_create_the_table_is_refused(postgres_dsn: str) -> None:
    connection = await asyncpg.connect(postgres_dsn)
    await connection.execute(
        "DROP ROLE IF EXISTS mere_reader; CREATE ROLE mere_reader LOGIN PASSWORD 'hunter2'"
    )
    _, _, address = postgres_dsn.partition("@")
    store = new_store(f"postgres://mere_reader:hunter2@{address}", CollectorRegistry())

    with pytest.raises(StorageRefused, match="mere_reader lacks CREATE on database"):
        await store.open()
    await connection.execute("DROP ROLE mere_reader")
    await connection.close()


async def test_parameters_of_gos_driver_are_understood(postgres_dsn: str) -> None:
    query = "?sslmode=disable&connect_timeout=5&fallback_application_name=x&binary_parameters=yes"
    store = new_store(postgres_dsn + query, CollectorRegistry())
    await store.open()
    await store.close()


async def test_a_wrong_password_is_refused_without_showing_it(postgres_dsn: str) -> None:
    before, _, after = postgres_dsn.partition("@")
    wrong = before.rpartition(":")[0] + ":hunter2@" + after
    store = new_store(wrong, CollectorRegistry())

    with pytest.raises(StorageRefused, match="password authentication failed") as refused:
        await store.open()
    assert "hunter2" not in str(refused.value)


async def test_a_locked_row_delays_only_its_own_caller(postgres_dsn: str) -> None:
    options = PostgresOptions(dsn=postgres_dsn, pool_size=8, connect_timeout_s=5, statement_timeout_s=1)
    pool = PostgresPool(options, QueryMetrics(CollectorRegistry()))
    store = PostgresStore(pool, TABLE)
    await store.open()
    async with serving(store) as node:
        locked, free = await started(node, 2)
        connection = await asyncpg.connect(postgres_dsn)
        async with connection.transaction():
            await connection.execute(
                f"SELECT FROM {TABLE.sql} WHERE access_token = $1 FOR UPDATE",
                locked.encode(),
            )
            begun_s = time.monotonic()
            results = await asyncio.gather(
                *(node.stub.SetValue(SetValueRequest(access_token=t, key="k")) for t in (locked, free)),
                return_exceptions=True,
            )
            took_s = time.monotonic() - begun_s
        await connection.close()
    await store.close()

    assert "locked by another writer" in str(results[0])
    assert dict(results[1].bag) == {"k": ""}  # type: ignore[union-attr]
    assert took_s < 2


async def test_the_estimate_follows_the_table_between_two_analyses(
    postgres_dsn: str,
) -> None:
    store = new_store(postgres_dsn, CollectorRegistry())
    await store.open()
    connection = await asyncpg.connect(postgres_dsn)

    async def add(first: int, last: int) -> None:
        await connection.execute(
            "INSERT INTO mnemosyne.session (access_token, subject_id, bag, expire_at) "
            "SELECT n::text::bytea, 's', '', now() + '1h'::interval FROM generate_series($1::int, $2::int) n",
            first,
            last,
        )

    unknown = await store.estimated_sessions()
    await add(1, 1000)
    await connection.execute("ANALYZE mnemosyne.session")
    analyzed = await store.estimated_sessions()
    await add(1001, 3000)
    grown = await store.estimated_sessions()
    await connection.close()
    await store.close()

    assert unknown == 0
    assert analyzed == pytest.approx(1000, rel=0.1)
    assert grown == pytest.approx(3000, rel=0.1)
