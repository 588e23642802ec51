"""The daemon as its users run it: processes, signals, ports, logs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import asyncpg
import grpc
import pytest
import trustme
from clusters import free_ports
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from mnemosynerpc.session_pb2 import (
    AbandonRequest,
    DeleteRequest,
    ExistsRequest,
    GetRequest,
    ListRequest,
    Session,
    SetValueRequest,
    StartRequest,
)
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from processes import Daemon, processes_on, wait_until_gone
from prometheus_client.parser import text_string_to_metric_families

from mnemosyned import __version__
from mnemosyned.embedded.server import EmbeddedPostgres

ENGINES = ["h2", "grpcio"]
NEW = StartRequest(session=Session(subject_id="user:1", bag={"k": "hunter2"}))


def run_example(address: str) -> str:
    command = [sys.executable, "-m", "mnemosynerpc.example", address]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


@pytest.mark.parametrize("engine", ENGINES)
def test_the_example_runs_against_an_embedded_server(tmp_path: Path, engine: str) -> None:
    with Daemon(f"-postgres.address=embedded://{tmp_path}/pg", f"-grpc.engine={engine}") as daemon:
        out = run_example(daemon.serving().address)
        assert daemon.stop(signal.SIGINT) == 0

    assert "Ada is logged in until" in out
    assert "after that: NOT_FOUND" in out
    wait_until_gone(tmp_path)
    assert "Traceback" not in daemon.log


def test_a_second_run_finds_the_sessions_of_the_first(tmp_path: Path) -> None:
    address = f"-postgres.address=embedded://{tmp_path}/pg"
    with Daemon(address) as first, first.serving().stub() as stub:
        token = stub.Start(NEW).session.access_token
        first.stop()
    with Daemon(address) as second, second.serving().stub() as stub:
        assert dict(stub.Get(GetRequest(access_token=token)).session.bag) == {"k": "hunter2"}


def test_kill_minus_nine_leaves_no_server_and_the_next_start_recovers(tmp_path: Path) -> None:
    address = f"-postgres.address=embedded://{tmp_path}/pg"
    with Daemon(address) as first, first.serving().stub() as stub:
        token = stub.Start(NEW).session.access_token
        first.stop(signal.SIGKILL)
    wait_until_gone(tmp_path)
    with Daemon(address) as second, second.serving().stub() as stub:
        assert stub.Exists(ExistsRequest(access_token=token)).value


def test_an_embedded_server_that_dies_is_started_again(tmp_path: Path) -> None:
    with Daemon(f"-postgres.address=embedded://{tmp_path}/pg") as daemon, daemon.serving().stub() as stub:
        token = stub.Start(NEW).session.access_token
        for pid in processes_on(tmp_path):
            os.kill(pid, signal.SIGKILL)
        daemon.wait_for("private_server_died")
        deadline_s = time.monotonic() + 20
        while time.monotonic() < deadline_s:
            try:
                assert stub.Abandon(AbandonRequest(access_token=token)).value
                break
            except grpc.RpcError as exc:
                assert exc.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]  # noqa: PT017
        else:
            pytest.fail("the storage did not come back")


def test_the_last_gets_are_written_at_shutdown(postgres_dsn: str) -> None:
    with Daemon(f"-postgres.address={postgres_dsn}") as daemon, daemon.serving().stub() as stub:
        token = stub.Start(NEW).session.access_token
        time.sleep(0.005)  # the test is that time passes
        got = stub.Get(GetRequest(access_token=token)).session
        assert daemon.stop() == 0
    with Daemon(f"-postgres.address={postgres_dsn}") as again, again.serving().stub() as stub:
        (listed,) = stub.List(ListRequest()).sessions

    assert listed.expire_at.ToMicroseconds() == got.expire_at.ToMicroseconds()


def test_it_starts_without_its_storage_and_serves_when_that_comes(tmp_path: Path) -> None:
    server = EmbeddedPostgres.start(tmp_path / "pg")
    dsn = server.dsn
    server.stop()
    with Daemon(f"-postgres.address={dsn}") as daemon:
        daemon.listening().wait_for("storage_not_ready")
        with daemon.stub() as stub:
            with pytest.raises(grpc.RpcError) as caught:
                stub.Start(NEW)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
            assert daemon.http("/healthz")[0] == 200
            assert daemon.http("/healthr")[0] == 503
            with EmbeddedPostgres.start(tmp_path / "pg"):
                daemon.wait_for("serving")
                assert stub.Start(NEW).session.access_token
                assert daemon.http("/healthr")[0] == 200
                daemon.stop()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["-postgres.adress=postgres://u:hunter2@h/d"], 2, "did you mean -postgres.address?"),
        (["-ttl=soon"], 2, "flag -ttl: 'soon' is not a duration"),
        (["-postgres.address=embedded:", "-postgres.bin=/nowhere"], 1, "flag -postgres.bin"),
        (["-cluster.seeds=10.0.0.1:8080"], 2, "flag -cluster.seeds names others, who need -cluster.listen"),
    ],
)
def test_what_is_wrong_ends_the_start_with_one_line(
    flags: list[str], code: int, words: str, tmp_path: Path
) -> None:
    with Daemon(*flags, environ={"XDG_DATA_HOME": str(tmp_path)}) as daemon:
        assert daemon.end() == code

    assert words in daemon.log
    assert daemon.log.count("\n") == 1
    assert "hunter2" not in daemon.log


def test_a_refused_password_ends_the_start_without_showing_it(postgres_dsn: str) -> None:
    wrong = re.sub(r":[^:@/]+@", ":hunter2@", postgres_dsn)
    with Daemon(f"-postgres.address={wrong}") as daemon:
        assert daemon.end() == 1

    assert "password authentication failed" in daemon.log
    assert "hunter2" not in daemon.log
    assert "Traceback" not in daemon.log


@pytest.mark.parametrize("engine", ENGINES)
def test_a_taken_port_ends_the_start_with_one_line(engine: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = ["-storage=memory", f"-grpc.engine={engine}", f"-port={port}"]
        with Daemon(*flags) as daemon:
            assert daemon.end() == 1

    assert f"cannot listen on 127.0.0.1:{port}" in daemon.log
    assert "attempting" not in daemon.log
    assert "Traceback" not in daemon.log


def test_a_taken_admin_port_ends_the_start_with_one_line() -> None:
    # Both are free until one is taken here: a port of the system's choice has a neighbour that may be in use.
    (port,) = free_ports(1)
    with (
        socket.create_server(("127.0.0.1", port + 1)),
        Daemon("-storage=memory", f"-port={port}") as daemon,
    ):
        assert daemon.end() == 1

    assert f"cannot listen on 127.0.0.1:{port + 1}: Address already in use" in daemon.log
    assert "Traceback" not in daemon.log


def test_version_help_and_check_config() -> None:
    for flag, words in (
        ("-version", f"mnemosyned {__version__}"),
        ("-help", "-postgres.address"),
        ("-check-config", "valid"),
    ):
        with Daemon(flag) as daemon:
            assert daemon.end() == 0
        assert words in daemon.out


def test_development_says_where_it_is_and_how_to_try_it(tmp_path: Path) -> None:
    flags = ["-log.environment=development", f"-postgres.address=embedded://{tmp_path}/pg"]
    with Daemon(*flags) as daemon:
        assert daemon.process.stdout is not None
        welcome = [daemon.process.stdout.readline() for _ in range(8)]
        (line,) = [line.removeprefix("  try it").strip() for line in welcome if "try it" in line]
        tried = subprocess.run(line.split(), check=True, capture_output=True, text=True, timeout=30).stdout
        assert daemon.stop(signal.SIGINT) == 0

    assert f"data     {tmp_path}/pg" in "".join(welcome)
    assert "gRPC     127.0.0.1:" in "".join(welcome)
    assert "Ada is logged in until" in tried
    assert "storage_ready" in daemon.log


def test_grpc_debug_logs_every_call() -> None:
    with Daemon("-storage=memory", "-grpc.debug") as daemon, daemon.serving().stub() as stub:
        stub.Exists(ExistsRequest(access_token="absent"))
        line = daemon.wait_for("rpc")
        daemon.stop()

    assert (line["method"], line["code"]) == ("/mnemosynerpc.SessionManager/Exists", "OK")


def test_touches_that_cannot_be_written_at_the_end_are_told(tmp_path: Path) -> None:
    server = EmbeddedPostgres.start(tmp_path / "pg")
    with Daemon(f"-postgres.address={server.dsn}") as daemon, daemon.leased().stub() as stub:
        token = stub.Start(NEW).session.access_token
        server.stop()
        time.sleep(0.005)  # the test is that time passes
        stub.Get(GetRequest(access_token=token))
        assert daemon.stop() == 0

    assert '"msg": "touches_lost", "sessions": 1' in daemon.log


def test_memory_storage_warns_that_it_forgets() -> None:
    with Daemon("-storage=memory") as daemon:
        daemon.serving()
        daemon.stop()

    assert "storage_forgets_all_sessions_at_exit" in daemon.log


METRICS = """
mnemosyned_cache_hits_total mnemosyned_cache_misses_total mnemosyned_cache_refresh_total
mnemosyned_cleanup_errors_total mnemosyned_storage_postgres_queries_total
mnemosyned_storage_postgres_errors_total mnemosyned_storage_postgres_query_duration_seconds_bucket
mnemosyned_storage_postgres_connections grpc_server_requests_total grpc_server_errors_total
grpc_server_request_duration_seconds_bucket grpc_server_requests
""".split()  # noqa: SIM905  # a paragraph of names


def test_metrics_have_the_names_of_the_go_daemon_and_add_up(postgres_dsn: str) -> None:
    with Daemon(f"-postgres.address={postgres_dsn}") as daemon, daemon.leased().stub() as stub:
        token = stub.Start(NEW).session.access_token
        for _ in range(3):
            stub.Get(GetRequest(access_token=token))
        for _ in range(2):
            with pytest.raises(grpc.RpcError):
                stub.Get(GetRequest(access_token="absent"))
        ended = stub.Start(NEW).session.access_token
        stub.Abandon(AbandonRequest(access_token=ended))
        others = [stub.Start(StartRequest(session=Session(subject_id="leaving"))) for _ in range(2)]
        stub.Delete(DeleteRequest(subject_id=others[0].session.subject_id))
        _, page = daemon.http("/metrics")
    families = list(text_string_to_metric_families(page))
    samples = [sample for family in families for sample in family.samples]

    def value(name: str, **labels: str) -> float:
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    declared = {sample.name for sample in samples} | {f"{family.name}_total" for family in families}
    assert set(METRICS) <= declared
    assert value("mnemosyned_cache_hits_total") == 3
    assert value("mnemosyned_cache_misses_total") == 2
    get = {"service": "mnemosynerpc.SessionManager", "handler": "Get", "type": "unary"}
    assert value("grpc_server_requests_total", **get) == 5
    assert value("grpc_server_requests_total", code="OK", **get) == 3
    assert value("grpc_server_errors_total", code="NOT_FOUND", **get) == 2
    assert value("grpc_server_request_duration_seconds_count", **get) == 5
    assert value("grpc_server_requests", **get) == 0
    assert value("mnemosyned_ready") == 1
    assert value("mnemosyned_build_info", engine="h2", storage="postgres") == 1
    assert value("mnemosyned_sessions_started_total") == 4
    assert value("mnemosyned_sessions_ended_total", cause="abandoned") == 1
    assert value("mnemosyned_sessions_ended_total", cause="deleted") == 2
    assert value("mnemosyned_storage_postgres_connections_in_use") == 0


def test_a_failed_request_is_one_line_with_what_an_operator_asks(postgres_dsn: str) -> None:
    flags = [f"-postgres.address={postgres_dsn}", "-log.level=debug"]
    with Daemon(*flags) as daemon, daemon.serving().stub() as stub:
        with pytest.raises(grpc.RpcError):
            stub.Get(GetRequest(access_token="absent"), metadata=(("request_id", "r-17"),))
        line = daemon.wait_for("rpc_failed")
        daemon.stop()

    assert line["method"] == "/mnemosynerpc.SessionManager/Get"
    assert (line["code"], line["request_id"]) == ("NOT_FOUND", "r-17")
    assert line["elapsed_ms"] > 0
    assert line["peer"].startswith("127.0.0.1:")


@pytest.mark.parametrize("engine", ENGINES)
def test_no_secret_reaches_a_log_a_metric_or_an_error(postgres_dsn: str, engine: str) -> None:
    password = re.findall(r":([^:@/]+)@", postgres_dsn)[0]
    flags = [f"-postgres.address={postgres_dsn}", "-log.level=debug", f"-grpc.engine={engine}"]
    with Daemon(*flags) as daemon, daemon.serving().stub() as stub:
        token = stub.Start(NEW).session.access_token
        stub.Get(GetRequest(access_token=token), metadata=(("authorization", token),))
        stub.SetValue(SetValueRequest(access_token=token, key="k", value="hunter3"))
        with pytest.raises(grpc.RpcError) as duplicate:
            stub.Start(StartRequest(session=Session(access_token=token, subject_id="s")))
        stub.Abandon(AbandonRequest(access_token=token))
        with pytest.raises(grpc.RpcError) as absent:
            stub.Get(GetRequest(access_token=token))
        stub.Delete(DeleteRequest(access_token=token))
        _, page = daemon.http("/metrics")
        daemon.stop()
    everything = daemon.log + daemon.out + page + str(duplicate.value) + str(absent.value)

    for secret in (token, password, "hunter2", "hunter3"):
        assert secret not in everything


@pytest.mark.parametrize("engine", ENGINES)
def test_tls_is_served_and_plain_text_refused(tmp_path: Path, engine: str) -> None:
    authority = trustme.CA()
    identity = authority.issue_cert("localhost", "127.0.0.1")
    identity.private_key_pem.write_to_path(tmp_path / "key.pem")
    for number, pem in enumerate(identity.cert_chain_pems):
        pem.write_to_path(tmp_path / "crt.pem", append=number > 0)
    files = [f"-tls.crt={tmp_path}/crt.pem", f"-tls.key={tmp_path}/key.pem"]
    with Daemon("-storage=memory", "-tls", f"-grpc.engine={engine}", *files) as daemon:
        daemon.serving()
        credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
        with grpc.secure_channel(daemon.address, credentials) as channel:
            assert SessionManagerStub(channel).Start(NEW, timeout=10).session.access_token
        with daemon.stub() as plain, pytest.raises(grpc.RpcError):
            plain.Start(NEW, timeout=3)
        assert daemon.stop() == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_unusable_tls_files_end_the_start_with_one_line(tmp_path: Path, engine: str) -> None:
    (tmp_path / "pem").write_text("nonsense")
    files = [f"-tls.crt={tmp_path}/pem", f"-tls.key={tmp_path}/pem"]
    with Daemon("-storage=memory", "-tls", f"-grpc.engine={engine}", *files) as daemon:
        assert daemon.end() == 1

    assert "Traceback" not in daemon.log
    assert "flag -tls: " in daemon.log
    assert "no PEM file" in daemon.log


@pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load (nghttp2-client) is not installed")
@pytest.mark.parametrize("engine", ENGINES)
def test_h2load_runs_against_it(tmp_path: Path, engine: str) -> None:
    with Daemon("-storage=memory", f"-grpc.engine={engine}") as daemon, daemon.serving().stub() as stub:
        token = stub.Start(NEW).session.access_token
        message = GetRequest(access_token=token).SerializeToString()
        (tmp_path / "body").write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
        url = f"http://{daemon.address}/mnemosynerpc.SessionManager/Get"
        headers = ["-H", "content-type: application/grpc", "-H", "te: trailers"]
        options = ["-c", "4", "-m", "16", "-n", "5000", "-d", str(tmp_path / "body"), *headers]
        command = ["h2load", *options, url]
        out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=50).stdout
        _, page = daemon.http("/metrics")

    assert "5000 succeeded, 0 failed" in out
    assert re.search(r'requests_total{code="OK",handler="Get",[^}]*} 5000\.0', page)


async def test_the_table_holds_what_the_contract_says(postgres_dsn: str) -> None:
    with Daemon(f"-postgres.address={postgres_dsn}") as daemon, daemon.serving().stub() as stub:
        stub.Start(StartRequest(session=Session(access_token="tók", subject_id="s", bag={"k": "v"})))
    connection = await asyncpg.connect(postgres_dsn)
    row = await connection.fetchrow("SELECT * FROM mnemosyne.session")
    await connection.close()

    assert row["access_token"] == "tók".encode()
    assert row["bag"] == Session(bag={"k": "v"}).SerializeToString()


def test_a_draining_node_says_so_and_answers_until_its_delay_is_over() -> None:
    with Daemon("-storage=memory", "-drain.delay=1s") as daemon, daemon.serving().stub() as stub:
        token = stub.Start(StartRequest(session=Session(subject_id="s")), timeout=5).session.access_token
        daemon.process.send_signal(signal.SIGTERM)
        daemon.wait_for("draining")
        with grpc.insecure_channel(daemon.address) as late:
            health = HealthStub(late).Check(HealthCheckRequest(), timeout=5)
            assert health.status == HealthCheckResponse.NOT_SERVING
            assert SessionManagerStub(late).Get(GetRequest(access_token=token), timeout=5)
        assert daemon.http("/healthr")[0] == 503
        assert daemon.end() == 0


@pytest.mark.parametrize("engine", ["h2", "grpcio"])
def test_the_flags_of_limits_reach_what_they_limit(engine: str) -> None:
    flags = ["-bag.max-entries=2", "-bag.max-key=3", "-bag.max-value=5", "-grpc.max-connections=1"]
    with (
        Daemon("-storage=memory", f"-grpc.engine={engine}", *flags) as daemon,
        daemon.serving().stub() as stub,
    ):
        for bag, complaint in (
            ({"a": "1", "b": "2", "c": "3"}, "more than 2 entries"),
            ({"long": "1"}, "key is longer than 3 bytes"),
            ({"a": "longer"}, "value is longer than 5 bytes"),
        ):
            with pytest.raises(grpc.RpcError, match=complaint):
                stub.Start(StartRequest(session=Session(subject_id="s", bag=bag)), timeout=5)
        apart = [("grpc.use_local_subchannel_pool", 1)]
        with (
            grpc.insecure_channel(daemon.address, options=apart) as second,
            pytest.raises(grpc.RpcError, match=r"DEADLINE_EXCEEDED|UNAVAILABLE"),
        ):
            SessionManagerStub(second).Get(GetRequest(access_token="t"), timeout=0.5)
