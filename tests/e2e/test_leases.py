"""Leases as users meet them: daemons that share a table, knowingly or not, and nodes that cannot be told."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import grpc
import pytest
from clusters import Cluster, free_ports, until
from mnemosynerpc.session_pb2 import (
    AbandonRequest,
    DeleteRequest,
    GetRequest,
    ListRequest,
    Session,
    SetValueRequest,
    StartRequest,
)
from processes import Daemon, mnemosyned

from mnemosyned.api.rpc import new_token
from mnemosyned.embedded.server import EmbeddedPostgres

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as one:
        yield one


def value(daemon: Daemon, name: str) -> float:
    _, text = daemon.http("/metrics")
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


async def has_lease(*daemons: Daemon) -> None:
    await until(lambda: all(value(daemon, "mnemosyned_lease_valid") == 1 for daemon in daemons))


def started(daemon: Daemon, **fields: str) -> str:
    """Start a session of any owner: a node would choose a token of its own."""
    with daemon.stub() as stub:
        request = StartRequest(session=Session(access_token=new_token(), subject_id="s", **fields))
        return stub.Start(request, timeout=10).session.access_token


def found(daemon: Daemon, token: str) -> dict[str, str] | None:
    with daemon.stub() as stub:
        call = stub.Get.future(GetRequest(access_token=token), timeout=10)
        if call.code() is grpc.StatusCode.NOT_FOUND:
            return None
        return dict(call.result().session.bag)


def change(daemon: Daemon, token: str, text: str) -> None:
    with daemon.stub() as stub:
        stub.SetValue(SetValueRequest(access_token=token, key="k", value=text), timeout=10)


def end(daemon: Daemon, token: str) -> float:
    """End a session; return how long that took, in seconds."""
    began_s = time.monotonic()
    with daemon.stub() as stub:
        stub.Abandon(AbandonRequest(access_token=token), timeout=10)
    return time.monotonic() - began_s


async def test_daemons_that_do_not_know_each_other_serve_no_old_copy_and_say_so(
    postgres_dsn: str, stack: ExitStack
) -> None:
    one, other = (stack.enter_context(Daemon(f"-postgres.address={postgres_dsn}")) for _ in "12")
    await asyncio.to_thread(one.serving)
    await asyncio.to_thread(other.serving)
    await has_lease(one, other)
    tokens = [started(one) for _ in range(3)]
    for daemon in (one, other):
        assert [found(daemon, token) for token in tokens] == [{}] * 3

    change(one, tokens[0], "new")
    assert found(other, tokens[0]) == {"k": "new"}
    end(other, tokens[1])
    assert found(one, tokens[1]) is None
    with one.stub() as stub:
        assert stub.Delete(DeleteRequest(subject_id="s"), timeout=10).value == 2
    assert [found(other, token) for token in tokens] == [None] * 3

    line = await asyncio.to_thread(one.wait_for, "table_shared_with_a_stranger")
    assert line["other"].startswith("alone-")


async def test_no_copy_is_served_when_the_lease_has_run_out(tmp_path: Path) -> None:
    server = EmbeddedPostgres.start(tmp_path / "pg")
    with Daemon(f"-postgres.address={server.dsn}") as daemon:
        await asyncio.to_thread(daemon.leased)
        token = started(daemon)
        assert found(daemon, token) == {}
        server.stop()
        await until(lambda: value(daemon, "mnemosyned_lease_valid") == 0)

        with daemon.stub() as stub, pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
            stub.Get(GetRequest(access_token=token), timeout=10)
        assert value(daemon, 'mnemosyned_lease_refused_total{reason="lapsed"}') == 1


async def test_of_two_daemons_with_one_name_one_has_the_lease_and_the_other_says_so(
    postgres_dsn: str, stack: ExitStack
) -> None:
    name = f"127.0.0.1:{free_ports(1)[0]}"
    flags = [f"-postgres.address={postgres_dsn}", f"-cluster.listen={name}", "-cluster.secret=" + "s" * 32]
    first = stack.enter_context(Daemon(*flags)).serving()
    await has_lease(first)
    token = started(first)
    assert found(first, token) == {}

    second = stack.enter_context(Daemon(*flags))
    line = await asyncio.to_thread(second.wait_for, "node_name_taken")
    await asyncio.to_thread(second.serving)
    change(second, token, "new")
    assert found(first, token) == {"k": "new"}
    end(second, token)
    assert found(first, token) is None

    assert line["node"] == name
    assert value(second, "mnemosyned_lease_valid") == 0
    admin_port = second.admin.rpartition(":")[2]
    code, text, _ = await asyncio.to_thread(
        mnemosyned, "cluster", "members", f"-node={name}", f"-admin-port={admin_port}"
    )
    assert (code, "conflict" in text) == (0, True)


async def test_a_write_waits_for_a_node_that_stands_still_no_longer_than_its_lease(
    postgres_dsn: str, stack: ExitStack
) -> None:
    cluster = stack.enter_context(Cluster(postgres_dsn, 3))
    await asyncio.to_thread(cluster.start)
    await cluster.rings_equal(cluster.names)
    daemons = [cluster.daemons[name] for name in cluster.names]
    await has_lease(*daemons)
    stopped = cluster.names[2]
    tokens = [started(daemons[0]) for _ in range(60)]
    owned = [
        token for token in tokens if cluster.page(cluster.names[0], f"?token={token}")["owner"] == stopped
    ]
    for token in owned:
        assert found(cluster.daemons[stopped], token) == {}

    cluster.signal(stopped, signal.SIGSTOP)
    took_s = [await asyncio.to_thread(end, daemons[0], token) for token in owned]
    cluster.signal(stopped, signal.SIGCONT)

    assert len(owned) > 5
    # The lease, half a second, and what a busy machine takes.
    assert took_s[0] < 1.5 + 0.5 + 1.0
    assert sorted(took_s)[len(took_s) // 2] < 0.5
    assert [found(cluster.daemons[stopped], token) for token in owned] == [None] * len(owned)


@pytest.fixture
async def own_role(postgres_dsn: str) -> AsyncIterator[OwnRole]:
    connection = await asyncpg.connect(postgres_dsn)
    await connection.execute(f"CREATE ROLE {ROLE} LOGIN SUPERUSER PASSWORD 'p'")
    before, _, where = postgres_dsn.partition("@")
    try:
        yield OwnRole(f"{before.partition('//')[0]}//{ROLE}:p@{where}", connection)
    finally:
        await connection.execute(f"DROP OWNED BY {ROLE}; DROP ROLE {ROLE}")
        await connection.close()


ROLE = "cut_off"


@dataclass
class OwnRole:
    """The role of one node alone, which can be cut off from the storage."""

    dsn: str
    _connection: asyncpg.Connection

    async def cut_off(self) -> None:
        await self._connection.execute(f"ALTER ROLE {ROLE} NOLOGIN")
        sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1"
        await self._connection.execute(sql, ROLE)

    async def let_in(self) -> None:
        await self._connection.execute(f"ALTER ROLE {ROLE} LOGIN")


async def test_a_node_that_loses_its_storage_leaves_the_ring_and_fails_no_call(
    postgres_dsn: str, own_role: OwnRole
) -> None:
    with Cluster(postgres_dsn, 3) as cluster:
        *others, lost = cluster.names
        await asyncio.to_thread(cluster.start, others)
        cluster.dsn = own_role.dsn
        await asyncio.to_thread(cluster.start, [lost])
        await cluster.rings_equal(cluster.names)
        daemon = cluster.daemons[lost]
        await has_lease(*cluster.daemons.values())
        token = started(daemon)

        await own_role.cut_off()
        await cluster.rings_equal(others)
        assert found(daemon, token) == {}
        for number in range(20):
            change(daemon, token, str(number))
            assert found(daemon, token) == {"k": str(number)}
        with daemon.stub() as stub:
            assert len(stub.List(ListRequest(limit=5), timeout=10).sessions) == 1
            assert stub.Delete(DeleteRequest(subject_id="s"), timeout=10).value == 1
        assert found(daemon, token) is None

        await own_role.let_in()
        await cluster.rings_equal(cluster.names, within_s=30.0)
        await has_lease(daemon)
