"""SetValue by what a node remembers of a bag: one statement, and never a lost change."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import asyncpg
import pytest
from prometheus_client import CollectorRegistry
from stores import TTL_US, bags

from mnemosyned.errors import InvalidArgument, SessionNotFound
from mnemosyned.observe.metrics import QueryMetrics
from mnemosyned.sessions.model import Abandonment, NewSession, ValueChange
from mnemosyned.storage.postgres.address_in_use import PostgresOptions
from mnemosyned.storage.postgres.pool import PostgresPool
from mnemosyned.storage.postgres.schema import Table
from mnemosyned.storage.postgres.store import PostgresStore

TABLE = Table(schema="mnemosyne", name="session")


class Node:
    def __init__(self, dsn: str) -> None:
        self.registry = CollectorRegistry()
        options = PostgresOptions(dsn=dsn, pool_size=4, connect_timeout_s=5, statement_timeout_s=9)
        self.store = PostgresStore(PostgresPool(options, QueryMetrics(self.registry)), TABLE)

    def statements(self) -> float:
        name = "mnemosyned_storage_postgres_queries_total"
        counts = (
            self.registry.get_sample_value(name, {"query": query})
            for query in ("set_value_select", "set_value_update")
        )
        return sum(count or 0 for count in counts)

    async def set(self, key: str, value: str = "v", *, max_entries: int = 100) -> object:
        change = ValueChange(access_token="t", key=key, value=value, max_entries=max_entries)
        (result,) = bags(await self.store.set_values([change]))
        return result


@pytest.fixture
async def nodes(postgres_dsn: str) -> AsyncIterator[tuple[Node, Node]]:
    one, other = Node(postgres_dsn), Node(postgres_dsn)
    async with AsyncExitStack() as stack:
        for node in (one, other):
            await node.store.open()
            stack.push_async_callback(node.store.close)
        await one.store.start([NewSession(ttl_us=TTL_US, access_token="t", subject_id="s")])
        yield one, other


async def test_a_remembered_bag_is_changed_in_one_statement(nodes: tuple[Node, Node]) -> None:
    one, _ = nodes
    before = one.statements()

    assert await one.set("a") == {"a": "v"}
    assert await one.set("b") == {"a": "v", "b": "v"}
    assert one.statements() == before + 2


async def test_what_another_node_has_set_is_not_lost(nodes: tuple[Node, Node]) -> None:
    one, other = nodes
    await one.set("a")
    await other.set("b")

    assert await one.set("c") == {"a": "v", "b": "v", "c": "v"}
    assert await other.set("d") == {"a": "v", "b": "v", "c": "v", "d": "v"}


async def test_a_change_is_refused_only_by_the_bag_that_is_stored(nodes: tuple[Node, Node]) -> None:
    one, other = nodes
    await one.set("a")
    await other.store.abandon([Abandonment(access_token="t")])
    await other.store.start([NewSession(ttl_us=TTL_US, access_token="t", subject_id="s")])

    # By the bag that this node remembers, it would be the second entry.
    assert await one.set("b", max_entries=1) == {"b": "v"}
    assert isinstance(await one.set("c", max_entries=1), InvalidArgument)


async def test_a_session_that_has_ended_has_no_bag_to_change(
    nodes: tuple[Node, Node], postgres_dsn: str
) -> None:
    one, other = nodes
    connection = await asyncpg.connect(postgres_dsn)
    await connection.execute(f"UPDATE {TABLE.sql} SET expire_at = now() - interval '1 s'")  # noqa: S608
    await connection.close()
    assert isinstance(await one.set("a"), SessionNotFound)

    await other.store.start([NewSession(ttl_us=TTL_US, access_token="t", subject_id="s")])
    await other.set("a")
    await one.store.abandon([Abandonment(access_token="t")])
    assert isinstance(await other.set("b"), SessionNotFound)
