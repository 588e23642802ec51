"""Rows that a writer with SQL has put into the table: each is one session's loss, on both engines of gRPC."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import asyncpg
import damaged
import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from mnemosynerpc.session_pb2 import (
    DeleteRequest,
    ExistsRequest,
    GetRequest,
    ListRequest,
    Query,
    Session,
    SetValueRequest,
    StartRequest,
)
from serving import ENGINES, Node, serving
from stores import lookups, new, new_postgres_store

from mnemosyned.commands.check import check_all
from mnemosyned.errors import CorruptSession
from mnemosyned.sessions import bag
from mnemosyned.sessions.bag import DEFAULT_LIMITS
from mnemosyned.sessions.model import ValueChange
from mnemosyned.storage.postgres.schema import Table
from mnemosyned.storage.postgres.store import PostgresStore

TABLE = Table(schema="mnemosyne", name="session")
BAG = bag.encode({"k": "v"})
LATE = Timestamp(seconds=253_402_214_400)  # the last day of the year 9999
TOKEN = b"a-secret-token-"
# Statements that damage the row with this token, which is healthy.
DAMAGE = {
    "no subject": "subject_id = NULL",
    "no bag": "bag = NULL",
    "a long subject": "subject_id = repeat('s', 2049)",
    "a long client": "subject_client = repeat('c', 65537)",
    "a long refresh token": "refresh_token = decode(repeat('00', 2049), 'hex')",
    "a refresh token that is not UTF-8": "refresh_token = '\\xff'",
    # In pieces: a byte at a time it takes the server seconds.
    "a bag of 300 MB": (
        "bag = (SELECT string_agg(decode(repeat('00', 1000000), 'hex'), '') FROM generate_series(1, 300))"
    ),
}


@pytest.fixture
async def store(postgres_dsn: str) -> AsyncIterator[PostgresStore]:
    store = new_postgres_store(postgres_dsn, TABLE)
    await store.open()
    yield store
    await store.close()


@pytest.fixture(params=ENGINES)
async def node(store: PostgresStore, request: pytest.FixtureRequest) -> AsyncIterator[Node]:
    async with serving(store, request.param) as node:
        yield node


@pytest.fixture
async def sql(
    postgres_dsn: str,
    store: PostgresStore,  # noqa: ARG001  # it makes the table
) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(postgres_dsn)
    for column in ("subject_id", "bag", "expire_at"):
        await connection.execute(f"ALTER TABLE {TABLE.sql} ALTER {column} DROP NOT NULL")
    yield connection
    await connection.close()


async def insert(sql: asyncpg.Connection, tokens_and_bags: dict[bytes, bytes]) -> None:
    await sql.executemany(
        f"INSERT INTO {TABLE.sql} (access_token, subject_id, bag, expire_at) "  # noqa: S608  # a constant
        "VALUES ($1, 'by hand', $2, now() + interval '1 hour')",
        list(tokens_and_bags.items()),
    )


async def insert_bags(sql: asyncpg.Connection) -> list[str]:
    """Put every kind of damaged bag into the table; return their tokens."""
    rows = {TOKEN + name.encode(): stored for name, stored in damaged.BAGS.items()}
    await insert(sql, rows)
    return [token.decode() for token in rows]


async def insert_all(sql: asyncpg.Connection) -> list[str]:
    """Put every kind of damaged row into the table; return their tokens."""
    bags = await insert_bags(sql)
    await insert(sql, {TOKEN + name.encode(): BAG for name in DAMAGE})
    for name, assignment in DAMAGE.items():
        await sql.execute(
            f"UPDATE {TABLE.sql} SET {assignment} WHERE access_token = $1",  # noqa: S608  # constants
            TOKEN + name.encode(),
        )
    return bags + [(TOKEN + name.encode()).decode() for name in DAMAGE]


async def outcome(call: grpc.aio.UnaryUnaryCall) -> str:
    try:
        return damaged.FORGED if damaged.FORGED in str(await call) else "OK"
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)


async def test_a_damaged_row_is_one_sessions_loss_and_overrides_nothing(
    node: Node, sql: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = await insert_all(sql)
    healthy = (await node.stub.Start(StartRequest(session=Session(subject_id="s")))).session.access_token
    node.cache.drop(healthy)

    for _ in range(2):
        calls = [node.stub.Get(GetRequest(access_token=token)) for token in (*tokens, healthy)]
        outcomes = await asyncio.gather(*map(outcome, calls))
        assert dict(zip(tokens, outcomes, strict=False)) == dict.fromkeys(tokens, "DATA_LOSS")
        assert outcomes[-1] == "OK"
    assert await outcome(node.stub.Exists(ExistsRequest(access_token=tokens[0]))) == "OK"
    assert all(token not in caplog.text for token in tokens)
    assert not [line for line in caplog.records if line.exc_info]


async def test_a_value_is_not_set_in_a_damaged_bag(node: Node, sql: asyncpg.Connection) -> None:
    bags = await insert_bags(sql)
    healthy = (await node.stub.Start(StartRequest(session=Session(subject_id="s")))).session.access_token

    calls = [node.stub.SetValue(SetValueRequest(access_token=token, key="a")) for token in (*bags, healthy)]
    *lost, last = await asyncio.gather(*map(outcome, calls))

    assert dict(zip(bags, lost, strict=True)) == dict.fromkeys(bags, "DATA_LOSS")
    assert last == "OK"


async def test_list_leaves_damaged_sessions_out_and_says_how_many(
    node: Node, sql: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = await insert_all(sql)
    await insert(sql, {b"\xff": BAG, b"": BAG, b"nul\0": BAG, b"\0nul": BAG, b"t" * 4097: BAG})
    healthy = (await node.stub.Start(StartRequest(session=Session(subject_id="s")))).session.access_token

    with caplog.at_level(logging.ERROR):
        page = await node.stub.List(ListRequest(limit=1000))

    assert [session.access_token for session in page.sessions] == [healthy]
    assert page.left_out == len(tokens) + 5
    logged = [line for line in caplog.records if line.message == "session_damaged"]
    assert len(logged) == page.left_out
    assert all(line.session and line.reason for line in logged)  # type: ignore[attr-defined]  # extra fields
    assert (await node.stub.Delete(DeleteRequest(subject_id="by hand"))).value == len(tokens) + 5 - 2


async def test_pages_by_token_leave_each_damaged_session_out_once(
    node: Node, sql: asyncpg.Connection
) -> None:
    tokens = await insert_all(sql)
    await insert(sql, {b"\xff": BAG, b"": BAG, b"nul\0": BAG, b"\0nul": BAG, b"t" * 4097: BAG})
    healthy = (await node.stub.Start(StartRequest(session=Session(subject_id="s")))).session.access_token
    for first_token in (None, ""):
        for limit in (1, 2, 1000):
            request = ListRequest(limit=limit, page_token=first_token)
            shown, left_out, is_first = [], 0, True
            while is_first or request.page_token:
                page = await node.stub.List(request)
                shown += [session.access_token for session in page.sessions]
                left_out += page.left_out
                request.page_token, is_first = page.next_page_token, False
            assert (shown, left_out) == ([healthy], len(tokens) + 5)


async def test_sessions_without_an_end_live_to_the_end_of_the_calendar(
    node: Node, sql: asyncpg.Connection
) -> None:
    expiries = {b"forever": "infinity", b"far": "20000-01-01", b"past": "-infinity", b"old": "0044-03-15 BC"}
    await insert(sql, dict.fromkeys(expiries, BAG))
    for token, expiry in expiries.items():
        await sql.execute(
            f"UPDATE {TABLE.sql} SET expire_at = $2::text::timestamptz WHERE access_token = $1",  # noqa: S608
            token,
            expiry,
        )

    gets = [await node.stub.Get(GetRequest(access_token=token)) for token in ("forever", "far")]
    page = await node.stub.List(ListRequest(query=Query(expire_at_from=LATE)))
    gone = [await outcome(node.stub.Get(GetRequest(access_token=token))) for token in ("past", "old")]
    value = await outcome(node.stub.SetValue(SetValueRequest(access_token="forever", key="k", value="v")))
    deleted = await node.stub.Delete(DeleteRequest(expire_at_from=LATE))

    assert [str(get.session.expire_at.ToJsonString()) for get in gets] == ["9999-12-31T23:59:59.999999Z"] * 2
    assert [session.access_token for session in page.sessions] == ["far", "forever"]
    assert (page.left_out, gone, value, deleted.value) == (0, ["NOT_FOUND"] * 2, "OK", 2)


async def test_a_mended_row_is_read_at_once(node: Node, sql: asyncpg.Connection) -> None:
    await insert(sql, {b"t": damaged.BAGS["another subject"]})
    assert await outcome(node.stub.Get(GetRequest(access_token="t"))) == "DATA_LOSS"

    await sql.execute(f"UPDATE {TABLE.sql} SET bag = $1", BAG)  # noqa: S608  # a constant

    assert (await node.stub.Get(GetRequest(access_token="t"))).session.subject_id == "by hand"


async def test_check_finds_each_damaged_row_and_removes_it(
    store: PostgresStore, sql: asyncpg.Connection
) -> None:
    tokens = await insert_all(sql)
    await insert(sql, {b"\xff": BAG, b"": BAG, b"no expiry": BAG, b"healthy": BAG, b"\0" + b"0a" * 36: BAG})
    await sql.execute(f"UPDATE {TABLE.sql} SET expire_at = NULL WHERE access_token = 'no expiry'")  # noqa: S608
    lines: list[str] = []

    found = await check_all(store, DEFAULT_LIMITS, is_fixing=False, write=lines.append)
    fixed = await check_all(store, DEFAULT_LIMITS, is_fixing=True, write=lines.append)
    after = await check_all(store, DEFAULT_LIMITS, is_fixing=True, write=lines.append)

    assert (found.checked, found.damaged, found.removed) == (len(tokens) + 5, len(tokens) + 3, 0)
    assert (fixed.damaged, fixed.removed) == (len(tokens) + 3,) * 2
    assert (after.checked, after.damaged) == (2, 0)
    assert len(lines) == 2 * (len(tokens) + 3)
    assert not any(TOKEN.decode() in line for line in lines)


async def test_check_keeps_a_row_that_has_changed_meanwhile(
    store: PostgresStore, sql: asyncpg.Connection
) -> None:
    await insert(sql, {b"mended": damaged.BAGS["zeros"], b"still damaged": damaged.BAGS["text"]})
    page = await store.stored_from("", limit=10)
    await sql.execute(f"UPDATE {TABLE.sql} SET bag = '' WHERE access_token = 'mended'")  # noqa: S608

    assert await store.remove_unchanged(page) == ["still damaged"]
    assert await sql.fetchval(f"SELECT access_token FROM {TABLE.sql}") == b"mended"  # noqa: S608


async def test_check_reads_pages_of_bounded_size(store: PostgresStore, sql: asyncpg.Connection) -> None:
    large = bag.encode({"k": "x" * 3_900_000})
    await insert(sql, {b"%d" % number: large for number in range(9)})

    page = await store.stored_from("", limit=1000)
    counts = await check_all(store, DEFAULT_LIMITS, is_fixing=False, write=lambda _: None)

    assert len(page) == 5
    assert (counts.checked, counts.damaged) == (9, 0)


async def test_bytes_that_are_no_text_in_a_database_without_an_encoding_harm_only_their_session(
    postgres_dsn: str,
) -> None:
    connection = await asyncpg.connect(postgres_dsn)
    name = f"ascii_{postgres_dsn.rpartition('/')[2]}"
    await connection.execute(f"CREATE DATABASE {name} ENCODING SQL_ASCII TEMPLATE template0 LOCALE 'C'")
    dsn = f"{postgres_dsn.rpartition('/')[0]}/{name}"
    store = new_postgres_store(dsn, TABLE)
    await store.open()
    await store.start([new("bad"), new("sound", subject_id="ż")])
    sql = await asyncpg.connect(dsn)
    await sql.execute(f"UPDATE {TABLE.sql} SET subject_id = E'\\xff' WHERE access_token = 'bad'")  # noqa: S608
    bad, sound = await store.load(lookups("bad", "sound"))
    changes = [ValueChange(access_token=token, key="k", value="v") for token in ("bad", "sound")]
    unchanged, changed = await store.set_values(changes)
    await sql.close()
    await store.close()
    await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await connection.close()

    assert isinstance(bad, CorruptSession)
    assert sound.subject_id == "ż"  # type: ignore[union-attr]
    assert isinstance(unchanged, CorruptSession)
    assert changed.values["k"] == "v"  # type: ignore[union-attr]
