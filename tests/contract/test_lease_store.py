"""The rows of nodes, by which leases are given (`cluster/lease.py`): one suite, run on each shared engine."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
import stores
from poolers import needs_pgbouncer, pooled
from replicas import execute, promote, replicas, until_true
from stores import new_postgres_store

from cluster.node_row import NodeRow, Renewal, Renewed
from mnemosyned.sessions.store import LeaseStore, StorageRefused
from mnemosyned.sessions.token_hash import TokenHasher
from mnemosyned.storage.hashed import HashedStore
from mnemosyned.storage.postgres.node_table import NodeTable, name_beside
from mnemosyned.storage.postgres.queries import Query
from mnemosyned.storage.postgres.schema import Table

ONE, OTHER = 2**62 + 1, 7  # instances


@pytest.fixture(params=[*stores.CHECKABLE, *stores.flavours(), "hashed memory"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[LeaseStore]:
    async with stores.opened(request.param.removeprefix("hashed "), request) as engine:
        if request.param.startswith("hashed"):
            yield HashedStore(
                engine.store, TokenHasher([b"a key that only these tests know"], is_hashing=True)
            )
        else:
            yield engine.store


def rows(answer: Renewed) -> dict[str, NodeRow]:
    return {row.name: row._replace(age_us=0) for row in answer.rows}


def renewal(
    number: int,
    *,
    name: str = "a",
    instance: int = ONE,
    ring: str = "r",
    seen: int = 0,
    replaces: tuple[int, int] = (0, 0),
) -> Renewal:
    return Renewal(name, instance, number, ring, seen, replaces)


async def test_a_renewal_makes_a_row_and_shows_those_of_all_nodes(store: LeaseStore) -> None:
    await store.renew(renewal(1, name="b", instance=OTHER, ring=""))
    first = await store.renew(renewal(1))
    await asyncio.sleep(0.01)
    second = await store.renew(renewal(2, ring="another", seen=1))

    assert rows(first) == {
        "a": NodeRow("a", ONE, 1, "r", epoch=1, base=1, seen=0),
        "b": NodeRow("b", OTHER, 1, "", epoch=1, base=1, seen=0),
    }
    assert rows(second)["a"] == NodeRow("a", ONE, 2, "another", epoch=1, base=1, seen=1)
    assert first.identity == second.identity
    assert first.clock_us < second.clock_us
    (age_us,) = (row.age_us for row in second.rows if row.name == "b")
    assert 5_000 < age_us < 10_000_000


async def test_a_renewal_that_was_held_up_puts_nothing_back(store: LeaseStore) -> None:
    await store.renew(renewal(3, ring="new"))

    answer = await store.renew(renewal(2, ring="old"))
    again = await store.renew(renewal(3, ring="same number"))

    assert rows(answer)["a"] == rows(again)["a"] == NodeRow("a", ONE, 3, "new", epoch=1, base=1, seen=0)


async def test_another_process_replaces_a_row_only_as_it_has_seen_it(store: LeaseStore) -> None:
    await store.renew(renewal(5))

    refused = await store.renew(renewal(9, instance=OTHER, ring="other"))
    late = await store.renew(renewal(10, instance=OTHER, ring="other", replaces=(ONE, 4)))
    taken = await store.renew(renewal(11, instance=OTHER, ring="other", replaces=(ONE, 5)))
    former = await store.renew(renewal(6))

    assert rows(refused) == rows(late) == {"a": NodeRow("a", ONE, 5, "r", epoch=1, base=1, seen=0)}
    assert rows(taken) == rows(former) == {"a": NodeRow("a", OTHER, 11, "other", epoch=1, base=1, seen=0)}


async def test_a_bar_raises_the_epoch_and_a_renewal_keeps_it(store: LeaseStore) -> None:
    await store.renew(renewal(1))

    bars = [await store.bar("a") for _ in range(2)]
    answer = await store.renew(renewal(2, seen=2))

    assert [bar and (bar.epoch, bar.instance, bar.number) for bar in bars] == [(2, ONE, 1), (3, ONE, 1)]
    assert {bar.identity for bar in bars if bar is not None} == {answer.identity}
    assert rows(answer)["a"] == NodeRow("a", ONE, 2, "r", epoch=3, base=1, seen=2)
    assert await store.bar("nobody") is None


async def test_no_row_has_seen_an_epoch_that_is_still_to_come(store: LeaseStore) -> None:
    made = await store.renew(renewal(1, seen=90))
    await store.resign(("a", ONE, None))
    await store.renew(renewal(2, seen=10))
    raised = await store.renew(renewal(3, seen=91))

    assert rows(made)["a"] == NodeRow("a", ONE, 1, "r", epoch=91, base=91, seen=90)
    assert rows(raised)["a"] == NodeRow("a", ONE, 3, "r", epoch=92, base=11, seen=91)


async def test_a_node_resigns_and_no_other_by_mistake(store: LeaseStore) -> None:
    await store.renew(renewal(4))
    await store.renew(renewal(1, name="b"))

    await store.resign(("a", OTHER, None))
    await store.resign(("a", ONE, 3))
    await store.resign(("nobody", ONE, None))
    kept = await store.renew(renewal(2, name="b"))
    await store.resign(("a", ONE, 4))
    await store.resign(("a", ONE, 4))
    left = await store.renew(renewal(3, name="b"))

    assert set(rows(kept)) == {"a", "b"}
    assert set(rows(left)) == {"b"}


async def test_what_happens_at_once_happens_in_some_sequence(store: LeaseStore) -> None:
    await store.renew(renewal(1))
    rng = random.Random(1)
    numbers = [*range(2, 42)]
    rng.shuffle(numbers)

    async def bar() -> int:
        barred = await store.bar("a")
        assert barred is not None
        return barred.epoch

    answers, epochs = await asyncio.gather(
        asyncio.gather(*(store.renew(renewal(number)) for number in numbers)),
        asyncio.gather(*(bar() for _ in range(40))),
    )
    last = rows(await store.renew(renewal(42)))["a"]

    # Each bar has its own epoch, and none is lost; nor is the latest renewal.
    assert sorted(epochs) == list(range(2, 42))
    assert (last.epoch, last.number) == (41, 42)
    assert max(rows(answer)["a"].number for answer in answers) == 41


# PostgreSQL.


class OnOneConnection:
    """Stands in for the pool, which refuses a pooler in transaction mode for the sake of other statements."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    async def fetch(self, query: Query, *args: object, **_: object) -> list[asyncpg.Record]:
        rows: list[asyncpg.Record] = await self._connection.fetch(query.sql, *args)
        return rows


@needs_pgbouncer
async def test_it_works_behind_a_pooler_in_session_mode(postgres_dsn: str, tmp_path: Path) -> None:
    with pooled(postgres_dsn, tmp_path, pool_mode="session") as pooler:
        store = new_postgres_store(pooler.dsn, Table(schema="public", name="session"))
        await store.open()
        await is_kept_by(store)
        await store.close()


@needs_pgbouncer
async def test_its_statements_work_behind_a_pooler_in_transaction_mode(
    postgres_dsn: str, tmp_path: Path
) -> None:
    table = Table(schema="public", name="session")
    direct = new_postgres_store(postgres_dsn, table)
    await direct.open()
    await direct.close()
    with pooled(postgres_dsn, tmp_path, pool_mode="transaction") as pooler:
        connection = await asyncpg.connect(pooler.dsn, statement_cache_size=0)
        await connection.set_type_codec(
            "timestamptz", schema="pg_catalog", encoder=str, decoder=lambda _: 1, format="text"
        )
        await is_kept_by(NodeTable(OnOneConnection(connection), table))  # type: ignore[arg-type]
        await connection.close()


async def is_kept_by(store: LeaseStore) -> None:
    for number in range(1, 30):
        answer = await store.renew(renewal(number))
        barred = await store.bar("a")
        assert rows(answer)["a"].number == number
    assert barred is not None
    assert barred.epoch == 30
    await store.resign(("a", ONE, None))
    assert await store.bar("a") is None


async def test_a_server_that_was_restarted_or_promoted_is_another_store(tmp_path: Path) -> None:
    with replicas(tmp_path) as servers:
        table = Table(schema="public", name="session")
        store = new_postgres_store(servers.primary.dsn, table)
        await store.open()
        before = await store.renew(renewal(1))
        barred = await store.bar("a")
        assert barred is not None
        await store.close()

        lsn = execute(servers.primary.dsn, "SELECT pg_current_wal_lsn()::text")[0][0]
        until_true(servers.standby.dsn, f"SELECT pg_last_wal_replay_lsn() >= '{lsn}'")
        promote(servers.standby)
        copy = new_postgres_store(servers.standby.dsn, table)
        await copy.open()
        after = await copy.renew(renewal(2))
        await copy.close()

    assert barred.identity == before.identity != after.identity
    assert rows(after)["a"].epoch == 2


async def test_the_table_is_made_again_when_it_was_dropped_and_is_another_store(postgres_dsn: str) -> None:
    store = new_postgres_store(postgres_dsn, Table(schema="public", name="session"))
    await store.open()
    before = await store.renew(renewal(1))
    execute(postgres_dsn, "DROP TABLE public.session_node")
    async with asyncio.timeout(20):
        while True:
            try:
                after = await store.renew(renewal(2))
                break
            except Exception:  # noqa: BLE001  # StorageUnavailable, until the table is made again
                await asyncio.sleep(0.2)
    await store.close()

    assert after.identity != before.identity


async def test_a_role_that_may_not_make_the_table_is_told_the_sql(postgres_dsn: str) -> None:
    table = Table(schema="public", name="session")
    store = new_postgres_store(postgres_dsn, table)
    await store.open()
    await store.close()
    execute(
        postgres_dsn,
        "DROP TABLE public.session_node",
        "CREATE ROLE plain LOGIN PASSWORD 'p'",
        "REVOKE CREATE ON SCHEMA public FROM PUBLIC",
        "GRANT SELECT, INSERT, UPDATE, DELETE ON public.session TO plain",
        "GRANT pg_read_all_settings TO plain",
    )
    try:
        before, _, where = postgres_dsn.partition("@")
        plain = new_postgres_store(f"{before.partition('//')[0]}//plain:p@{where}", table)
        with pytest.raises(StorageRefused, match="may not make it") as missing:
            await plain.open()
        created, _, granted = str(missing.value).partition("This SQL mends it: ")[2].partition("; ")
        execute(postgres_dsn, created)
        with pytest.raises(StorageRefused, match="lacks SELECT, INSERT, UPDATE, DELETE") as lacking:
            await plain.open()
        assert str(lacking.value).endswith(granted)
        execute(postgres_dsn, granted)
        await plain.open()
        assert rows(await plain.renew(renewal(1)))["a"].number == 1
        await plain.close()
    finally:
        execute(postgres_dsn, "DROP OWNED BY plain", "DROP ROLE plain")


async def test_renewals_write_in_place(postgres_dsn: str) -> None:
    store = new_postgres_store(postgres_dsn, Table(schema="public", name="session"))
    await store.open()
    for number in range(1, 400):
        await store.renew(renewal(number))
    await store.close()
    await asyncio.sleep(0)
    connection = await asyncpg.connect(postgres_dsn)
    try:
        await connection.execute("SELECT pg_stat_force_next_flush()")
        async with asyncio.timeout(20):
            while True:
                row = await connection.fetchrow(
                    "SELECT n_tup_upd, n_tup_hot_upd, pg_relation_size(relid) AS size "
                    "FROM pg_stat_user_tables WHERE relname = 'session_node'"
                )
                assert row is not None
                if row["n_tup_upd"] >= 398:
                    break
                await asyncio.sleep(0.1)
    finally:
        await connection.close()

    assert row["n_tup_hot_upd"] > 0.95 * row["n_tup_upd"]
    assert row["size"] <= 5 * 8192


@pytest.mark.parametrize("name", ["session", "x" * 58, "x" * 59, "ü" * 31, "y" * 63])
def test_the_tables_name_is_never_cut_to_that_of_another(name: str) -> None:
    beside = name_beside(name)

    assert beside.endswith("_node")
    assert len(beside.encode()) <= 63
    assert name_beside(name[:-1] + "z") != beside
