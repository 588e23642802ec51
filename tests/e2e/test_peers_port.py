"""A port of their own for peers (`-cluster.bind`): what each port serves, and what happens to it."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from certificates import Authority
from clusters import SECRET, Cluster, free_ports
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub
from mnemosynerpc.session_pb2 import GetRequest, Session, StartRequest
from processes import Daemon, mnemosyned

from mnemosyned.security.certificates import names_of

ENGINES = ["h2", "grpcio"]
PEER = "/mnemosynepeer.Peer/"
NEW = StartRequest(session=Session(subject_id="s"))
pytestmark = pytest.mark.timeout(120)


def launch(cluster: Cluster, name: str, *flags: str) -> Daemon:
    """Start a node whose name is its peers' port, and whose clients come to another one."""
    (port,) = free_ports(1)
    return cluster.launch(name, f"-port={port}", f"-cluster.bind={name}", *flags)


@pytest.fixture(params=ENGINES)
def cluster(postgres_dsn: str, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with Cluster(postgres_dsn, 2, f"-grpc.engine={request.param}") as one:
        for daemon in [launch(one, name) for name in one.names]:
            daemon.serving()
        asyncio.run(one.rings_equal(one.names))
        yield one


def status(address: str, path: str, credentials: grpc.ChannelCredentials | None = None) -> grpc.StatusCode:
    channel = (
        grpc.insecure_channel(address) if credentials is None else grpc.secure_channel(address, credentials)
    )
    with channel:
        try:
            channel.unary_unary(path)(b"", timeout=5)
        except grpc.RpcError as exc:
            code: grpc.StatusCode = exc.code()  # type: ignore[attr-defined]
            return code
    return grpc.StatusCode.OK


def listed(address: str) -> set[str]:
    with grpc.insecure_channel(address) as channel:
        request = ServerReflectionRequest(list_services="")
        stub = ServerReflectionStub(channel)
        (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=10)
    return {service.name for service in answer.list_services_response.service}


def test_each_port_has_its_services_alone(cluster: Cluster) -> None:
    peers, clients = cluster.names[0], cluster.daemons[cluster.names[0]].address
    unimplemented = grpc.StatusCode.UNIMPLEMENTED

    for method in ("Gossip", "Invalidate", "Leave", "Forward"):
        assert status(clients, PEER + method) is unimplemented
        assert status(peers, PEER + method) is not unimplemented
    for method in ("Get", "Start", "List", "Delete"):
        assert status(peers, f"/mnemosynerpc.SessionManager/{method}") is unimplemented
    assert not any("Peer" in name for name in listed(clients))
    assert status(peers, "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo") is unimplemented
    for address in (peers, clients):
        with grpc.insecure_channel(address) as channel:
            health = HealthStub(channel).Check(HealthCheckRequest(), timeout=5)
        assert health.status == HealthCheckResponse.SERVING


def test_calls_are_forwarded_over_the_peers_port(cluster: Cluster) -> None:
    first, second = (cluster.daemons[name] for name in cluster.names)
    with first.stub() as one, second.stub() as other:
        tokens = [one.Start(NEW, timeout=5).session.access_token for _ in range(12)]
        for token in tokens:
            assert other.Get(GetRequest(access_token=token), timeout=5).session.access_token == token
    page = first.http("/metrics")[1]

    assert 'outcome="ok"' in page
    assert 'handler="Gossip",service="mnemosynepeer.Peer"' in page
    assert page.count('grpc_server_requests{handler="Check"') == 1


def test_a_node_that_stops_leaves_and_is_never_held_for_dead(cluster: Cluster) -> None:
    first, second = cluster.names
    assert cluster.daemons[second].stop() == 0
    asyncio.run(cluster.rings_equal([first]))

    assert {one["name"]: one["status"] for one in cluster.page(first)["members"]}[second] == "left"
    assert "member_dead" not in cluster.daemons[first].log
    assert "touches_lost" not in cluster.daemons[second].log


def test_the_peers_port_is_open_while_the_clients_port_drains(cluster: Cluster) -> None:
    name = cluster.names[1]
    daemon, is_over = cluster.daemons[name], threading.Event()

    def requests() -> Iterator[ServerReflectionRequest]:
        yield ServerReflectionRequest(list_services="")
        is_over.wait(20)

    # An open stream of a client holds the drain.
    with grpc.insecure_channel(daemon.address) as channel:
        stream = ServerReflectionStub(channel).ServerReflectionInfo(requests())
        next(stream)
        daemon.process.send_signal(signal.SIGTERM)
        until_refused(daemon.address)
        code = status(name, PEER + "Gossip")
        is_over.set()

    assert code is not grpc.StatusCode.UNAVAILABLE
    assert daemon.end() == 0


def until_refused(address: str) -> None:
    host, _, port = address.rpartition(":")
    end_s = time.monotonic() + 10
    while time.monotonic() < end_s:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError:
            return
        time.sleep(0.01)
    raise AssertionError("the port is still open")


@pytest.mark.parametrize("engine", ENGINES)
def test_both_ports_serve_tls_and_take_new_files(postgres_dsn: str, engine: str, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with Cluster(postgres_dsn, 1, f"-grpc.engine={engine}") as cluster:
        (name,) = cluster.names
        daemon = launch(cluster, name, *authority.flags("127.0.0.1", "old.example")).serving()
        daemon.context = ssl.create_default_context(cafile=str(authority.path))
        ports = [int(address.rpartition(":")[2]) for address in (name, daemon.address)]
        assert all("old.example" in served(port) for port in ports)
        authority.issue("127.0.0.1", "new.example")
        daemon.wait_for("tls_reloaded")

        assert all("new.example" in served(port) for port in ports)
        credentials = authority.credentials()
        assert status(daemon.address, PEER + "Leave", credentials) is grpc.StatusCode.UNIMPLEMENTED
        assert status(name, PEER + "Leave", credentials) is grpc.StatusCode.UNAUTHENTICATED


def served(port: int) -> tuple[str, ...]:
    return names_of(ssl.get_server_certificate(("127.0.0.1", port), timeout=5))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_port_in_use_ends_the_start_with_one_line(engine: str, postgres_dsn: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        flags = [f"-grpc.engine={engine}", f"-postgres.address={postgres_dsn}", f"-cluster.listen={bind}"]
        with Daemon(*flags, f"-cluster.bind={bind}") as daemon:
            assert daemon.end() == 1

    # A host that allows few files has been warned of before.
    assert f"flag -cluster.bind: cannot listen on {bind}: " in daemon.lines[-1]
    assert "Traceback" not in daemon.log


@pytest.mark.parametrize("engine", ENGINES)
def test_an_admin_port_in_use_opens_no_port(engine: str, postgres_dsn: str) -> None:
    port, peers = free_ports(2)
    bind = f"127.0.0.1:{peers}"
    flags = [f"-grpc.engine={engine}", f"-postgres.address={postgres_dsn}", f"-cluster.listen={bind}"]
    with (
        socket.create_server(("127.0.0.1", port + 1)),
        Daemon(*flags, f"-cluster.bind={bind}", f"-port={port}") as daemon,
    ):
        assert daemon.end() == 1

    assert f"cannot listen on 127.0.0.1:{port + 1}: Address already in use" in daemon.lines[-1]
    assert "Traceback" not in daemon.log


@pytest.mark.parametrize(
    ("flags", "warns"),
    [
        (["-host=0.0.0.0"], True),
        (["-host=0.0.0.0", "-cluster.plaintext"], False),
        (["-cluster.bind=0.0.0.0:{port}"], True),
        (["-host=0.0.0.0", "-cluster.bind=127.0.0.1:{port}"], False),
        ([], False),
    ],
)
def test_a_node_that_others_call_without_tls_says_so(
    postgres_dsn: str, flags: list[str], *, warns: bool
) -> None:
    (port,) = free_ports(1)
    flags = [flag.format(port=port) for flag in flags]
    listen = [f"-cluster.listen=127.0.0.1:{port}", "-cluster.secret=hunter2-and-more-of-it"]
    with Daemon(f"-postgres.address={postgres_dsn}", *listen, *flags) as daemon:
        daemon.serving()

    assert ("cluster_without_tls" in daemon.log) is warns


def test_the_commands_find_the_admin_port_where_peers_have_a_port_of_their_own(cluster: Cluster) -> None:
    name = cluster.names[0]
    daemon = cluster.daemons[name]
    admin_port = daemon.admin.rpartition(":")[2]
    exit_code, text, _ = mnemosyned("cluster", "members", f"-node={name}", f"-admin-port={admin_port}")
    assert (exit_code, text.count("active")) == (0, 2)
    near = {
        "MNEMOSYNED_CLUSTER_LISTEN": name,
        "MNEMOSYNED_CLUSTER_BIND": name,
        "MNEMOSYNED_PORT": daemon.address.rpartition(":")[2],
    }
    exit_code, text, _ = mnemosyned("cluster", "ring", **near)
    assert (exit_code, text.count("%")) == (0, 2)
    exit_code, text, _ = mnemosyned("cluster", "leave", **near, MNEMOSYNED_CLUSTER_SECRET=SECRET)
    assert (exit_code, text) == (0, f"{name} is leaving\n")
    assert daemon.process.wait(timeout=20) == 0


@pytest.mark.parametrize("port", ["0", "65536", "x", "-1"])
def test_an_admin_port_that_is_none_is_named(port: str) -> None:
    exit_code, _, complaint = mnemosyned("cluster", "members", f"-admin-port={port}")

    assert exit_code == 2
    assert "-admin-port" in complaint
