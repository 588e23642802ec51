"""Which of several nodes cleans up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest
from stores import new, new_postgres_store

from cluster.node_row import Renewal
from mnemosyned.storage.postgres.schema import Table
from mnemosyned.storage.postgres.store import PostgresStore

TABLE = Table(schema="mnemosyne", name="session")


@pytest.fixture
async def stores(postgres_dsn: str) -> AsyncIterator[list[PostgresStore]]:
    """Two nodes and a stranger, which has no lease."""
    opened = [new_postgres_store(postgres_dsn, TABLE) for _ in range(3)]
    for store in opened:
        await store.open()
    yield opened
    await asyncio.gather(*(store.close() for store in opened))


async def expire(store: PostgresStore, dsn: str, *tokens: str) -> None:
    await store.start([new(token) for token in tokens])
    connection = await asyncpg.connect(dsn)
    await connection.execute(f"UPDATE {TABLE.sql} SET expire_at = now(), due_at = now()")  # noqa: S608  # quoted
    await connection.close()


async def age(dsn: str, name: str) -> None:
    """Have a node renewed its lease for the last time three seconds ago."""
    connection = await asyncpg.connect(dsn)
    await connection.execute(
        f"UPDATE {TABLE.node.sql} SET renewed_at = renewed_at - interval '3 s' WHERE name = $1",  # noqa: S608
        name,
    )
    await connection.close()


async def cleaned(stores: list[PostgresStore]) -> list[list[str]]:
    return [sorted(await store.clean_up(limit=10)) for store in stores]


async def renew(stores: list[PostgresStore], number: int) -> None:
    for instance, store in enumerate(stores, start=1):
        await store.renew(Renewal(f"node-{instance}", instance, number, "ring", 0))


@pytest.mark.parametrize("is_killed", [False, True], ids=["left", "killed"])
async def test_one_of_the_nodes_cleans_up_and_another_does_in_its_place(
    stores: list[PostgresStore], postgres_dsn: str, *, is_killed: bool
) -> None:
    nodes = stores[:2]
    await renew(nodes, 1)
    await expire(stores[0], postgres_dsn, "a", "b")
    first = await cleaned([stores[2], *nodes])
    at = first.index(["a", "b"])
    cleaner, other = nodes[at - 1], nodes[2 - at]

    await expire(stores[0], postgres_dsn, "c")
    if is_killed:
        await age(postgres_dsn, f"node-{at}")
    else:
        await cleaner.resign((f"node-{at}", at, None))
    second = await other.clean_up(limit=10)

    assert first.count([]) == 2
    assert first[0] == []
    assert second == ["c"]


async def test_any_daemon_cleans_up_where_no_node_has_a_lease(
    stores: list[PostgresStore], postgres_dsn: str
) -> None:
    await expire(stores[0], postgres_dsn, "a")

    assert await stores[2].clean_up(limit=10) == ["a"]


async def test_two_that_clean_up_at_once_share_the_work(
    stores: list[PostgresStore], postgres_dsn: str
) -> None:
    tokens = [f"token-{number}" for number in range(200)]
    await expire(stores[0], postgres_dsn, *tokens)
    removed = await asyncio.gather(*(store.clean_up(limit=1000) for store in stores))

    assert sorted(token for part in removed for token in part) == sorted(tokens)
