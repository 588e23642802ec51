"""PgBouncer in front of PostgreSQL: session mode works, and the other modes end the start with a line."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from urllib.parse import quote, urlsplit

import asyncpg
import pytest
from poolers import needs_pgbouncer, pooled
from prometheus_client import CollectorRegistry
from stores import lookups, new, new_postgres_store

from mnemosyned.errors import StorageUnavailable
from mnemosyned.observe.metrics import QueryMetrics
from mnemosyned.sessions.model import Session
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.postgres.address_in_use import PostgresOptions
from mnemosyned.storage.postgres.pool import PostgresPool
from mnemosyned.storage.postgres.schema import Table
from mnemosyned.storage.postgres.session_settings import settings_of
from mnemosyned.storage.postgres.store import PostgresStore

pytestmark = needs_pgbouncer
TABLE = Table(schema="mnemosyne", name="session")
SHOWN = "SELECT name, setting FROM pg_settings WHERE name = ANY($1::text[])"


async def roundtrip(store: PostgresStore) -> None:
    (started,) = await store.start([new("a-token-of-this-test")])
    assert isinstance(started, Session)
    (found,) = await store.load(lookups("a-token-of-this-test"))
    assert isinstance(found, Session)
    assert await store.abandon([]) == []


async def opened(store: PostgresStore) -> PostgresStore:
    """Open a store as the daemon does: again, while it is unavailable, as on a busy machine."""
    async with asyncio.timeout(20):
        while True:
            try:
                await store.open()
            except StorageUnavailable:
                await asyncio.sleep(0.05)
            else:
                return store


async def settings_in(store: PostgresStore) -> dict[str, str]:
    async with store._pool.connection() as connection:
        names = [*settings_of(5, 15), "application_name"]
        return {row["name"]: row["setting"] for row in await connection.fetch(SHOWN, names)}


async def test_session_mode_works_out_of_the_box_with_all_limits_in_force(
    postgres_dsn: str, tmp_path: Path
) -> None:
    with pooled(postgres_dsn, tmp_path, pool_mode="session") as pooler:
        store = new_postgres_store(pooler.dsn, TABLE)
        await store.open()

        assert await settings_in(store) == settings_of(5, 15)
        await asyncio.gather(*(store.now_us() for _ in range(20)))
        await roundtrip(store)
        await store.close()


@pytest.mark.parametrize("extra", [{}, {"server_round_robin": "1"}, {"default_pool_size": "1"}], ids=str)
async def test_transaction_mode_ends_the_start_and_leaves_no_settings_to_other_clients(
    postgres_dsn: str, tmp_path: Path, extra: dict[str, str]
) -> None:
    with pooled(postgres_dsn, tmp_path, pool_mode="transaction", **extra) as pooler:
        with pytest.raises(StorageRefused, match=r"transaction mode.*pool_mode=session"):
            await new_postgres_store(pooler.dsn, TABLE).open()

        other = await asyncpg.connect(pooler.dsn, statement_cache_size=0)
        async with other.transaction():
            left = {row["name"]: row["setting"] for row in await other.fetch(SHOWN, list(settings_of(5, 15)))}
        await other.close()
        assert (left["statement_timeout"], left["enable_seqscan"]) == ("0", "on")


async def test_transaction_mode_is_found_on_a_pooler_that_others_use(
    postgres_dsn: str, tmp_path: Path
) -> None:
    with pooled(postgres_dsn, tmp_path, pool_mode="transaction", default_pool_size="6") as pooler:
        others = [await asyncpg.connect(pooler.dsn) for _ in range(6)]

        async def use(connection: asyncpg.Connection) -> None:
            while True:
                await connection.execute("BEGIN; SELECT 1; COMMIT")

        using = [asyncio.create_task(use(one)) for one in others]
        for _ in range(5):
            with pytest.raises(StorageRefused, match="transaction mode"):
                await opened(new_postgres_store(pooler.dsn, TABLE))
        for task in using:
            task.cancel()
        await asyncio.gather(*using, return_exceptions=True)
        for one in others:
            one.terminate()


async def test_statement_mode_ends_the_start(postgres_dsn: str, tmp_path: Path) -> None:
    with (
        pooled(postgres_dsn, tmp_path, pool_mode="statement") as pooler,
        pytest.raises(StorageRefused, match=r"statement mode.*pool_mode=session"),
    ):
        await new_postgres_store(pooler.dsn, TABLE).open()


async def test_a_pooler_that_resets_nothing_between_clients_works(postgres_dsn: str, tmp_path: Path) -> None:
    # One server connection, on which an earlier client has prepared a statement and set what does harm.
    with pooled(
        postgres_dsn, tmp_path, pool_mode="session", server_reset_query="", default_pool_size="3"
    ) as pooler:
        earlier = await asyncpg.connect(pooler.dsn)
        for number in range(200):
            await earlier.execute(f"PREPARE __asyncpg_stmt_{number:x}__ AS SELECT 1")
        await earlier.execute("SET default_transaction_isolation = serializable; SET statement_timeout = 1")
        await earlier.close()
        for _ in range(3):
            store = await opened(new_postgres_store(pooler.dsn, TABLE))
            assert (await settings_in(store))["default_transaction_isolation"] == "read committed"
            await store.now_us()
            await store.close()


async def test_a_restart_of_the_pooler_is_survived(postgres_dsn: str, tmp_path: Path) -> None:
    with pooled(postgres_dsn, tmp_path, pool_mode="session") as pooler:
        store = new_postgres_store(pooler.dsn, TABLE)
        await store.open()
        pooler.stop()
        with pytest.raises(StorageUnavailable):
            await store.now_us()
        pooler.start()

        async with asyncio.timeout(10):
            while True:
                try:
                    await store.now_us()
                except StorageUnavailable:
                    await asyncio.sleep(0.05)
                else:
                    break
        await roundtrip(store)
        await store.close()


async def test_calls_wait_for_the_connections_there_are_if_the_pooler_has_no_more(
    postgres_dsn: str, tmp_path: Path
) -> None:
    with pooled(postgres_dsn, tmp_path, pool_mode="session", default_pool_size="2") as pooler:
        options = PostgresOptions(dsn=pooler.dsn, pool_size=8, connect_timeout_s=0.5, statement_timeout_s=4)
        store = PostgresStore(PostgresPool(options, QueryMetrics(CollectorRegistry())), TABLE)
        await store.open()
        # The first of them find out.
        await asyncio.gather(*(store.now_us() for _ in range(30)))
        begun_s = asyncio.get_running_loop().time()
        await asyncio.gather(*(store.now_us() for _ in range(30)))
        took_s = asyncio.get_running_loop().time() - begun_s
        await store.close()

    assert took_s < 0.5


async def test_limits_of_the_role_and_the_database_do_not_win(postgres_dsn: str) -> None:
    connection = await asyncpg.connect(postgres_dsn)
    await connection.execute(
        "CREATE ROLE odd SUPERUSER LOGIN PASSWORD 'a-password-of-this-test';"
        "ALTER ROLE odd SET statement_timeout = 20; ALTER ROLE odd SET lock_timeout = 0;"
        "ALTER ROLE odd SET default_transaction_isolation = serializable"
    )
    database = await connection.fetchval("SELECT current_database()")
    await connection.execute(f"ALTER DATABASE {database} SET idle_session_timeout = 1000")
    await connection.close()
    dsn = postgres_dsn.replace(postgres_dsn[11 : postgres_dsn.index("@")], "odd:a-password-of-this-test")
    store = new_postgres_store(dsn, TABLE)
    try:
        await store.open()

        assert await settings_in(store) == settings_of(5, 15)
        await store.close()
    finally:
        connection = await asyncpg.connect(postgres_dsn)
        await connection.execute("DROP SCHEMA IF EXISTS mnemosyne CASCADE; DROP ROLE odd")
        await connection.close()


@pytest.mark.parametrize("method", ["md5", "trust", "plain"])
async def test_each_way_of_a_pooler_to_know_its_clients_works(
    postgres_dsn: str, tmp_path: Path, method: str
) -> None:
    with pooled(postgres_dsn, tmp_path, pool_mode="session", auth_type=method) as pooler:
        store = new_postgres_store(pooler.dsn, TABLE)
        await store.open()
        await roundtrip(store)
        await store.close()


async def test_a_unix_socket_is_a_host_that_begins_with_a_slash(postgres_dsn: str) -> None:
    # Not pytest's directory: the name of a socket has 107 bytes at most.
    with (
        tempfile.TemporaryDirectory() as name,
        pooled(postgres_dsn, Path(name), pool_mode="session", unix_socket_dir=name) as pooler,
    ):
        parts = urlsplit(pooler.dsn)
        credentials = f"{parts.username}:{parts.password}"
        for dsn in (
            f"postgres://{credentials}@{quote(name, safe='')}:{pooler.port}{parts.path}",
            f"postgres://{credentials}@{parts.path}?host={name}&port={pooler.port}",
            f"postgres://{credentials}@localhost{parts.path}?host={name}&port={pooler.port}&sslmode=require",
        ):
            store = await opened(new_postgres_store(dsn, TABLE))
            await store.now_us()
            await store.close()
