"""PostgreSQL away, frozen, full or locked, under load: what callers see, and that it ends by itself."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import grpc
import pytest
from mnemosynerpc.session_pb2 import (
    AbandonRequest,
    ExistsRequest,
    GetRequest,
    ListRequest,
    Session,
    SetValueRequest,
    StartRequest,
)
from prometheus_client import CollectorRegistry
from serving import Node, serving

from mnemosyned.embedded.server import EmbeddedPostgres
from mnemosyned.observe.metrics import QueryMetrics
from mnemosyned.storage.postgres.address_in_use import PostgresOptions
from mnemosyned.storage.postgres.pool import PostgresPool
from mnemosyned.storage.postgres.schema import Table
from mnemosyned.storage.postgres.store import PostgresStore

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
TABLE = Table(schema="mnemosyne", name="session")
STATEMENT_TIMEOUT_S = 1.0


@dataclass
class Setup:
    node: Node
    server: EmbeddedPostgres

    def kill(self) -> None:
        # All at once: the backends of a dead postmaster go on until they notice.
        signal_all(self.server, signal.SIGKILL)

    async def restart(self) -> None:
        # On this thread, which the server dies with.
        self.server.restart()

    async def execute(self, sql: str) -> None:
        connection = await asyncpg.connect(self.server.dsn)
        await connection.execute(sql)
        await connection.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres.start(tmp_path / "postgres") as one:
        yield one


@pytest.fixture
async def setup(server: EmbeddedPostgres) -> AsyncIterator[Setup]:
    options = PostgresOptions(
        dsn=server.dsn, pool_size=4, connect_timeout_s=1, statement_timeout_s=STATEMENT_TIMEOUT_S
    )
    pool = PostgresPool(options, QueryMetrics(CollectorRegistry()))
    store = PostgresStore(pool, TABLE)
    await store.open()
    async with serving(store, flags=("-cache.ttl=30s",)) as node:
        yield Setup(node, server)
    await store.close()


async def started(node: Node) -> str:
    response = await node.stub.Start(StartRequest(session=Session(subject_id="s")))
    return str(response.session.access_token)


async def outcome(call: grpc.aio.UnaryUnaryCall) -> tuple[grpc.StatusCode, str, float]:
    begun_s = time.monotonic()
    try:
        await call
    except grpc.aio.AioRpcError as exc:
        return exc.code(), str(exc.details()), time.monotonic() - begun_s
    return grpc.StatusCode.OK, "", time.monotonic() - begun_s


def every_call(node: Node) -> list[grpc.aio.UnaryUnaryCall]:
    stub = node.stub
    return [
        stub.Start(StartRequest(session=Session(subject_id="s"))),
        stub.Get(GetRequest(access_token="absent")),
        stub.Exists(ExistsRequest(access_token="absent")),
        stub.SetValue(SetValueRequest(access_token="absent", key="k")),
        stub.Abandon(AbandonRequest(access_token="absent")),
        stub.List(ListRequest()),
    ]


async def until_answered(node: Node) -> None:
    async with asyncio.timeout(15):
        while (await outcome(node.stub.Start(StartRequest(session=Session(subject_id="s")))))[
            0
        ] is UNAVAILABLE:
            await asyncio.sleep(0.02)


async def test_while_the_server_is_away_cached_reads_go_on_and_the_rest_is_unavailable_at_once(
    setup: Setup,
) -> None:
    token = await started(setup.node)
    setup.kill()
    outcomes = await asyncio.gather(*map(outcome, every_call(setup.node)))
    cached = await setup.node.stub.Get(GetRequest(access_token=token))

    assert cached.session.access_token == token
    assert {code for code, _, _ in outcomes} == {UNAVAILABLE}
    assert max(took_s for _, _, took_s in outcomes) < 1
    assert all(text.startswith("mnemosyned: storage: ") for _, text, _ in outcomes)

    await setup.restart()
    await until_answered(setup.node)
    outcomes = await asyncio.gather(*map(outcome, every_call(setup.node)))
    assert UNAVAILABLE not in {code for code, _, _ in outcomes}


class Load:
    """Thirty-two callers who start sessions, whatever the answer, until told to stop."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.acknowledged: list[str] = []
        self.refused = 0
        self.is_over = False

    async def run(self) -> None:
        async with asyncio.TaskGroup() as callers:
            for _ in range(32):
                callers.create_task(self._call())

    async def _call(self) -> None:
        while not self.is_over:
            try:
                self.acknowledged.append(await started(self.node))
            except grpc.aio.AioRpcError as exc:
                assert exc.code() is UNAVAILABLE  # noqa: PT017  # the rest of the loop matters too
                self.refused += 1
                await asyncio.sleep(0.01)

    async def more(self, *, acknowledged: int = 0, refused: int = 0) -> None:
        """Wait for so many more answers of a kind."""
        goal, refused_goal = len(self.acknowledged) + acknowledged, self.refused + refused
        async with asyncio.timeout(20):
            while len(self.acknowledged) < goal or self.refused < refused_goal:
                await asyncio.sleep(0.01)


async def test_every_acknowledged_session_survives_kill_minus_nine_of_the_server(setup: Setup) -> None:
    load = Load(setup.node)
    running = asyncio.create_task(load.run())
    for _ in range(2):
        await load.more(acknowledged=500)
        setup.kill()
        await load.more(refused=1)
        await setup.restart()
    await load.more(acknowledged=100)
    load.is_over = True
    await running

    connection = await asyncpg.connect(setup.server.dsn)
    rows = await connection.fetch(f"SELECT access_token FROM {TABLE.sql}")  # noqa: S608
    await connection.close()
    assert not set(load.acknowledged) - {row["access_token"].decode() for row in rows}


async def test_a_frozen_server_costs_callers_no_more_than_the_statement_timeout(setup: Setup) -> None:
    token = await started(setup.node)
    signal_all(setup.server, signal.SIGSTOP)
    outcomes = await asyncio.gather(*map(outcome, every_call(setup.node)))
    cached = await outcome(setup.node.stub.Get(GetRequest(access_token=token)))
    signal_all(setup.server, signal.SIGCONT)

    assert {code for code, _, _ in outcomes} == {UNAVAILABLE}
    assert max(took_s for _, _, took_s in outcomes) < 3 * STATEMENT_TIMEOUT_S
    assert cached[0] is grpc.StatusCode.OK
    await until_answered(setup.node)


async def test_a_locked_table_times_out_and_a_full_pool_does_too(setup: Setup) -> None:
    connection = await asyncpg.connect(setup.server.dsn)
    async with connection.transaction():
        await connection.execute(f"LOCK TABLE {TABLE.sql} IN ACCESS EXCLUSIVE MODE")
        calls = [*every_call(setup.node), *every_call(setup.node)]
        outcomes = await asyncio.gather(*map(outcome, calls))
    await connection.close()

    assert {code for code, _, _ in outcomes} == {UNAVAILABLE}
    assert max(took_s for _, _, took_s in outcomes) < 4 * STATEMENT_TIMEOUT_S
    await until_answered(setup.node)


@pytest.mark.parametrize("sqlstate", ["53100", "53200", "25006", "58030", "XX000", "P0001"])
async def test_a_server_in_trouble_is_unavailable_and_its_words_stay_inside(
    setup: Setup, sqlstate: str, caplog: pytest.LogCaptureFixture
) -> None:
    await setup.execute(
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION 'row of hunter2' USING ERRCODE = '{sqlstate}'; END $$;"
        f"CREATE TRIGGER fail BEFORE INSERT ON {TABLE.sql} EXECUTE FUNCTION fail()"
    )
    code, text, _ = await outcome(setup.node.stub.Start(StartRequest(session=Session(subject_id="s"))))

    assert (code, text) == (UNAVAILABLE, "mnemosyned: storage: unavailable")
    assert "hunter2" not in caplog.text
    (record,) = [one for one in caplog.records if one.message == "storage_failed"]
    assert record.error == sqlstate  # type: ignore[attr-defined]

    await setup.execute(f"DROP TRIGGER fail ON {TABLE.sql}")
    assert await started(setup.node)


async def test_a_client_that_disconnects_in_the_middle_harms_nobody(setup: Setup) -> None:
    async with grpc.aio.insecure_channel(setup.node.address) as channel:
        start = channel.unary_unary("/mnemosynerpc.SessionManager/Start")
        request = StartRequest(session=Session(subject_id="s")).SerializeToString()
        calls = [start(request) for _ in range(50)]
        await asyncio.sleep(0)
    for call in calls:
        call.cancel()

    assert await started(setup.node)
    stats = setup.node.table.unary["/mnemosynerpc.SessionManager/Start"].stats
    async with asyncio.timeout(5):
        while stats.in_flight:
            await asyncio.sleep(0)


def signal_all(server: EmbeddedPostgres, number: int) -> None:
    """Send a signal to the server and all its processes, as what befalls a whole machine."""
    assert server.pid is not None
    children = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == server.pid:
            children.append(int(status.parent.name))
    for pid in (server.pid, *children):
        with suppress(ProcessLookupError):
            os.kill(pid, number)
