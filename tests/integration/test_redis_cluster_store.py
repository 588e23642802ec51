"""What only the store on a Redis Cluster does: buckets, renaming across slots, and what nodes must be."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis_clusters import RedisCluster, call
from redis_servers import PASSWORD, needs_redis, redis_server
from stores import lookups, new, new_cluster_store

from mnemosyned.errors import StorageUnavailable
from mnemosyned.sessions.model import Abandonment, Criteria, Session, ValueChange
from mnemosyned.sessions.store import Renaming, StorageRefused
from mnemosyned.storage.redis import scripts
from mnemosyned.storage.redis.cluster.pool import ClusterPool
from mnemosyned.storage.redis.cluster.store import ClusterStore

pytestmark = needs_redis


@asynccontextmanager
async def opened(
    cluster: RedisCluster, prefix: str, *, buckets: int = 16, wait: int | None = None, url: str = ""
) -> AsyncIterator[ClusterStore]:
    store = new_cluster_store(url or cluster.url, prefix, buckets=buckets, wait=wait)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture
def prefix() -> str:
    return f"own {secrets.token_hex(4)}:"


def keys(cluster: RedisCluster, prefix: str) -> set[str]:
    """Return all keys with this prefix, without those that end within a minute or so by themselves."""
    found: set[str] = set()
    for node in cluster.primaries():
        (names,) = call(node, ("KEYS", f"{prefix}*"))
        lasting = call(node, *(("PTTL", name) for name in names)) if names else []
        found |= {name.decode() for name, ms in zip(names, lasting, strict=True) if not 0 <= ms <= 61_000}
    return found


def ours(store: ClusterStore, prefix: str) -> set[str]:
    home = {f"{prefix}{{home}}:{name}" for name in ("identity", "epoch", "buckets", "primaries")}
    spaces = [space.prefix for space in store._pool.buckets]
    return home | {f"{one}{name}" for one in spaces for name in ("identity", "epoch")}


async def started(store: ClusterStore, *tokens: str, **fields: object) -> list[str]:
    sessions = await store.start([new(token, **fields) for token in tokens])
    assert all(isinstance(session, Session) for session in sessions), sessions
    return list(tokens)


async def test_twenty_thousand_sessions_that_expire_leave_no_key_behind(
    redis_cluster: RedisCluster, prefix: str
) -> None:
    async with opened(redis_cluster, prefix) as store:
        tokens = [f"t{number}" for number in range(20_000)]
        for at in range(0, len(tokens), 500):
            fields = {"subject_id": f"s{at % 7000}", "refresh_token": f"r{at}", "ttl_us": 1, "bag": b""}
            await started(store, *tokens[at : at + 500], **fields)
        removed: list[str] = []
        while batch := await store.clean_up(limit=1000):
            assert len(batch) <= 1000
            removed += batch

        assert sorted(removed) == sorted(tokens)
        assert keys(redis_cluster, prefix) == ours(store, prefix)


async def test_sessions_that_are_ended_or_renamed_leave_no_key_behind(
    redis_cluster: RedisCluster, prefix: str
) -> None:
    async with opened(redis_cluster, prefix) as store:
        await started(store, *"abcdefghijkl", subject_id="a", refresh_token="r")
        await store.abandon([Abandonment(access_token="a")])
        await store.delete(Criteria(access_token="b"), limit=5)
        await store.set_values([ValueChange(access_token="h", key="k", value="v")])
        assert await store.rename([Renaming(old=one, new=f"new {one}") for one in "cdef"]) == [True] * 4
        await store.remove_unchanged(await store.stored_from("", limit=1))
        deletion = await store.delete(Criteria(subject_id="a"), limit=50)

        assert (len(deletion.stored_keys), deletion.is_all) == (9, True)
        assert keys(redis_cluster, prefix) == ours(store, prefix)


async def test_the_number_of_buckets_is_that_of_the_first_start(
    redis_cluster: RedisCluster, prefix: str
) -> None:
    async with opened(redis_cluster, prefix, buckets=7) as one, opened(redis_cluster, prefix) as other:
        await started(one, "a", "b", "c")

        assert len(other._pool.buckets) == 7
        assert await other.exist(["a", "b", "c", "d"]) == [True, True, True, False]
        assert await one.identity() == await other.identity()
    async with opened(redis_cluster, f"{prefix}other:") as stranger:
        assert await stranger.identity() != await one_identity(redis_cluster, prefix)


async def one_identity(cluster: RedisCluster, prefix: str) -> bytes:
    async with opened(cluster, prefix) as store:
        return await store.identity()


async def test_each_primary_has_its_share_of_the_sessions(redis_cluster: RedisCluster, prefix: str) -> None:
    async with opened(redis_cluster, prefix, buckets=64) as store:
        for at in range(0, 3000, 500):
            await started(store, *(f"t{number}" for number in range(at, at + 500)), bag=b"")
        shares = [
            sum(b":s:t" in key for key in call(node, ("KEYS", f"{prefix}*"))[0])
            for node in redis_cluster.primaries()
        ]

        assert sum(shares) == 3000
        assert min(shares) > 850


async def test_a_page_far_from_the_beginning_is_found_without_reading_all_before_it(
    redis_cluster: RedisCluster, prefix: str
) -> None:
    async with opened(redis_cluster, prefix) as store:
        for at in range(0, 4000, 500):
            await started(store, *(f"t{number:04}" for number in range(at, at + 500)), bag=b"")
        whole = (await store.find(Criteria(), offset=0, limit=4001)).sessions
        page = (await store.find(Criteria(), offset=3456, limit=20)).sessions
        last = (await store.find(Criteria(), offset=3990, limit=20)).sessions

        assert len(whole) == 4000
        assert [one.access_token for one in page] == [one.access_token for one in whole[3456:3476]]
        assert [one.access_token for one in last] == [one.access_token for one in whole[3990:]]


class Cut(Exception):
    """Ends a process in the middle."""


class EndedAfter:
    """Stands for the pool of a node that ends after a script has been run."""

    def __init__(self, pool: ClusterPool, last: scripts.Script) -> None:
        self._pool = pool
        self._last = last

    async def each(
        self, script: scripts.Script, head: Sequence[Any], items: Sequence[Any], *, is_write: bool = False
    ) -> list[Any]:
        replies = await self._pool.each(script, head, items, is_write=is_write)
        if script is self._last:
            raise Cut
        return replies


async def renamed_in_part(store: ClusterStore, old: str, last: scripts.Script) -> str:
    """Rename a session to another bucket, up to a script; return the new name."""
    bucket = store._pool.bucket_of(old)
    new_name = next(name for number in range(99) if store._pool.bucket_of(name := f"n{number}") != bucket)
    pool = store._pool
    store._moves._pool = EndedAfter(pool, last)  # type: ignore[assignment]  # it has all that moves use
    try:
        with pytest.raises(Cut):
            await store.rename([Renaming(old=old, new=new_name)])
    finally:
        store._moves._pool = pool
    return new_name


@pytest.mark.parametrize("last", [scripts.DEPART, scripts.ARRIVE, scripts.FORGET], ids=lambda one: one.name)
async def test_a_rename_that_was_cut_off_is_finished_by_the_next_one(
    redis_cluster: RedisCluster, prefix: str, last: scripts.Script
) -> None:
    async with opened(redis_cluster, prefix) as store:
        (session,) = await store.start([new("old", subject_id="a", refresh_token="r")])
        assert isinstance(session, Session)
        name = await renamed_in_part(store, "old", last)

        assert await store.rename([Renaming(old="old", new=name)]) == [True]
        (found,) = await store.load(lookups(name))
        assert isinstance(found, Session)
        assert (found.bag, found.expires_at_us) == (session.bag, session.expires_at_us)
        assert await store.exist(["old"]) == [False]
        assert [one.access_token for one in (await store.find(Criteria(), offset=0, limit=9)).sessions] == [
            name
        ]


@pytest.mark.parametrize("last", [scripts.DEPART, scripts.ARRIVE, scripts.FORGET], ids=lambda one: one.name)
async def test_a_session_on_its_way_to_another_name_is_ended_with_its_subject(
    redis_cluster: RedisCluster, prefix: str, last: scripts.Script
) -> None:
    async with opened(redis_cluster, prefix) as store:
        await started(store, "old", "beside", subject_id="a")
        name = await renamed_in_part(store, "old", last)
        deletion = await store.delete(Criteria(subject_id="a"), limit=9)

        assert (sorted(deletion.stored_keys), deletion.is_all) == (sorted(["beside", name]), True)
        assert await store.rename([Renaming(old="old", new=name)]) == [False]
        assert await store.exist(["old", name]) == [False, False]


async def test_a_session_that_has_arrived_and_was_ended_does_not_come_back(
    redis_cluster: RedisCluster, prefix: str
) -> None:
    async with opened(redis_cluster, prefix) as store:
        await started(store, "old")
        # The old bucket still keeps it aside.
        name = await renamed_in_part(store, "old", scripts.ARRIVE)
        assert await store.abandon([Abandonment(access_token=name)]) == [True]

        assert await store.rename([Renaming(old="old", new=name)]) == [False]
        assert await store.exist([name]) == [False]
        assert await store.clean_up(limit=10) == []
        assert keys(redis_cluster, prefix) == ours(store, prefix)


async def test_cleanup_finishes_what_was_cut_off(redis_cluster: RedisCluster, prefix: str) -> None:
    async with opened(redis_cluster, prefix) as store:
        await started(store, "old")
        name = await renamed_in_part(store, "old", scripts.DEPART)
        assert await store.clean_up(limit=10) == []

        assert await store.exist(["old", name]) == [False, True]


async def test_a_delete_by_subject_ends_sessions_that_are_renamed_meanwhile(
    redis_cluster: RedisCluster, prefix: str
) -> None:
    async with opened(redis_cluster, prefix) as store:
        for attempt in range(15):
            names = [f"{attempt}/{number}" for number in range(40)]
            await started(store, *names, subject_id="a", bag=b"")
            renaming = asyncio.create_task(store.rename([Renaming(old=one, new=f"n{one}") for one in names]))
            await asyncio.sleep(attempt * 0.0005)
            while not (await store.delete(Criteria(subject_id="a"), limit=100)).is_all:
                pass
            await renaming

            assert await store.exist([*names, *(f"n{one}" for one in names)]) == [False] * 80


async def test_a_bucket_that_was_emptied_is_noticed(redis_cluster: RedisCluster, prefix: str) -> None:
    async with opened(redis_cluster, prefix) as store:
        before = await store.check()
        assert await store.check() == before
        space = store._pool.buckets[3]
        node = redis_cluster.primary_of(space.slot)
        (names,) = call(node, ("KEYS", f"{space.prefix}*"))
        call(node, ("DEL", *names))

        assert await store.check() != before


async def test_another_prefix_may_be_flushed_and_each_server_is_met_once(
    redis_cluster: RedisCluster, prefix: str
) -> None:
    async with opened(redis_cluster, prefix) as store:
        home = redis_cluster.primary_of(store._pool.home.slot)
        (met,) = call(home, ("HKEYS", f"{prefix}{{home}}:primaries"))
        (epoch,) = call(home, ("GET", f"{prefix}{{home}}:epoch"))
        assert len(met) == 3 + 1
        async with opened(redis_cluster, prefix) as other:
            await started(other, *(f"t{number}" for number in range(50)))
            assert call(home, ("GET", f"{prefix}{{home}}:epoch")) == [epoch]


async def test_a_node_that_will_not_do_is_refused_in_one_line(tmp_path: Path) -> None:
    with redis_server(tmp_path / "single") as server:
        url = server.url.replace("redis://", "redis+cluster://")
        with pytest.raises(StorageRefused, match="it is no node of a Redis Cluster; write redis://"):
            await new_cluster_store(url).open()
        with pytest.raises(StorageRefused, match="WRONGPASS: wrong user or password") as refused:
            await new_cluster_store(url.replace(PASSWORD, "hunter2")).open()
        assert "hunter2" not in str(refused.value)


async def test_a_setting_of_one_primary_ends_the_start_and_is_told_later(
    redis_cluster: RedisCluster, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    node = redis_cluster.primaries()[1]
    async with opened(redis_cluster, prefix) as store:
        call(
            node, ("CONFIG", "SET", "maxmemory", "1gb"), ("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        )
        try:
            await store.check()
            assert await started(store, "a") == ["a"]
            with pytest.raises(StorageRefused, match=rf":{node.port}: its maxmemory-policy is allkeys-lru"):
                await new_cluster_store(redis_cluster.url, prefix).open()
        finally:
            call(node, ("CONFIG", "SET", "maxmemory-policy", "noeviction", "maxmemory", "0"))
    told = [record for record in caplog.records if record.message == "redis_may_lose_sessions"]
    assert [record.server for record in told] == [f"127.0.0.1:{node.port}"]  # type: ignore[attr-defined]


DOCUMENT = (Path(__file__).parents[2] / "docs" / "redis.md").read_text()


def documented(mark: str) -> list[str]:
    return DOCUMENT.partition(f"<!-- {mark} -->\n```\n")[2].partition("\n```")[0].split()


async def test_the_documented_user_can_do_all_and_without_a_right_the_start_says_which(
    redis_cluster: RedisCluster, prefix: str
) -> None:
    keys_of = prefix.replace(" ", "?")
    acl = [
        {">secret": f">{PASSWORD}", "~mnemosyne:*": f"~{keys_of}*"}.get(word, word)
        for word in documented("acl")
    ]
    rights = documented("acl of clusters")
    url = redis_cluster.url.replace(f":{PASSWORD}", f"mnemosyned:{PASSWORD}")
    try:
        for node in redis_cluster.nodes:
            assert call(node, (*acl, *rights)) == [b"OK"]
        async with opened(redis_cluster, prefix, url=url) as store:
            await started(store, "a")
            assert await store.exist(["a"]) == [True]
        for right in rights:
            for node in redis_cluster.nodes:
                call(node, ("ACL", "SETUSER", "mnemosyned", f"-{right[1:]}"))
            with pytest.raises(StorageRefused, match="NOPERM: the user lacks a right"):
                await new_cluster_store(url, prefix).open()
            for node in redis_cluster.nodes:
                call(node, ("ACL", "SETUSER", "mnemosyned", right))
    finally:
        for node in redis_cluster.nodes:
            call(node, ("ACL", "DELUSER", "mnemosyned"))


async def test_without_any_node_the_storage_is_unavailable() -> None:
    with pytest.raises(StorageUnavailable) as refused:
        await new_cluster_store("redis+cluster://127.0.0.1:1,127.0.0.1:2").open()

    assert "no server listens there" in refused.value.hint
