"""Redis with replicas: no acknowledged write is lost with the primary, and a former one is not believed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from child_servers import free_port
from redis_callers import assert_nothing_is_lost, calling, until_it_takes_writes
from redis_servers import Watched, needs_redis, watched
from stores import lookups, new, new_redis_store

from cluster.node_row import Renewal
from mnemosyned.errors import StorageUnavailable
from mnemosyned.sessions.model import Abandonment, Session
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.redis.store import RedisStore

pytestmark = needs_redis


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Watched]:
    with watched(tmp_path) as found:
        yield found


@asynccontextmanager
async def opened(url: str, *, wait: int | None = None) -> AsyncIterator[RedisStore]:
    store = new_redis_store(url, wait=wait)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def test_nothing_acknowledged_is_lost_when_the_primary_is_killed_under_load(servers: Watched) -> None:
    async with opened(servers.url) as store:
        before = await store.renew(Renewal("node", 1, 1, "ring", 0))
        async with calling(store) as callers:
            former = servers.primary()
            killed_s = time.monotonic()
            former.kill()
            await until_it_takes_writes(store)
            regained_s = time.monotonic()
        after = await store.renew(Renewal("node", 1, 2, "ring", 0))

        await assert_nothing_is_lost(store, callers)
        failures = [at_s for caller in callers for at_s in caller.failures]
        assert killed_s <= min(failures)
        # On a busy machine one batch more may find its replicas late.
        assert sum(at_s > regained_s + 0.3 for at_s in failures) <= len(callers)
        assert regained_s - killed_s < 10
        # A copy of the store that was promoted is another store, and has the rows of the nodes.
        assert before.identity != after.identity
        assert [row.number for row in after.rows] == [2]

        # The former primary comes back, as a replica by and by. Nothing is read from it, or written to it.
        former.start()
        assert servers.primary() is not former
        alone = new_redis_store(former.url, wait=1)
        alone._pool._options = replace(alone._pool._options, timeout_s=1)
        with pytest.raises(StorageUnavailable):
            await alone.open()


async def test_a_primary_that_its_replicas_have_left_is_not_believed(servers: Watched) -> None:
    former = servers.primary()
    async with opened(former.url, wait=1) as store:
        await store.start([new("a")])
        renewed = await store.renew(Renewal("node", 1, 1, "ring", 0))
        # As behind a partition: its replicas have another primary, and it does not know that.
        for sentinel in servers.sentinels:
            sentinel.kill()
        promoted, other = (server for server in servers.servers if server is not former)
        promoted.command("REPLICAOF", "NO", "ONE")
        other.command("REPLICAOF", "127.0.0.1", str(promoted.port))
        store._pool._options = replace(store._pool._options, timeout_s=0.5)

        for call in (
            store.start([new("b")]),
            store.abandon([Abandonment(access_token="a")]),
            store.renew(Renewal("node", 1, 2, "ring", 0)),
            store.bar("node"),
            store.load(lookups("a")),
            store.exist(["a"]),
            store.check(),
        ):
            with pytest.raises(StorageUnavailable) as refused:
                await call
            assert "NotReplicated" in refused.value.detail or "no answer in time" in refused.value.detail

    async with opened(promoted.url, wait=1) as store:
        assert await store.exist(["a", "b"]) == [True, False]
        assert (await store.renew(Renewal("node", 1, 3, "ring", 0))).identity != renewed.identity


async def test_sentinels_that_do_not_answer_are_passed_over_and_a_wrong_service_is_refused(
    tmp_path: Path,
) -> None:
    with watched(tmp_path, replicas=1, sentinels=1) as servers:
        url = servers.url.replace("@", f"@127.0.0.1:{free_port()},")
        async with opened(url) as store:
            assert isinstance((await store.start([new("a")]))[0], Session)

        with pytest.raises(StorageRefused, match="no Sentinel knows the service others"):
            await new_redis_store(servers.url.replace("/sessions", "/others")).open()


async def test_without_any_sentinel_the_storage_is_unavailable() -> None:
    store = new_redis_store(f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{free_port()}/sessions")
    with pytest.raises(StorageUnavailable) as refused:
        await store.open()

    assert "no Sentinel names the primary" in refused.value.detail


@pytest.mark.parametrize(
    "told", [b"+OK", b":1", b"*2\r\n*0\r\n+x", b"*2\r\n$1\r\nh\r\n+port", b"$2\r\n\xff\xfe"]
)
async def test_what_is_no_sentinel_is_passed_over(told: bytes) -> None:
    answering: set[asyncio.Task[None]] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        answering.add(task)
        while command := await reader.read(4096):
            # The commands of a new connection, and the question.
            writer.write(told + b"\r\n" if b"SENTINEL" in command else b"+OK\r\n" * command.count(b"*"))
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        store = new_redis_store(f"redis+sentinel://127.0.0.1:{port}/sessions")
        with pytest.raises(StorageUnavailable) as refused:
            await store.open()
        await asyncio.wait(answering, timeout=5)

    assert "no Sentinel names the primary" in refused.value.detail
