"""A table that others made gets its form while it is in use, and stays usable for those who made it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import asyncpg
import pytest
from stores import lookups, new, new_postgres_store

from mnemosyned.errors import StorageUnavailable
from mnemosyned.sessions.model import Criteria, Session, Touch
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.postgres import migration
from mnemosyned.storage.postgres.queries import Queries
from mnemosyned.storage.postgres.schema import FILLFACTOR, Table
from mnemosyned.storage.postgres.store import PostgresStore
from mnemosyned.storage.postgres.walks import WalksByDueTime

TABLE = Table(schema="mnemosyne", name="session")
OF_THE_GO_DAEMON = (
    "CREATE SCHEMA mnemosyne;"
    "CREATE TABLE mnemosyne.session (access_token BYTEA PRIMARY KEY, refresh_token BYTEA, "
    "subject_id TEXT NOT NULL, subject_client TEXT, bag bytea NOT NULL, "
    "expire_at TIMESTAMPTZ NOT NULL DEFAULT (NOW() + '1440 seconds'));"
    "CREATE INDEX ON mnemosyne.session (refresh_token);"
    "CREATE INDEX ON mnemosyne.session (subject_id);"
    "CREATE INDEX ON mnemosyne.session (expire_at DESC);"
)
INSERT_OF_THE_GO_DAEMON = (
    f"INSERT INTO {TABLE.sql} (access_token, subject_id, bag, expire_at) "  # noqa: S608
    "VALUES ($1, 'by go', '', now() + $2::float8 * interval '1 second')"
)
WANTED = {("access_token",), ("due_at",), ("refresh_token",), ("subject_id",)}


async def until(condition: Callable[[], Awaitable[bool]], limit_s: float = 20) -> None:
    deadline_s = time.monotonic() + limit_s
    while not await condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.02)


@pytest.fixture
async def sql(postgres_dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(postgres_dsn)
    await connection.execute(OF_THE_GO_DAEMON)
    yield connection
    await connection.close()


@pytest.fixture
async def store(postgres_dsn: str, sql: asyncpg.Connection) -> AsyncIterator[PostgresStore]:  # noqa: ARG001
    store = new_postgres_store(postgres_dsn, TABLE)
    yield store
    await store.close()


def is_due(store: PostgresStore) -> bool:
    return isinstance(store._queries.walks, WalksByDueTime)


async def indexes(sql: asyncpg.Connection) -> set[tuple[str, ...]]:
    rows = await sql.fetch(migration._READ_INDEXES, TABLE.sql)
    return {tuple(row["columns"]) for row in rows if row["is_valid"]}


async def stored(sql: asyncpg.Connection) -> set[bytes]:
    rows = await sql.fetch(f"SELECT access_token FROM {TABLE.sql}")  # noqa: S608
    return {row["access_token"] for row in rows}


async def test_a_table_of_the_go_daemon_is_migrated_and_keeps_its_sessions(
    store: PostgresStore, sql: asyncpg.Connection
) -> None:
    await sql.execute(INSERT_OF_THE_GO_DAEMON, b"live", 600.0)
    await sql.execute(INSERT_OF_THE_GO_DAEMON, b"over", -1.0)
    await store.open()
    (found,) = await store.load(lookups("live"))

    assert is_due(store)
    assert isinstance(found, Session)
    assert await indexes(sql) == WANTED
    assert await sql.fetchval(f"SELECT reloptions FROM pg_class WHERE oid = '{TABLE.sql}'::regclass") == [  # noqa: S608
        f"fillfactor={FILLFACTOR}"
    ]
    assert await store.clean_up(limit=10) == ["over"]
    assert await stored(sql) == {b"live"}


async def test_the_column_is_added_without_reading_or_rewriting_the_table(
    store: PostgresStore, sql: asyncpg.Connection
) -> None:
    await sql.execute(INSERT_OF_THE_GO_DAEMON, b"live", 600.0)
    file = await sql.fetchval(f"SELECT pg_relation_filenode('{TABLE.sql}')")
    await store.open()

    assert await sql.fetchval(f"SELECT pg_relation_filenode('{TABLE.sql}')") == file


async def test_sessions_of_the_go_daemon_are_found_listed_and_cleaned_up_on_a_migrated_table(
    store: PostgresStore, sql: asyncpg.Connection
) -> None:
    await store.open()
    await store.start([new("ours")])
    await sql.execute(INSERT_OF_THE_GO_DAEMON, b"go", 600.0)
    await sql.execute(INSERT_OF_THE_GO_DAEMON, b"brief", 0.05)
    # It extends a session, and shortens another.
    expiry = "now() + $2::float8 * interval '1 second'"
    moved = f"UPDATE {TABLE.sql} SET expire_at = {expiry} WHERE access_token = $1"  # noqa: S608
    await sql.execute(moved, b"go", 3600.0)
    await sql.execute(moved, b"ours", 0.05)
    await asyncio.sleep(0.1)
    removed = await store.clean_up(limit=10)
    listed = await store.find(Criteria(), offset=0, limit=10)

    assert sorted(removed) == ["brief", "ours"]
    assert [session.access_token for session in listed.sessions] == ["go"]


async def test_a_node_of_the_former_version_works_on_a_migrated_table(
    store: PostgresStore, postgres_dsn: str
) -> None:
    await store.open()
    former = new_postgres_store(postgres_dsn, TABLE)
    await former.open()
    former._queries = Queries(TABLE.sql)
    await former.start([new("former"), new("brief", ttl_us=50_000)])
    (found,) = await store.load(lookups("former"))
    await store.start([new("newer")])
    listed = await former.find(Criteria(), offset=0, limit=10)
    await asyncio.sleep(0.1)
    removed = await former.clean_up(limit=10)
    await former.close()

    assert isinstance(found, Session)
    assert {session.access_token for session in listed.sessions} >= {"former", "newer"}
    assert removed == ["brief"]


async def test_an_index_that_a_daemon_of_the_former_version_makes_again_is_dropped(
    store: PostgresStore, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migration, "_LOOK_AGAIN_S", 0.1)
    await store.open()
    await sql.execute(f"CREATE INDEX ON {TABLE.sql} (expire_at, access_token)")

    async def is_dropped() -> bool:
        return await indexes(sql) == WANTED

    await until(is_dropped)


async def test_an_index_that_others_made_on_the_expiry_stays_and_is_told(
    store: PostgresStore, sql: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    await sql.execute(f"CREATE INDEX theirs ON {TABLE.sql} (expire_at, subject_id)")
    await store.open()

    assert ("expire_at", "subject_id") in await indexes(sql)
    (told,) = [record for record in caplog.records if record.message == "touches_are_costly"]
    assert vars(told)["index"] == "mnemosyne.theirs"


async def test_an_invalid_index_of_an_interrupted_build_is_made_again(
    store: PostgresStore, sql: asyncpg.Connection, postgres_dsn: str
) -> None:
    await sql.execute(f"ALTER TABLE {TABLE.sql} ADD COLUMN due_at timestamptz NOT NULL DEFAULT now()")
    other = await asyncpg.connect(postgres_dsn)
    holding = other.transaction()
    await holding.start()
    # The build waits for this transaction.
    await other.execute(INSERT_OF_THE_GO_DAEMON, b"held", 600.0)
    await sql.execute("SET statement_timeout = 500")
    with pytest.raises(asyncpg.QueryCanceledError):
        await sql.execute(f"CREATE INDEX CONCURRENTLY half ON {TABLE.sql} (due_at)")
    await holding.commit()
    await other.close()
    assert ("due_at",) not in await indexes(sql)
    await store.open()

    assert await indexes(sql) == WANTED
    assert await sql.fetchval("SELECT count(*) FROM pg_index WHERE NOT indisvalid") == 0


async def test_many_nodes_that_start_at_once_migrate_a_table_once(
    postgres_dsn: str, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migration, "_TRY_AGAIN_S", 0.05)
    stores = [new_postgres_store(postgres_dsn, TABLE) for _ in range(6)]
    await asyncio.gather(*(store.open() for store in stores))

    async def all_are_due() -> bool:
        return all(map(is_due, stores)) and await indexes(sql) == WANTED

    await until(all_are_due)
    await asyncio.gather(*(store.close() for store in stores))

    count = "SELECT count(*) FROM pg_index WHERE indrelid = to_regclass($1)"
    assert await sql.fetchval(count, TABLE.sql) == len(WANTED)


async def test_a_locked_table_delays_the_migration_and_no_call(
    store: PostgresStore,
    sql: asyncpg.Connection,
    postgres_dsn: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(migration, "_TRY_AGAIN_S", 0.2)
    other = await asyncpg.connect(postgres_dsn)
    holding = other.transaction()
    await holding.start()
    await other.execute(INSERT_OF_THE_GO_DAEMON, b"held", 600.0)
    await store.open()
    slowest_s = 0.0
    for number in range(20):
        begun_s = time.monotonic()
        (started,) = await store.start([new(f"t{number}")])
        assert isinstance(started, Session)
        slowest_s = max(slowest_s, time.monotonic() - begun_s)
        await asyncio.sleep(0.02)
    assert not is_due(store)
    assert slowest_s < 1
    await holding.commit()
    await other.close()

    async def is_migrated() -> bool:
        return is_due(store) and await indexes(sql) == WANTED

    await until(is_migrated)
    assert [record.message for record in caplog.records].count("migration_waits") == 1


async def test_a_role_that_may_not_alter_works_with_the_table_as_it_is_and_says_which_sql_to_run(
    sql: asyncpg.Connection,
    postgres_dsn: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(migration, "_LOOK_AGAIN_S", 0.1)
    await sql.execute(
        "DROP ROLE IF EXISTS mere_writer; CREATE ROLE mere_writer LOGIN PASSWORD 'hunter2';"
        "GRANT USAGE ON SCHEMA mnemosyne TO mere_writer;"
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON {TABLE.sql} TO mere_writer"
    )
    address = postgres_dsn.partition("@")[2]
    store = new_postgres_store(f"postgres://mere_writer:hunter2@{address}", TABLE)
    with pytest.raises(StorageRefused, match="may not make it") as refused:
        await store.open()
    # The table of the nodes is new, and a person makes it.
    await sql.execute(str(refused.value).partition("This SQL mends it: ")[2])
    await store.open()
    await store.start([new("live"), new("brief", ttl_us=20_000)])
    await asyncio.sleep(0.05)
    assert not is_due(store)
    assert await store.clean_up(limit=10) == ["brief"]
    assert len((await store.find(Criteria(), offset=0, limit=10)).sessions) == 1
    (told,) = [record for record in caplog.records if record.message == "migration_needs_rights"]
    # A person runs it, and the daemon notices.
    for statement in vars(told)["sql"].split("; "):
        await sql.execute(statement)

    async def is_migrated() -> bool:
        return is_due(store)

    await until(is_migrated)
    await store.close()
    await sql.execute("DROP OWNED BY mere_writer; DROP ROLE mere_writer")
    assert await indexes(sql) == WANTED


async def test_a_store_that_is_closed_during_a_migration_ends_at_once(
    store: PostgresStore, sql: asyncpg.Connection, postgres_dsn: str
) -> None:
    await sql.execute(f"ALTER TABLE {TABLE.sql} ADD COLUMN due_at timestamptz NOT NULL DEFAULT now()")
    other = await asyncpg.connect(postgres_dsn)
    holding = other.transaction()
    await holding.start()
    await other.execute(INSERT_OF_THE_GO_DAEMON, b"held", 600.0)
    await store.open()  # the build of the index waits
    begun_s = time.monotonic()
    await store.close()
    took_s = time.monotonic() - begun_s
    await holding.commit()
    await other.close()
    await store.open()

    assert took_s < 3

    async def is_migrated() -> bool:
        return is_due(store) and await indexes(sql) == WANTED

    await until(is_migrated)


async def test_a_table_that_is_replaced_by_one_of_the_former_form_fails_no_call(
    store: PostgresStore, sql: asyncpg.Connection
) -> None:
    await store.open()
    await store.check()
    assert is_due(store)
    former = OF_THE_GO_DAEMON.removeprefix("CREATE SCHEMA mnemosyne;")
    replace = f"BEGIN; DROP TABLE {TABLE.sql}; {former} COMMIT"
    for call in (
        lambda: store.start([new("t")]),
        lambda: store.find(Criteria(), offset=0, limit=10),
        lambda: store.delete(Criteria(expires_after_us=0), limit=10),
        store.check,
    ):
        await sql.execute(replace)
        store._use_form(True)
        result = await call()
        assert not is_due(store)
        assert not isinstance(result, list) or isinstance(result[0], Session)


async def test_a_check_finds_that_the_table_has_got_its_form(
    store: PostgresStore, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migration, "steps", lambda *_: [])
    await store.open()
    await store.check()
    was_due = is_due(store)
    await sql.execute(
        f"ALTER TABLE {TABLE.sql} ADD COLUMN due_at timestamptz NOT NULL DEFAULT now(); "
        f"CREATE INDEX ON {TABLE.sql} (due_at)"
    )
    await store.check()

    assert (was_due, is_due(store)) == (False, True)


async def test_a_table_that_is_made_again_has_the_new_form(
    store: PostgresStore, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnemosyned.storage.postgres.table_health._MAKE_AGAIN_AFTER_S", 0.0)
    await store.open()
    await sql.execute(f"DROP TABLE {TABLE.sql}")
    with pytest.raises(StorageUnavailable):
        await store.check()
    await store.check()

    assert await indexes(sql) == WANTED
    assert is_due(store)


async def test_an_open_that_is_cancelled_leaves_no_connection(
    store: PostgresStore, sql: asyncpg.Connection, postgres_dsn: str
) -> None:
    other = await asyncpg.connect(postgres_dsn)
    holding = other.transaction()
    await holding.start()
    await other.execute(INSERT_OF_THE_GO_DAEMON, b"held", 600.0)
    opening = asyncio.create_task(store.open())

    async def is_altering() -> bool:
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'ALTER TABLE%' AND state = 'active'"
        return bool(await sql.fetchval(waiting))

    await until(is_altering)
    opening.cancel()
    await asyncio.wait([opening])

    async def are_closed() -> bool:
        others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        return int(await sql.fetchval(others)) == 2

    await until(are_closed)
    await holding.rollback()
    await other.close()


async def test_nine_of_ten_touches_are_made_in_place(store: PostgresStore, sql: asyncpg.Connection) -> None:
    await store.open()
    tokens = [f"token-{number:0100}" for number in range(500)]
    await store.start([new(token) for token in tokens])
    now_us = await store.now_us()
    for number in range(1, 41):
        expires_at_us = now_us + 60_000_000 + number * 1000
        await store.touch([Touch(access_token=token, expires_at_us=expires_at_us) for token in tokens])
    await store.close()

    async def is_counted() -> bool:
        return bool(await sql.fetchval("SELECT sum(n_tup_upd) >= 20000 FROM pg_stat_user_tables"))

    await until(is_counted)
    assert (
        await sql.fetchval("SELECT sum(n_tup_hot_upd)::float8 / sum(n_tup_upd) FROM pg_stat_user_tables")
        > 0.9
    )


async def test_cleanup_goes_on_past_sessions_that_were_touched(
    store: PostgresStore, sql: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await store.open()
    await store.start([new(f"t{number}", ttl_us=200_000) for number in range(30)])
    later_us = await store.now_us() + 60_000_000
    kept = [f"t{number}" for number in range(25)]
    await store.touch([Touch(access_token=token, expires_at_us=later_us) for token in kept])
    await asyncio.sleep(0.3)
    # Five are over, behind 25 that were touched; a batch is ten.
    removed = await store.clean_up(limit=10)
    due = await sql.fetchval(f"SELECT count(*) FROM {TABLE.sql} WHERE due_at < expire_at")  # noqa: S608

    assert sorted(removed) == [f"t{number}" for number in range(25, 30)]
    assert due == 0


async def test_a_page_is_exact_where_touches_have_left_the_due_times_behind(
    store: PostgresStore, sql: asyncpg.Connection
) -> None:
    await store.open()
    # More than the first walk reads; every third session was touched, in another sequence.
    await sql.execute(
        f"INSERT INTO {TABLE.sql} (access_token, subject_id, bag, expire_at, due_at) "  # noqa: S608
        "SELECT n::text::bytea, 's', '', due + CASE WHEN n % 3 = 0 THEN (n * 7919 % 5000) * interval '1 s' "
        "ELSE interval '0' END, due FROM (SELECT n, now() + (n + 60) * interval '1 s' AS due "
        "FROM generate_series(1, 5000) n) AS made"
    )
    wanted = await sql.fetch(f"SELECT access_token FROM {TABLE.sql} ORDER BY expire_at, access_token")  # noqa: S608
    tokens = [row["access_token"].decode() for row in wanted]
    for offset in (0, 500, 2000, 4990, 6000):
        page = await store.find(Criteria(), offset=offset, limit=100)
        assert [session.access_token for session in page.sessions] == tokens[offset : offset + 100]


async def test_a_damaged_row_is_not_extended_by_a_read(store: PostgresStore, sql: asyncpg.Connection) -> None:
    await store.open()
    await store.start([new("damaged", ttl_us=30_000_000), new("sound", ttl_us=30_000_000)])
    await sql.execute(
        f"UPDATE {TABLE.sql} SET subject_id = repeat('s', 2049) WHERE access_token = 'damaged'"  # noqa: S608
    )
    read = f"SELECT expire_at FROM {TABLE.sql} ORDER BY access_token"  # noqa: S608
    before = await sql.fetch(read)
    await store.load(lookups("damaged", "sound"))
    after = await sql.fetch(read)

    assert after[0] == before[0]
    assert after[1] > before[1]
