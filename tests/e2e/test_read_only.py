"""PostgreSQL servers that refuse writes, are promoted, or die: a daemon goes to where it can write."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from mnemosynerpc.session_pb2 import ExistsRequest, GetRequest, Session, StartRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from probes import code_of
from processes import Daemon
from replicas import Replicas, execute, kill, promote, replicas, set_read_only
from waiting import until

from mnemosyned.embedded.server import EmbeddedPostgres

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
# No copies: each Get asks the server. An expiry need not move for a minute.
FLAGS = (
    "-cache.ttl=0s",
    "-ttl=10m",
    "-touch.interval=1m",
    "-postgres.connect.timeout=2s",
    "-postgres.pool.size=4",
)
BACKENDS = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'mnemosyned'"


def start(stub: SessionManagerStub) -> str:
    return str(stub.Start(StartRequest(session=Session(subject_id="s")), timeout=10).session.access_token)


def is_ready(daemon: Daemon) -> bool:
    return daemon.http("/healthr")[0] == 200


def reason(daemon: Daemon) -> str:
    probes = json.loads(daemon.http("/healthr")[1])["probes"]
    return str(probes.get("reason", "")) if probes["postgres"] == "NOT_SERVING" else ""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres.start(tmp_path / "postgres") as one:
        yield one


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Replicas]:
    with replicas(tmp_path) as both:
        yield both


def test_a_lone_server_that_turns_read_only_is_read_from_and_comes_back_by_itself(
    server: EmbeddedPostgres,
) -> None:
    with Daemon(f"-postgres.address={server.dsn}", *FLAGS) as daemon, daemon.serving().stub() as stub:
        fresh, old = start(stub), start(stub)
        execute(
            server.dsn,
            f"UPDATE mnemosyne.session SET expire_at = now() + interval '5 min' WHERE access_token = '{old}'",  # noqa: S608  # its own token
        )
        until(lambda: is_ready(daemon))
        set_read_only(server, "on")
        until(lambda: not is_ready(daemon))
        codes = {
            "Start": code_of(lambda: start(stub)),
            "Get": code_of(lambda: stub.Get(GetRequest(access_token=fresh))),
            "Get that must extend": code_of(lambda: stub.Get(GetRequest(access_token=old))),
            "Exists": code_of(lambda: stub.Exists(ExistsRequest(access_token=fresh))),
        }
        said = reason(daemon)
        set_read_only(server, "off")
        until(lambda: is_ready(daemon))

        assert codes == {
            "Start": UNAVAILABLE,
            "Get": grpc.StatusCode.OK,
            "Get that must extend": UNAVAILABLE,
            "Exists": grpc.StatusCode.OK,
        }
        assert "25006 read_only_sql_transaction" in said
        assert start(stub)
        assert stub.Get(GetRequest(access_token=old)).session.subject_id == "s"
        _is_awaited_at_the_start(server)


def _is_awaited_at_the_start(server: EmbeddedPostgres) -> None:
    set_read_only(server, "on")
    with Daemon(f"-postgres.address={server.dsn}", *FLAGS) as daemon:
        daemon.wait_for("storage_not_ready")
        daemon.admin = next(json.loads(one)["admin"] for one in daemon.lines if '"listening"' in one)
        until(lambda: "25006" in reason(daemon))
        set_read_only(server, "off")
        until(lambda: is_ready(daemon))


@pytest.mark.slow
def test_a_database_that_is_read_only_for_new_connections_is_left_when_that_ends(
    server: EmbeddedPostgres,
) -> None:
    with Daemon(f"-postgres.address={server.dsn}", *FLAGS) as daemon, daemon.serving().stub() as stub:
        until(lambda: is_ready(daemon))
        name = execute(server.dsn, "SELECT quote_ident(current_database())")[0][0]
        execute(server.dsn, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        # New ones alone take the setting.
        execute(server.dsn, BACKENDS.replace("count(*)", "pg_terminate_backend(pid)"))
        until(lambda: not is_ready(daemon))
        until(lambda: "25006" in reason(daemon))
        code = code_of(lambda: start(stub))
        execute(
            server.dsn,
            "SET default_transaction_read_only = off",
            f"ALTER DATABASE {name} RESET default_transaction_read_only",
        )
        until(lambda: is_ready(daemon))

        assert code is UNAVAILABLE
        assert start(stub)


def test_of_several_hosts_the_one_to_write_to_is_found_wherever_it_is(pair: Replicas) -> None:
    url = pair.url(pair.standby, pair.primary)
    with Daemon(f"-postgres.address={url}", *FLAGS) as daemon, daemon.serving().stub() as stub:
        token = start(stub)
        until(lambda: is_ready(daemon))
        until(lambda: execute(pair.standby.dsn, "SELECT count(*) FROM mnemosyne.session")[0][0] == 1)

        # A primary that was demoted, but keeps its connections, and the promoted standby.
        set_read_only(pair.primary, "on")
        promote(pair.standby)
        until(lambda: code_of(lambda: start(stub)) is grpc.StatusCode.OK)
        until(lambda: is_ready(daemon))
        until(lambda: execute(pair.primary.dsn, BACKENDS)[0][0] == 0)

        assert stub.Get(GetRequest(access_token=token)).session.subject_id == "s"
        assert execute(pair.standby.dsn, BACKENDS)[0][0] >= 1


@pytest.mark.slow
def test_a_standby_alone_is_read_from_unless_the_address_forbids_it(pair: Replicas) -> None:
    url = pair.url(pair.primary, pair.standby)
    strict = pair.url(pair.primary, pair.standby, query="?target_session_attrs=read-write")
    with (
        Daemon(f"-postgres.address={url}", *FLAGS) as daemon,
        Daemon(f"-postgres.address={strict}", *FLAGS) as picky,
        daemon.serving().stub() as stub,
        picky.serving().stub() as picky_stub,
    ):
        token = start(stub)
        # Its replication is asynchronous.
        until(lambda: execute(pair.standby.dsn, "SELECT count(*) FROM mnemosyne.session")[0][0] == 1)
        kill(pair.primary)
        until(lambda: "25006" in reason(daemon))
        until(lambda: "no server that can be written to" in reason(picky) or "refused" in reason(picky))
        codes = [
            code_of(lambda: stub.Get(GetRequest(access_token=token))),
            code_of(lambda: start(stub)),
            code_of(lambda: picky_stub.Get(GetRequest(access_token=token))),
        ]
        promote(pair.standby)
        until(lambda: is_ready(daemon) and is_ready(picky))

        assert codes == [grpc.StatusCode.OK, UNAVAILABLE, UNAVAILABLE]
        assert start(stub)
        assert start(picky_stub)


class Load:
    """Callers that start sessions one after the other, and remember which they were told of."""

    def __init__(self, stub: SessionManagerStub) -> None:
        self.stub = stub
        self.acknowledged: list[str] = []
        self.failed_s: list[float] = []
        self.is_over = False
        self.threads = [threading.Thread(target=self._run) for _ in range(8)]

    def _run(self) -> None:
        while not self.is_over:
            try:
                self.acknowledged.append(start(self.stub))
            except grpc.RpcError as error:
                assert error.code() is UNAVAILABLE  # type: ignore[attr-defined]  # noqa: PT017  # the loop goes on
                self.failed_s.append(time.monotonic())
                time.sleep(0.02)

    def more(self, count: int) -> None:
        goal = len(self.acknowledged) + count
        until(lambda: len(self.acknowledged) >= goal)


def test_a_failover_under_load_loses_no_acknowledged_session(pair: Replicas) -> None:
    execute(pair.primary.dsn, "ALTER SYSTEM SET synchronous_standby_names = '*'", "SELECT pg_reload_conf()")
    url = pair.url(pair.primary, pair.standby)
    with Daemon(f"-postgres.address={url}", *FLAGS) as daemon, daemon.serving().stub() as stub:
        load = Load(stub)
        for thread in load.threads:
            thread.start()
        try:
            load.more(300)
            assert not load.failed_s
            kill(pair.primary)
            until(lambda: load.failed_s)
            promote(pair.standby)
            promoted_s = time.monotonic()
            load.more(300)
        finally:
            load.is_over = True
            for thread in load.threads:
                thread.join(30)
        rows = execute(pair.standby.dsn, "SELECT access_token FROM mnemosyne.session")

        assert not set(load.acknowledged) - {row[0].decode() for row in rows}
        assert max(load.failed_s) - promoted_s < 5
        until(lambda: is_ready(daemon))
