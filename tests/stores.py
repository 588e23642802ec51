"""Storage engines, opened for a test, and what to put into them.

An engine is an entry in `ENGINES`: the contract suites then run on it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import asyncpg
import mongodb_servers
import pytest
from prometheus_client import CollectorRegistry
from redis_clusters import RedisCluster, call
from redis_servers import RedisServer
from secrecy import CANARY

from mnemosyned.errors import MnemosyneError
from mnemosyned.observe.metrics import QueryMetrics
from mnemosyned.sessions import bag, token_hash
from mnemosyned.sessions.model import ChangedBag, Lookup, NewSession, Session
from mnemosyned.sessions.store import FullStore
from mnemosyned.storage import engines
from mnemosyned.storage.memory import MemoryStore
from mnemosyned.storage.mongodb import node_rows
from mnemosyned.storage.mongodb.pool import MongoOptions, MongoPool
from mnemosyned.storage.mongodb.schema import Names
from mnemosyned.storage.mongodb.store import MongoStore
from mnemosyned.storage.postgres.address_in_use import PostgresOptions
from mnemosyned.storage.postgres.kind import Kind
from mnemosyned.storage.postgres.pool import PostgresPool
from mnemosyned.storage.postgres.schema import Table
from mnemosyned.storage.postgres.store import PostgresStore
from mnemosyned.storage.redis.cluster.pool import ClusterPool
from mnemosyned.storage.redis.cluster.store import ClusterStore
from mnemosyned.storage.redis.pool import RedisOptions, RedisPool
from mnemosyned.storage.redis.server_watch import ServerWatch
from mnemosyned.storage.redis.store import RedisStore

TTL_US = 60_000_000
TOUCH_INTERVAL_US = 6_000_000


ODD_TABLE: Final = Table(schema="odd schema", name='a"table')


def bags(
    results: Sequence[ChangedBag | MnemosyneError],
) -> list[dict[str, str] | MnemosyneError]:
    """Return the bags of results of `set_values`, and what has failed."""
    return [result.values if isinstance(result, ChangedBag) else result for result in results]


@dataclass
class Engine:
    store: FullStore  # if the engine cannot rename, the suites call no more than an EngineStore has
    # Moves a session's expiry by seconds, as time would; by its stored key.
    shift: Callable[[str, float], Awaitable[None]]
    named: Callable[[str], str] = str
    tells_changes: bool = True  # the result of a change has the session

    async def shift_expiry(self, token: str, seconds: float) -> None:
        await self.shift(self.named(token), seconds)

    def shown(self, *tokens: str) -> list[str]:
        """What List shows for these tokens."""
        return [token_hash.session_id(self.named(token)) for token in tokens]


async def memory_engine(_: pytest.FixtureRequest) -> Engine:
    store = MemoryStore()

    async def shift(token: str, seconds: float) -> None:
        held = store._session_by_token[token]
        store._session_by_token[token] = Session(
            access_token=held.access_token,
            subject_id=held.subject_id,
            subject_client=held.subject_client,
            refresh_token=held.refresh_token,
            bag=held.bag,
            expires_at_us=held.expires_at_us + int(seconds * 1e6),
        )

    return Engine(store, shift)


def new_postgres_store(dsn: str, table: Table, kind: Kind | None = None) -> PostgresStore:
    options = PostgresOptions(dsn=dsn, pool_size=8, connect_timeout_s=5, statement_timeout_s=5, kind=kind)
    return PostgresStore(PostgresPool(options, QueryMetrics(CollectorRegistry())), table)


async def postgres_engine(dsn: str, kind: Kind | None = None, table: Table = ODD_TABLE) -> Engine:
    store = new_postgres_store(dsn, table, kind)

    async def shift(token: str, seconds: float) -> None:
        connection = await asyncpg.connect(dsn)
        await connection.execute(
            f"UPDATE {table.sql} SET expire_at = expire_at + $2 * interval '1 s' WHERE access_token = $1",  # noqa: S608
            token.encode(),
            seconds,
        )
        await connection.close()

    return Engine(store, shift)


async def _plain(request: pytest.FixtureRequest) -> Engine:
    return await postgres_engine(request.getfixturevalue("contract_dsn"), Kind("plain", is_plain=True))


async def _given(url: str, _: pytest.FixtureRequest) -> Engine:
    # The database is not the tests' own, and need not be empty.
    return await postgres_engine(url, table=Table(schema=f"test_{secrets.token_hex(4)}", name="session"))


async def _postgres(request: pytest.FixtureRequest) -> Engine:
    return await postgres_engine(request.getfixturevalue("contract_dsn"))


def new_redis_store(url: str, prefix: str = "test:", *, wait: int | None = None) -> RedisStore:
    options = RedisOptions(
        address=url, prefix=prefix, pool_size=8, connect_timeout_s=5, timeout_s=5, wait=wait
    )
    return RedisStore(RedisPool(options, QueryMetrics(CollectorRegistry(), "redis")), timeout_s=5)


async def redis_engine(server: RedisServer) -> Engine:
    prefix = f"test {secrets.token_hex(4)}:"
    store = new_redis_store(server.url, prefix)

    async def shift(token: str, seconds: float) -> None:
        """Move the expiry in the record and in the indexes."""
        link = await store._pool._connector.connect()  # type: ignore[union-attr]  # it is open
        key = f"{prefix}s:{token}"
        (record,) = await link.call([("GET", key)])
        at_us = int(record[:16]) + int(seconds * 1e6)
        subject = record[40 : 40 + int.from_bytes(record[24:28], "big")]
        await link.call(
            [
                ("SETRANGE", key, 0, f"{at_us:016}"),
                ("ZADD", f"{prefix}x", at_us, token),
                ("ZADD", f"{prefix}u:".encode() + subject, at_us, token),
            ]
        )
        await link.close()

    return Engine(store, shift)


def new_cluster_store(
    url: str, prefix: str = "test:", *, wait: int | None = None, buckets: int = 128, timeout_s: float = 5
) -> ClusterStore:
    options = RedisOptions(
        address=url, prefix=prefix, pool_size=8, connect_timeout_s=5, timeout_s=timeout_s, wait=wait
    )
    metrics = QueryMetrics(CollectorRegistry(), "redis")
    pool = ClusterPool(options, metrics, ServerWatch(is_cluster=True))
    return ClusterStore(pool, timeout_s=timeout_s, buckets=buckets)


async def redis_cluster_engine(cluster: RedisCluster) -> Engine:
    prefix = f"test {secrets.token_hex(4)}:"
    store = new_cluster_store(cluster.url, prefix, buckets=16)

    async def shift(token: str, seconds: float) -> None:
        """Move the expiry in the record and in the indexes."""
        space = store._pool.buckets[store._pool.bucket_of(token)]
        node = cluster.primary_of(space.slot)
        (record,) = call(node, ("GET", f"{space.prefix}s:{token}"))
        at_us = int(record[:16]) + int(seconds * 1e6)
        subject = record[40 : 40 + int.from_bytes(record[24:28], "big")]
        call(
            node,
            ("SETRANGE", f"{space.prefix}s:{token}", 0, f"{at_us:016}"),
            ("ZADD", f"{space.prefix}x", at_us, token),
            ("ZADD", f"{space.prefix}u:".encode() + subject, at_us, token),
        )

    return Engine(store, shift)


async def _redis_cluster(request: pytest.FixtureRequest) -> Engine:
    return await redis_cluster_engine(request.getfixturevalue("redis_cluster"))


async def _redis(request: pytest.FixtureRequest) -> Engine:
    return await redis_engine(request.getfixturevalue("redis_server"))


async def _valkey(request: pytest.FixtureRequest) -> Engine:
    return await redis_engine(request.getfixturevalue("valkey_server"))


def new_mongodb_store(url: str, collection: str, *, timeout_s: float = 20) -> MongoStore:
    options = MongoOptions(address=url, pool_size=8, connect_timeout_s=5, timeout_s=timeout_s)
    pool = MongoPool(options, QueryMetrics(CollectorRegistry(), "mongodb"))
    return MongoStore(pool, Names(collection), timeout_s=timeout_s)


async def mongodb_engine(url: str) -> Engine:
    names = Names(f"test-{secrets.token_hex(4)}")
    store = new_mongodb_store(url, names.sessions)

    async def shift(token: str, seconds: float) -> None:
        await store._pool.run(
            "shift",
            lambda database: names.written(database).update_one(
                {"_id": token}, {"$inc": {"e": int(seconds * 1e6)}}
            ),
        )

    return Engine(store, shift)


async def _mongodb(request: pytest.FixtureRequest) -> Engine:
    if not mongodb_servers.URL:
        # Renewals at the same moment take the stand-in longer than a lease can wait.
        request.getfixturevalue("monkeypatch").setattr(node_rows, "_TIMEOUT_S", 20.0)
    return await mongodb_engine(request.getfixturevalue("mongodb_url"))


# How each engine of the registry is made for one test: not yet opened, without any session.
ENGINES: Final[dict[str, Callable[[pytest.FixtureRequest], Awaitable[Engine]]]] = {
    "memory": memory_engine,
    "postgres": _postgres,
    "redis": _redis,
    "mongodb": _mongodb,
}
# An engine that keeps its sessions in another way there: all suites run on it as well.
LAYOUTS: Final[dict[str, Callable[[pytest.FixtureRequest], Awaitable[Engine]]]] = {
    "redis cluster": _redis_cluster
}
# The same engine on another server.
FLAVOURS: dict[str, Callable[[pytest.FixtureRequest], Awaitable[Engine]]] = {
    "valkey": _valkey,
    "plain postgres": _plain,
}
# Servers that speak PostgreSQL's protocol, by the variables that name one to run the suites on.
_URLS: Final = {"cockroach": "COCKROACH_URL", "yugabyte": "YUGABYTE_URL", "citus": "CITUS_URL"}
FLAVOURS |= {name: partial(_given, url) for name, one in _URLS.items() if (url := os.environ.get(one))}
# Those of them whose tokens can be hashed.
RENAMABLE: Final = [*(name for name in ENGINES if engines.ENGINES[name].capabilities.can_rename), *LAYOUTS]
# Those whose server here takes long for what others do at once.
SLOW: Final = () if mongodb_servers.URL else ("mongodb",)
# Those that `mnemosyned check` can walk through.
CHECKABLE: Final = [
    name for name in RENAMABLE if name in LAYOUTS or engines.ENGINES[name].capabilities.can_check
]


def flavours(*names: str) -> list[Any]:
    """The flavours as parameters of a fixture, or some of them; those by a variable are marked."""
    return [
        pytest.param(name, marks=[getattr(pytest.mark, f"{name}_server")] if name in _URLS else [])
        for name in FLAVOURS
        if not names or name in {*names, *_URLS}
    ]


@asynccontextmanager
async def opened(name: str, request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    """Lend the engine of this name, open and without any session."""
    engine = await (ENGINES | LAYOUTS | FLAVOURS)[name](request)
    await engine.store.open()
    yield engine
    await engine.store.close()


BAG = bag.encode({CANARY: CANARY})


def new(token: str = "", **fields: object) -> NewSession:
    return NewSession(
        access_token=token or secrets.token_hex(64),
        **({"subject_id": "s", "bag": BAG, "ttl_us": TTL_US} | fields),
    )  # type: ignore[arg-type]


def lookups(*tokens: str) -> list[Lookup]:
    return [
        Lookup(access_token=token, ttl_us=TTL_US, touch_interval_us=TOUCH_INTERVAL_US) for token in tokens
    ]
