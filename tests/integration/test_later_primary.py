"""A primary that stalls, the standby that is promoted meanwhile, and connections to both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import pytest
from prometheus_client import CollectorRegistry
from replicas import Replicas, kill, promote, replicas, resume, stall

from mnemosyned.errors import StorageUnavailable
from mnemosyned.observe.metrics import QueryMetrics
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.postgres.address_in_use import PostgresOptions
from mnemosyned.storage.postgres.columns import Query
from mnemosyned.storage.postgres.pool import PostgresPool

SIZE: Final = 4
# All connections of the pool are in use at once.
PORT: Final = Query("port", "SELECT inet_server_port() AS port, pg_sleep(0.1)")
LONG: Final = Query("long", "SELECT pg_sleep(20)")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Replicas]:
    with replicas(tmp_path) as both:
        former = both.primary
        yield both
        resume(former)


@pytest.fixture
async def pool(pair: Replicas) -> AsyncIterator[PostgresPool]:
    dsn = pair.url(pair.primary, pair.standby, query="?target_session_attrs=read-write")
    options = PostgresOptions(dsn=dsn, pool_size=SIZE, connect_timeout_s=2, statement_timeout_s=30)
    one = PostgresPool(options, QueryMetrics(CollectorRegistry()))
    await one.open()
    yield one
    await one.close()


async def port_of(pool: PostgresPool) -> int:
    (row,) = await pool.fetch(PORT)
    return int(row["port"])


async def later_found(pool: PostgresPool) -> None:
    connector = pool.address.connector
    assert connector is not None
    assert connector.timelines.used is not None
    pool.doubt()
    async with asyncio.timeout(5):
        while connector.timelines.used.number == 1:
            await asyncio.sleep(0.01)


async def failed_over(pair: Replicas) -> None:
    stall(pair.primary)
    await asyncio.to_thread(promote, pair.standby)


async def test_no_connection_of_before_a_failover_is_used_after_it(
    pair: Replicas, pool: PostgresPool
) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(SIZE - 1):
            await stack.enter_async_context(pool.connection())
        await failed_over(pair)
        assert await port_of(pool) == pair.standby.port
        resume(pair.primary)

    ports = await asyncio.gather(*(port_of(pool) for _ in range(2 * SIZE)))
    assert ports == [pair.standby.port] * 2 * SIZE


async def test_a_statement_under_way_at_the_former_primary_fails_once_another_is_used(
    pair: Replicas, pool: PostgresPool
) -> None:
    under_way = asyncio.create_task(pool.fetch(LONG))
    await asyncio.sleep(0)
    await failed_over(pair)
    assert await port_of(pool) == pair.standby.port
    begun_s = time.monotonic()

    with pytest.raises(StorageUnavailable) as failed:
        await asyncio.wait_for(under_way, 10)
    assert time.monotonic() - begun_s < 2
    assert failed.value.is_under_way


async def test_a_stalled_primary_does_not_delay_connections_after_another_was_found(
    pair: Replicas, pool: PostgresPool
) -> None:
    # A daemon opens its storage again where the first attempt failed half-way.
    await pool.close()
    await pool.open()
    await failed_over(pair)
    await later_found(pool)

    begun_s = time.monotonic()
    ports = await asyncio.gather(*(port_of(pool) for _ in range(SIZE)))
    assert ports == [pair.standby.port] * SIZE
    assert time.monotonic() - begun_s < 1


async def test_hosts_in_another_sequence_are_the_same_servers(pair: Replicas, pool: PostgresPool) -> None:
    await failed_over(pair)
    await later_found(pool)
    resume(pair.primary)
    kill(pair.standby)

    with pytest.raises(StorageRefused):
        await pool.use(pair.url(pair.standby, pair.primary, query="?target_session_attrs=read-write"))
