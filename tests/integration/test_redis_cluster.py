"""Redis Cluster under load: what a failover and the moving of slots cost. Nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import secrets
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from clocks import Clock, needs_faketime
from redis_callers import Caller, assert_nothing_is_lost, calling
from redis_clusters import RedisCluster, call, redis_cluster
from redis_servers import PACKAGES, RedisServer, needs_redis, programs
from stores import lookups, new, new_cluster_store
from waiting import until

from cluster.lease import LEASE_US, stretched
from cluster.node_row import Renewal
from mnemosyned.errors import DeadlineExceeded, StorageUnavailable
from mnemosyned.sessions.model import Criteria, Session
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.redis.cluster.slots import home
from mnemosyned.storage.redis.cluster.store import ClusterStore

pytestmark = needs_redis


@pytest.fixture
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RedisCluster]:
    if request.param not in programs():
        pytest.skip(f"needs {PACKAGES[request.param]}")
    with redis_cluster(tmp_path / "cluster", request.param, appendfsync="always") as found:
        yield found


@pytest.fixture(scope="module")
def lasting_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    directory = tmp_path_factory.mktemp("cluster")
    with redis_cluster(directory, **{"cluster-require-full-coverage": "no"}) as found:
        yield found


@pytest.fixture
def any_cluster(lasting_cluster: RedisCluster) -> Iterator[RedisCluster]:
    """A cluster that is whole, and that a test may break for its time."""
    yield lasting_cluster
    for node in lasting_cluster.nodes:
        if node not in lasting_cluster.living():
            node.start()
    lasting_cluster.until_whole()


@asynccontextmanager
async def opened(
    cluster: RedisCluster, *, wait: int | None = None, timeout_s: float = 5
) -> AsyncIterator[ClusterStore]:
    prefix = f"own {secrets.token_hex(4)}:"
    store = new_cluster_store(cluster.url, prefix, wait=wait, timeout_s=timeout_s)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def started(store: ClusterStore, *tokens: str, **fields: object) -> None:
    sessions = await store.start([new(token, **fields) for token in tokens])
    assert all(isinstance(session, Session) for session in sessions), sessions


def home_of(store: ClusterStore, cluster: RedisCluster) -> RedisServer:
    return cluster.primary_of(store._pool.home.slot)


async def until_all_buckets_take_writes(store: ClusterStore) -> None:
    async with asyncio.timeout(20):
        while not all(isinstance(one, Session) for one in await store.start([new() for _ in range(1000)])):
            await asyncio.sleep(0.02)


def errors_of(callers: list[Caller]) -> set[str]:
    return {error for caller in callers for error in caller.errors}


def failures_of(callers: list[Caller]) -> list[float]:
    return [at_s for caller in callers for at_s in caller.failures]


@pytest.mark.parametrize(
    ("cluster", "is_home"), [("redis", False), ("valkey", True)], ids=["other", "home"], indirect=["cluster"]
)
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
            await until_all_buckets_take_writes(store)
            regained_s = time.monotonic()
        after = await store.renew(Renewal("node", 1, 2, "ring", 0))

        await assert_nothing_is_lost(store, callers)
        failures = failures_of(callers)
        assert killed_s <= min(failures) <= max(failures) < regained_s + 0.3
        # A call may wait for replicas at that moment. Then leases from before the failover run out.
        assert regained_s - whole_s < 5 + stretched(LEASE_US) / 1e6 + 1
        # Rows of nodes are as they were, on another primary too. The store is another one all the same.
        assert before.identity != after.identity
        assert [row.number for row in after.rows] == [2]


@pytest.mark.parametrize("cluster", ["redis"], indirect=True)
async def test_no_call_fails_while_slots_are_moved_under_load(cluster: RedisCluster) -> None:
    async with opened(cluster) as store:
        spaces = [store._pool.home, *store._pool.buckets]
        async with calling(store) as callers:
            primaries = cluster.primaries()
            for at, space in enumerate(spaces[:40]):
                await asyncio.to_thread(cluster.move_slot, space.slot, primaries[at % 3])
        assert errors_of(callers) == set()
        await assert_nothing_is_lost(store, callers)


async def test_no_call_fails_when_a_primary_is_replaced_in_order(any_cluster: RedisCluster) -> None:
    async with opened(any_cluster) as store:
        async with calling(store) as callers:
            for primary in any_cluster.primaries():
                replica = any_cluster.replica_of(primary)
                assert call(replica, ("CLUSTER", "FAILOVER")) == [b"OK"]
                await asyncio.to_thread(until, lambda one=replica: one in any_cluster.primaries())
                await asyncio.to_thread(any_cluster.until_whole)

        assert errors_of(callers) == set()
        await assert_nothing_is_lost(store, callers)


async def test_calls_to_a_slot_wait_until_it_has_been_moved(
    any_cluster: RedisCluster,
) -> None:
    async with opened(any_cluster, timeout_s=1) as store:
        space = store._pool.buckets[5]
        names = [name for number in range(4000) if store._pool.bucket_of(name := f"t{number}") == 5]
        await started(store, *names[:-1])
        source = any_cluster.primary_of(space.slot)
        target = next(node for node in any_cluster.primaries() if node is not source)
        has_begun, may_end = threading.Event(), threading.Event()

        def wait() -> None:
            has_begun.set()
            may_end.wait(10)

        moving = asyncio.create_task(asyncio.to_thread(any_cluster.move_slot, space.slot, target, pause=wait))
        await asyncio.to_thread(has_begun.wait, 10)
        # Some of its keys have moved, and others have not.
        loading = asyncio.create_task(store.load(lookups(*names)))
        starting = asyncio.create_task(store.start([new(names[-1])]))
        await asyncio.sleep(0.2)
        assert not loading.done()
        assert not starting.done()
        may_end.set()
        await moving
        loaded, begun = await loading, await starting
        assert all(isinstance(one, Session) for one in loaded[:-1])
        assert isinstance(begun[0], Session)


async def test_a_slot_that_is_not_moved_to_its_end_fails_calls_at_the_time_out(
    any_cluster: RedisCluster,
) -> None:
    async with opened(any_cluster, timeout_s=1) as store:
        await started(store, "a")
        slot = slot_of(store, "a")
        source = any_cluster.primary_of(slot)
        target = next(node for node in any_cluster.primaries() if node is not source)
        call(target, ("CLUSTER", "SETSLOT", slot, "IMPORTING", any_cluster.id_of(source)))
        call(source, ("CLUSTER", "SETSLOT", slot, "MIGRATING", any_cluster.id_of(target)))
        begun_s = time.monotonic()
        (refused,) = await store.load(lookups("a"))
        took_s = time.monotonic() - begun_s
        for node in (target, source):
            call(node, ("CLUSTER", "SETSLOT", slot, "STABLE"))

        assert isinstance(refused, StorageUnavailable)
        assert "a slot is being moved" in refused.detail
        assert not refused.is_under_way
        assert 0.9 < took_s < 3
        assert isinstance((await store.load(lookups("a")))[0], Session)


async def test_a_primary_that_does_not_answer_delays_one_batch_and_fails_no_other_session(
    any_cluster: RedisCluster,
) -> None:
    async with opened(any_cluster, wait=0, timeout_s=0.5) as store:
        tokens = [f"t{number}" for number in range(90)]
        await started(store, *tokens)
        victim = next(node for node in any_cluster.primaries() if node is not home_of(store, any_cluster))
        there = [any_cluster.primary_of(slot_of(store, token)) is victim for token in tokens]
        # Its replica must not take its place meanwhile.
        any_cluster.replica_of(victim).kill()
        victim.signal(signal.SIGSTOP)
        try:
            await store.load(lookups(*tokens))
            begun_s = time.monotonic()
            for _ in range(20):
                loaded = await store.load(lookups(*tokens))
                assert [isinstance(one, StorageUnavailable) for one in loaded] == there
            assert time.monotonic() - begun_s < 0.5
            with pytest.raises(StorageUnavailable):
                await store.find(Criteria(), offset=0, limit=5)
            await store.check()
        finally:
            victim.signal(signal.SIGCONT)
        async with asyncio.timeout(10):
            while not all(isinstance(one, Session) for one in await store.load(lookups(*tokens))):
                await asyncio.sleep(0.05)


async def checked_until(store: ClusterStore, event: str, caplog: pytest.LogCaptureFixture) -> None:
    """Check, as the test of health does again and again, until this is logged."""
    async with asyncio.timeout(10):
        while event not in caplog.text:
            await store.check()


def slot_of(store: ClusterStore, token: str) -> int:
    return store._pool.buckets[store._pool.bucket_of(token)].slot


async def test_without_replicas_only_writes_to_their_primary_fail_and_soon(any_cluster: RedisCluster) -> None:
    async with opened(any_cluster, timeout_s=2) as store:
        tokens = [f"t{number}" for number in range(90)]
        victim = next(node for node in any_cluster.primaries() if node is not home_of(store, any_cluster))
        there = [any_cluster.primary_of(slot_of(store, token)) is victim for token in tokens]
        any_cluster.replica_of(victim).kill()
        first = await store.start([new(token) for token in tokens])
        begun_s = time.monotonic()
        second = await store.start([new(f"{token}") for token in tokens])

        assert [isinstance(one, StorageUnavailable) for one in first] == there
        assert [isinstance(one, StorageUnavailable) for one in second] == there
        assert time.monotonic() - begun_s < 1


async def test_slots_without_a_primary_are_told_and_others_are_used(
    any_cluster: RedisCluster, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(any_cluster) as store:
        tokens = [f"t{number}" for number in range(60)]
        await started(store, *tokens)
        space = store._pool.buckets[9]
        primary = any_cluster.primary_of(space.slot)
        for node in any_cluster.nodes:
            call(node, ("CLUSTER", "DELSLOTS", space.slot))
        await checked_until(store, "redis_cluster_incomplete", caplog)
        loaded = await store.load(lookups(*tokens))

        assert [isinstance(one, Session) for one in loaded] == [
            store._pool.bucket_of(token) != 9 for token in tokens
        ]
        assert call(primary, ("CLUSTER", "ADDSLOTS", space.slot)) == [b"OK"]
        await checked_until(store, "redis_cluster_complete", caplog)
        assert all(isinstance(one, Session) for one in await store.load(lookups(*tokens)))


@needs_faketime
async def test_clocks_that_differ_are_refused_at_the_start_and_told_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(tmp_path / "clock")
    with redis_cluster(tmp_path / "cluster", replicas=0) as cluster:
        late = next(
            node for node in cluster.primaries() if node is not cluster.primary_of(home("test:").slot)
        )
        late.kill()
        for name, value in clock.environ.items():
            monkeypatch.setenv(name, value)
        late.start()
        monkeypatch.undo()
        await asyncio.to_thread(cluster.until_whole, 0)
        async with opened(cluster, wait=0) as store:
            token = next(
                token
                for number in range(99)
                if cluster.primary_of(slot_of(store, token := f"t{number}")) is late
            )
            clock.step(-0.4)
            await checked_until(store, "redis_clocks_differ", caplog)

            # By the clock that is behind, within a round trip: no write is done later than by any other.
            limit_us = await store.now_us() - 20_000
            (refused,) = await store.start([replace(new(token), not_after_us=limit_us)])
            assert isinstance(refused, DeadlineExceeded)
            with pytest.raises(StorageRefused, match=r"the clocks of its primaries differ by 0\.[34]"):
                await new_cluster_store(cluster.url, wait=0).open()

            clock.step(0.0)
            await checked_until(store, "redis_clocks_agree", caplog)
