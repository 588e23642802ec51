"""Redis Cluster under load: what a failover and the moving of slots cost. Nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis_callers import Caller, assert_nothing_is_lost, calling, until_it_takes_writes
from redis_clusters import RedisCluster, redis_cluster
from redis_servers import PACKAGES, RedisServer, needs_redis, programs
from stores import new_cluster_store

from cluster.lease import Renewal
from mnemosyned.storage.redis.cluster.store import ClusterStore

pytestmark = needs_redis


@pytest.fixture(params=["redis", "valkey"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RedisCluster]:
    if request.param not in programs():
        pytest.skip(f"needs {PACKAGES[request.param]}")
    with redis_cluster(tmp_path / "cluster", request.param, appendfsync="always") as found:
        yield found


@asynccontextmanager
async def opened(cluster: RedisCluster, *, wait: int | None = None) -> AsyncIterator[ClusterStore]:
    store = new_cluster_store(cluster.url, wait=wait)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


def home_of(store: ClusterStore, cluster: RedisCluster) -> RedisServer:
    return cluster.primary_of(store._pool.home.slot)


def failures_of(callers: list[Caller]) -> list[float]:
    return [at_s for caller in callers for at_s in caller.failures]


@pytest.mark.parametrize("is_home", [False, True], ids=["other", "home"])
async def test_nothing_acknowledged_is_lost_when_a_primary_is_killed_under_load(
    cluster: RedisCluster, *, is_home: bool
) -> None:
    async with opened(cluster) as store:
        home = home_of(store, cluster)
        victim = next(node for node in cluster.primaries() if (node is home) == is_home)
        before = await store.renew(Renewal("node", 1, 1, "ring", 0))
        async with calling(store) as callers:
            killed_s = time.monotonic()
            victim.kill()
            await asyncio.to_thread(cluster.until_whole, 0)
            # Its replica has no replica that could confirm its writes, until the former primary is one.
            victim.start()
            await asyncio.to_thread(cluster.until_whole)
            whole_s = time.monotonic()
            await until_it_takes_writes(store)
        after = await store.renew(Renewal("node", 1, 2, "ring", 0))

        await assert_nothing_is_lost(store, callers)
        failures = failures_of(callers)
        assert killed_s <= min(failures) <= max(failures) < whole_s + 0.5
        # Rows of nodes are as they were, on another primary too. The store is another one all the same.
        assert before.identity != after.identity
        assert [row.number for row in after.rows] == [2]


async def test_no_call_fails_while_slots_are_moved_under_load(cluster: RedisCluster) -> None:
    async with opened(cluster) as store:
        spaces = [store._pool.home, *store._pool.buckets]
        async with calling(store) as callers:
            primaries = cluster.primaries()
            for at, space in enumerate(spaces[:40]):
                await asyncio.to_thread(cluster.move_slot, space.slot, primaries[at % 3])
        assert failures_of(callers) == []
        await assert_nothing_is_lost(store, callers)
